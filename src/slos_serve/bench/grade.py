"""From what came back to outcomes: the client's clock decides, by the rules of `core.slo.deadlines`.

A request arrives when it is sent and a token when the chunk that holds it is received, so HTTP counts. A
promise is what the server said: the `slo` object of the stream or the header `x-slo-verdict`. A server
that says nothing makes no promises, and its requests are met or missed; one that makes promises has
those it did not make `declined`, even where they happened to be in time. One that has stepped down to vLLM's
own order, or only observes, makes none meanwhile and says so (reason `observe`): as the server itself counts them,
those requests are met or missed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slos_serve.bench.client import REFUSALS, BenchRequest, StreamResult
from slos_serve.core.slo.deadlines import CHECK_EVERY, Grade, StreamGrader, due_s, outcome
from slos_serve.core.slo.summary import GradedRequest, summarize

PROMISES = ("promised", "promoted")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedStream:
    """One request, what came back, and its grade.

    `lateness_s`: most time by which a checked token was late (negative: the least time to spare); None
    without tokens or without a promise. `stages` as in `core.slo.deadlines.Grade`.
    """

    request: BenchRequest
    result: StreamResult
    graded: GradedRequest
    lateness_s: float | None
    stages: Mapping[str, str]


def verdict(result: StreamResult) -> str:
    """Return what the server said last about the promise: "" where it said nothing or only observed."""
    said: Mapping[str, Any] = result.slo or {}
    if _only_observed(result):
        return ""
    return str(said.get("verdict") or result.headers.get("x-slo-verdict") or "")


def _only_observed(result: StreamResult) -> bool:
    return "observe" in ((result.slo or {}).get("reason"), result.headers.get("x-slo-reason"))


def grade_stream(request: BenchRequest, result: StreamResult, *, makes_promises: bool | None = None) -> GradedStream:
    """Grade one stream. `makes_promises`: the server does at all; None: it does if it said so here."""
    said = verdict(result)
    promised = said in PROMISES
    grader = StreamGrader(result.sent_s, request.slo, thinks=request.thinking_tokens > 0)
    before = 0
    for at_s, tokens in result.chunks:
        thinking = max(0, min(tokens, request.thinking_tokens) - before)
        grader.feed(at_s, tokens - before, thinking)
        before = tokens
    finished_s = result.sent_s if result.finished_s is None else result.finished_s
    grade = grader.finish(finished_s)
    speaks = (bool(said) if makes_promises is None else makes_promises) and not _only_observed(result)
    rejected = result.status in REFUSALS
    ended = outcome(
        grade,
        has_slo=not request.slo.is_empty,
        promised=promised or not speaks,
        rejected=rejected,
        failed=result.error is not None and not rejected,
    )
    return GradedStream(
        request=request,
        result=result,
        graded=_graded(request, result, grade, ended, promised=promised),
        lateness_s=lateness(request, result),
        stages=grade.stages,
    )


def _graded(request: BenchRequest, result: StreamResult, grade: Grade, ended: str, *, promised: bool) -> GradedRequest:
    served = ended in ("met", "missed")
    tokens = grade.num_output_tokens
    last_due = None
    if tokens:
        last_due = due_s(tokens, result.sent_s, result.sent_s + grade.ttft_s, request.slo, request.thinking_tokens)
    lead_ms = (result.slo or {}).get("promise_lead_ms")
    return GradedRequest(
        slo_class=request.slo_class,
        outcome=ended,
        promised=promised,
        met_mean_tpot=served and grade.met_mean_tpot,
        met_window=served and grade.met_window,
        ttft_s=grade.ttft_s if tokens else None,
        tpot_s=grade.tpot_s if tokens > 1 else None,
        arrival_s=result.sent_s,
        finish_s=result.chunks[-1][0] if tokens else None,
        last_due_s=last_due,
        num_prompt_tokens=result.prompt_tokens or len(request.prompt_token_ids),
        num_output_tokens=tokens,
        promise_lead_s=None if lead_ms is None else float(lead_ms) / 1e3,
    )


def lateness(request: BenchRequest, result: StreamResult) -> float | None:
    """Return by how much the latest of the checked tokens was late, in seconds; negative: to spare."""
    if request.slo.is_empty or not result.chunks:
        return None
    first_s, last = result.chunks[0][0], result.chunks[-1][1]
    worst, before = -math.inf, 0
    for at_s, tokens in result.chunks:
        step = before - before % CHECK_EVERY + CHECK_EVERY
        checked = [n for n in (1, step, last) if before < n <= tokens]
        for n in checked:
            worst = max(worst, at_s - due_s(n, result.sent_s, first_s, request.slo, request.thinking_tokens))
        before = tokens
    return worst if math.isfinite(worst) else None


def grade_run(requests: Sequence[BenchRequest], results: Sequence[StreamResult]) -> list[GradedStream]:
    """Grade every stream of a run; a server that made one promise is one that makes promises."""
    speaks = any(verdict(result) for result in results)
    pairs = zip(requests, results, strict=True)
    return [grade_stream(request, result, makes_promises=speaks) for request, result in pairs]


def entry(
    streams: Sequence[GradedStream], *, system: str, scenario: str, span_s: float, rate_rps: float | None = None
) -> dict[str, Any]:
    """Return the JSON entry of one system at one rate. `span_s`: length of the offered window."""
    graded = [stream.graded for stream in streams]
    return summarize(graded, system=system, scenario=scenario, duration_s=span_s, rate_rps=rate_rps)


def request_row(stream: GradedStream) -> dict[str, Any]:
    """Return one request for the report: what was asked, what came, how it was judged."""
    request, result, graded = stream.request, stream.result, stream.graded
    return {
        "request_id": request.request_id,
        "class": request.slo_class,
        "sent_s": round(result.sent_s, 4),
        "lag_s": round(result.lag_s, 4),
        "prompt_tokens": graded.num_prompt_tokens,
        "output_tokens": graded.num_output_tokens,
        "asked_output_tokens": request.output_tokens,
        "slo": {name: round(value, 5) for name, value in request.slo.items() if value is not None},
        "outcome": graded.outcome,
        "verdict": verdict(result),
        "reason": (result.slo or {}).get("reason") or result.headers.get("x-slo-reason") or "",
        "promised": graded.promised,
        "ttft_s": _rounded(graded.ttft_s),
        "tpot_s": _rounded(graded.tpot_s),
        "lateness_s": _rounded(stream.lateness_s),
        "stages": dict(stream.stages),
        "finished_s": _rounded(graded.finish_s),
        "error": result.error,
        "counted_by": result.counted_by,
        "chunks": [[round(at_s, 4), tokens] for at_s, tokens in result.chunks],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
