"""What became of one request, in sentences: the same on the live page, at a terminal and from a record.

Theory of operation. A *record* is what a server knows of a request (`GET /v1/slo/requests/ID`; keys that are not known
are absent or None), an *explanation* what planning its moment again has found (`core.explain`). Sentences come in the
order in which things happened, and none says what nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slos_serve.core.words import MEANINGS, Outcome, Reason, Said

Record = Mapping[str, Any]

BINDS = {
    **MEANINGS[Reason],
    "": "nothing is in its way",
    "requested": "it asks for nothing",
    "deadline-passed": "its deadline has passed",
    "memory": "there are not enough KV blocks for it beside what is promised",
    "seats": "every seat (max_num_seqs) is taken by what is promised",
    "search": "the planner's work limit was spent before it was looked at",
    "pace": "its first token fits, its tokens after that do not fit beside what is promised",
    "compute": "the engine cannot compute its prompt in time beside what is promised",
}
NO_TROUBLE = frozenset({Reason.NONE, Reason.REQUESTED, Reason.OBSERVE})
PROMISED = frozenset({Said.PROMISED, Said.PROMOTED})
TROUBLE = frozenset({"broken", "declined"})
LONG_MS = 10_000.0


def state_of(record: Record) -> str:
    """Return how a request stands in one word: broken, declined, its outcome, or running."""
    outcome, verdict = record.get("outcome"), record.get("verdict")
    was_promised = record.get("promised") if outcome else verdict in PROMISED
    if was_promised and outcome in {Outcome.MISSED, Outcome.FAILED}:
        return "broken"
    is_refused = Outcome.REJECTED in {outcome, verdict} or outcome == Outcome.DECLINED
    is_declined = verdict == Said.BEST_EFFORT and record.get("reason") not in NO_TROUBLE
    if is_refused or (is_declined and not outcome):
        return "declined"
    return str(outcome or "running")


def story(record: Record, explanation: Mapping[str, Any] | None = None) -> list[str]:
    """Return what is known of a request as sentences."""
    return [
        *_verdict(record),
        *_tokens(record),
        *_end(record),
        *_way(record),
        *([] if explanation is None else advice(explanation)),
    ]


def _verdict(record: Record) -> Iterator[str]:
    if record.get("verdict") == "":
        yield "Nothing was said about a promise."
        return
    verdict, reason = str(record.get("verdict") or Said.PENDING), str(record.get("reason") or "")
    meaning = MEANINGS[Said].get(verdict)
    yield f"Verdict: {verdict}{f' ({meaning})' if meaning else ''}" + (
        f"; reason {reason}: {BINDS.get(reason, 'not known to this version')}." if reason else "."
    )


def _tokens(record: Record) -> Iterator[str]:
    due: Mapping[str, float] = record.get("promise") or record.get("asked") or {}
    word = "promised" if record.get("promise") else "asked for"
    ttft = due.get("ttft_ms")
    first = [f"{word} within {milliseconds(ttft)}"] if ttft else []
    if (predicted := record.get("predicted_ttft_ms")) is not None:
        first.append(f"predicted after {milliseconds(predicted)}")
    if (came := record.get("ttft_ms")) is not None:
        first.append(f"came after {milliseconds(came)}{_late(came, ttft)}")
    if first:
        yield f"First token: {', '.join(first)}."
    tpot, pace = due.get("tpot_ms"), record.get("tpot_ms")
    later = [f"{word} every {milliseconds(tpot)}"] if tpot else []
    if pace is not None:
        later.append(f"came every {milliseconds(pace)} on average{_late(pace, tpot)}")
    if later:
        yield f"Later tokens: {', '.join(later)}."
    for name, value in due.items():
        if name not in {"ttft_ms", "tpot_ms"}:
            yield f"{name.removesuffix('_ms')}: {word} {milliseconds(value)}."


def _late(came: float, due: float | None) -> str:
    if not due:
        return ""
    return f", {milliseconds(came - due)} late" if came > due else f", {milliseconds(due - came)} to spare"


def _end(record: Record) -> Iterator[str]:
    outcome = record.get("outcome")
    if not outcome:
        yield "It has not ended yet."
        return
    missed = [stage for stage, result in (record.get("stages") or {}).items() if result == "missed"]
    meaning = MEANINGS[Outcome].get(outcome)
    yield f"Outcome: {outcome}{f' ({meaning})' if meaning else ''}." + (
        f" Late in: {', '.join(missed)}." if missed else ""
    )
    if (prompt := record.get("num_prompt_tokens")) is not None:
        yield f"{prompt} prompt tokens, {record.get('num_output_tokens') or 0} output tokens."


def _way(record: Record) -> Iterator[str]:
    hops, replica = record.get("hops"), record.get("replica")
    if replica:
        yield f"Served by replica {replica}" + (f" after {hops} that passed it on." if hops else ", the first asked.")
    steps = record.get("num_steps_over_plan")
    if steps:
        over, before = milliseconds(record["over_plan_s"] * 1e3), record["num_steps_before_first_token"]
        yield f"{steps} of {before} steps before its first token outlasted prediction and margin, by {over} together."


def advice(found: Mapping[str, Any]) -> list[str]:
    """Return what an explanation says about why, and what would have made a promise possible."""
    if found.get("is_promised"):
        return ["Planned again from what was known then, it can be promised."]
    lines = [f"What bound it: {found['binding']}: {BINDS.get(found['binding'], '')}."] if found.get("binding") else []
    if found.get("let_go"):
        lines.append("Its promise was let go: no plan could keep it any more.")
    ways = []
    if found.get("later_s") is not None:
        ways.append(f"a first token due {milliseconds(found['later_s'] * 1e3)} later")
    if found.get("fits_alone"):
        ways.append("one replica more, with room for it")
    if found.get("without"):
        ways.append(f"any one of these not there: {', '.join(found['without'])}")
    if ways:
        lines.append(f"It would have been promised with {'; or with '.join(ways)}.")
    elif found.get("binding") and found["binding"] != "requested" and not found.get("let_go"):
        lines.append("Nothing that was tried would have made it possible: not more time, memory, seats or replicas.")
    if found.get("alone_s") is not None:
        lines.append(f"An idle engine would take {milliseconds(found['alone_s'] * 1e3)} to its first token.")
    return lines


def milliseconds(value: float) -> str:
    """Return a time given in milliseconds for people."""
    if not math.isfinite(value):
        return "for ever"
    if abs(value) >= LONG_MS:
        return f"{value / 1e3:.1f} s"
    return f"{value:.1f} ms" if abs(value) < 10 and value != round(value) else f"{value:.0f} ms"


def points_of(record: Record) -> Sequence[tuple[float, int]]:
    """Return how many tokens were out at what time after the arrival, in ms, as far as it is known."""
    known: dict[int, float] = {int(count): float(at) for at, count in record.get("tokens") or ()}
    ttft, tpot, count = record.get("ttft_ms"), record.get("tpot_ms"), record.get("num_output_tokens") or 0
    if ttft is not None:
        known[1] = ttft
        if tpot is not None and count > 1:
            known[count] = ttft + (count - 1) * tpot
    return sorted((at, count) for count, at in known.items())
