"""Workloads with stages for a real engine: requests that think, and agents that call tools.

*Reasoning*: one request thinks, then answers, each at its own TPOT. A small model does not think, so vLLM's own
`thinking_token_budget` ends the span: every prompt ends with the token that `--reasoning-config` names as the start
of thinking, and vLLM puts out the end token when the request's budget is used up. A scheduler sees no more than
it would of a reasoning model: the end token, when it comes.

*Tool*: a session of several rounds. A round's prompt is the one before it and more; it is sent when the round before
has ended and the tool has taken its time. Loop rounds have a tighter TPOT than the last. Prompts repeat a phrase,
so that n-gram drafts find something. A round that is never sent, since one before it failed, is a miss.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slos_serve.bench.client import BenchRequest, Client, StreamResult, cancel, random_prompt
from slos_serve.bench.lab import MODEL_NAME
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.workload import Lengths
from slos_serve.config import SloConfig
from slos_serve.core.types import Slo
from slos_serve.traces.trace import synthetic_arrivals

Session = list[tuple[float, BenchRequest]]  # (seconds from the end of the round before, round)

DRAFTS = 4
THINK_START, THINK_END = ("<jupyter_start>", 11), ("<jupyter_output>", 14)  # never put out by themselves
SPECULATION = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
FLAGS = (
    *("--block-size", "32"),  # on CPUs 128 by default: too coarse for prefixes of this size
    *("--reasoning-config", json.dumps({"reasoning_start_str": THINK_START[0], "reasoning_end_str": THINK_END[0]})),
)
DRAFTING = ("--speculative-config", json.dumps(SPECULATION))
PHRASE, THINKING_SHARE = 12, (0.4, 0.75)
ROUNDS, GROWTH, TOOL_TIME_S = (2, 5), (32, 96), (0.2, 1.5)
REASONING = Lengths(
    prompt_median=64, prompt_sigma=0.7, prompt_range=(16, 256),
    output_median=72, output_sigma=0.5, output_range=(24, 200), max_tokens=256,
)  # fmt: skip
TOOL = Lengths(
    prompt_median=110, prompt_sigma=0.6, prompt_range=(48, 400),
    output_median=24, output_sigma=0.6, output_range=(6, 80), max_tokens=128,
)  # fmt: skip
LENGTHS = {"reasoning": REASONING, "tool": TOOL}
REJECTS = "-or-reject"
SELECTION_SEED = 200  # plain vLLM's setting is chosen on it; used for nothing else


def sessions_of(scaled: Scaled, *, rate_rps: float, duration_s: float, seed: int) -> list[Session]:
    """Return the sessions of one run; `rate_rps` counts their rounds. A reasoning request is a session of one."""
    rng = np.random.default_rng(seed)
    (name,) = scaled.mix
    rounds = (sum(ROUNDS) - 1) / 2 if name == "tool" else 1
    count = max(1, round(rate_rps * duration_s / rounds))
    at_s = synthetic_arrivals("gamma:2", count / duration_s, count + 1, rng)
    at_s = (at_s[:-1] - at_s[0]) * (duration_s / (at_s[-1] - at_s[0]))
    build = tool_session if name == "tool" else reasoning_session
    return [build(scaled, f"s{seed}-{i}", start, rng) for i, start in enumerate(at_s.tolist())]


def reasoning_session(scaled: Scaled, name: str, at_s: float, rng: np.random.Generator) -> Session:
    """Return a request that thinks for a part of its output, told to vLLM as the budget of thinking."""
    (prompt,), (output,) = REASONING.draw(1, rng)
    thinking = max(2, round(int(output) * rng.uniform(*THINKING_SHARE)))
    ids = [*random_prompt(int(prompt) - 1, rng), THINK_START[1]]
    request = _request(scaled, name, at_s, ids, int(output), stage=None)
    extra = {"thinking_token_budget": thinking - 1, "slo": _said(request)}  # the end token is the last of the span
    return [(0.0, replace(request, thinking_tokens=thinking, extra=extra))]


def tool_session(scaled: Scaled, name: str, at_s: float, rng: np.random.Generator) -> Session:
    """Return the rounds of an agent, each with the prompt before it and more of the same phrase."""
    count = int(rng.integers(*ROUNDS))
    prompts, outputs = TOOL.draw(count, rng)
    phrase = random_prompt(PHRASE, rng)
    session: Session = []
    ids = _repeated(phrase, int(prompts[0]), rng)
    for turn, output in enumerate(outputs.tolist()):
        stage = "final" if turn == count - 1 else "loop"
        request = _request(scaled, f"{name}-{turn}", at_s, list(ids), output, stage=stage)
        extra = {"slo": _said(request, stage=stage), "session_id": name}
        session.append((float(rng.uniform(*TOOL_TIME_S)) if turn else 0.0, replace(request, extra=extra)))
        ids += _repeated(phrase, int(rng.integers(*GROWTH)), rng)
    return session


def _repeated(phrase: Sequence[int], num_tokens: int, rng: np.random.Generator) -> list[int]:
    """Return a phrase over and over, one token in eight another."""
    ids = np.resize(phrase, num_tokens)
    other = rng.random(num_tokens) < 1 / 8
    ids[other] = random_prompt(int(other.sum()), rng)
    return [int(token) for token in ids]


def _request(scaled: Scaled, name: str, at_s: float, ids: list[int], output: int, *, stage: str | None) -> BenchRequest:
    (slo_class,) = scaled.mix
    slo, _, _ = scaled.config.resolve(slo_class, {"stage": stage}, len(ids), scaled.profile.reference_s)
    return BenchRequest(
        request_id=name,
        offset_s=at_s,
        prompt_token_ids=ids,
        output_tokens=output,
        hidden_max_tokens=LENGTHS[slo_class].max_tokens,
        slo=slo,
        slo_class=slo_class,
    )


def _said(request: BenchRequest, slo: Slo | None = None, **more: Any) -> dict[str, Any]:
    promises = request.slo if slo is None else slo
    given = {f"{name.removesuffix('_s')}_ms": value * 1e3 for name, value in promises.items() if value is not None}
    return {"class": request.slo_class, **given, **more}


def without_stages(scaled: Scaled) -> Callable[[BenchRequest], BenchRequest]:
    """Ask for the tightest TPOT throughout: what an operator must do whose scheduler knows no stages."""

    def asks(request: BenchRequest) -> BenchRequest:
        plain = replace(request.slo, tpot_s=scaled.tightest_tpot_s, thinking_tpot_s=None)
        return replace(request, extra={**request.extra, "slo": {**_said(request, plain), "class": "chat"}})

    return asks


def without_best_effort(request: BenchRequest) -> BenchRequest:
    """Ask to be turned away where nothing can be promised, instead of being served after the others."""
    slo = {**request.extra["slo"], "class": request.slo_class + REJECTS}
    return replace(request, extra={**request.extra, "slo": slo})


def offered_classes() -> dict[str, Any]:
    """Return what our servers are configured with: the shipped classes, and each as one that rejects."""
    shipped = SloConfig()
    rejecting = {
        name + REJECTS: replace(one, name=name + REJECTS, on_unattainable="reject")
        for name, one in shipped.classes.items()
        if one.promises
    }
    return replace(shipped, classes={**shipped.classes, **rejecting}).to_json()


async def offer_sessions(url: str, sessions: Sequence[Session], drain_s: float = 60.0) -> list[StreamResult]:
    """Send every session at its time, its rounds one after the other; return results in order of the rounds."""
    results = {
        request.request_id: StreamResult(request_id=request.request_id, sent_s=request.offset_s, error="never sent")
        for session in sessions
        for _, request in session
    }

    async def run(session: Session) -> None:
        for pause_s, request in session:
            await asyncio.sleep(pause_s or request.offset_s - client.now_s())
            result = results[request.request_id]
            result.error, result.sent_s = None, client.now_s()
            await client.stream(client.body(request), result)
            if results[request.request_id].error:
                return

    async with Client(url, MODEL_NAME) as client:
        client.start = time.perf_counter()
        tasks = [asyncio.create_task(run(session)) for session in sessions]
        last_s = max(session[0][1].offset_s for session in sessions)
        try:
            await asyncio.wait(tasks, timeout=last_s + drain_s)
        finally:
            await cancel(tasks)
    return list(results.values())
