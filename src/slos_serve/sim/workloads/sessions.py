"""Sessions of an agent that calls tools: each round waits for the one before it and for the tool.

Rounds come from recorded sessions (prompt, output and cached tokens of each call). A session is drawn
with replacement and its first prompt redrawn from the log-normal of a larger set of first prompts; later
prompts shift with it, so that growth and cached prefix stay as recorded. Tool times are gaps between an
agent's calls in another recording, less the time its output would take at 200 tokens per second.
"""

from __future__ import annotations

import csv
import gzip
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slos_serve.sim.workloads.workload import RequestFactory, Workload
from slos_serve.traces.trace import first_of

if TYPE_CHECKING:
    from slos_serve.sim.replica.requests import SimRequest
    from slos_serve.traces.trace import Trace

FIRST_PROMPT_LOG_MEAN, FIRST_PROMPT_LOG_SIGMA = 7.221, 0.374
RECORDED_TOKENS_PER_S = 200.0
TOOL_TIME_LIMITS_S = (0.05, 60.0)

Call = tuple[int, int, int]  # prompt, output and cached tokens


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a gzipped CSV file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_sessions(path: Path) -> list[list[Call]]:
    """Return the calls of each recorded session, in order."""
    sessions: dict[str, list[Call]] = {}
    for row in read_rows(path):
        call = int(row["prompt_tokens"]), int(row["output_tokens"]), int(row["cached_tokens"])
        sessions.setdefault(row["session_id"], []).append(call)
    return list(sessions.values())


def read_tool_times_s(path: Path) -> npt.NDArray[np.float64]:
    """Return tool times in seconds, one for each gap between two calls of an agent."""
    times = []
    for before, after in pairwise(read_rows(path)):
        if before["session_id"] == after["session_id"]:
            gap_s = float(after["offset_in_session_s"]) - float(before["offset_in_session_s"])
            times.append(gap_s - int(before["output_tokens"]) / RECORDED_TOKENS_PER_S)
    return np.clip(np.array(times), *TOOL_TIME_LIMITS_S)


def tool_sessions(
    sessions_path: Path,
    tool_times_path: Path,
    starts: Trace,
    factory: RequestFactory,
    *,
    max_model_len: int,
    rate_rps: float | None,
    max_requests: int | None,
    rng: np.random.Generator,
) -> Workload:
    """Start one drawn session at each arrival of `starts`; `rate_rps` and `max_requests` count every round.

    A session ends before the first round that does not fit the context; such rounds are dropped.
    """
    recorded = read_sessions(sessions_path)
    rounds_each = sum(map(len, recorded)) / len(recorded)
    starts = first_of(starts, None if max_requests is None else max(1, round(max_requests / rounds_each)))
    tool_times_s = read_tool_times_s(tool_times_path)
    drawn = [_redraw(recorded[int(rng.integers(len(recorded)))], rng) for _ in range(len(starts))]
    kept = [_that_fit(calls, max_model_len) for calls in drawn]
    num_rounds = sum(len(calls) for calls in kept)
    stretch = 1.0 if rate_rps is None else num_rounds / rate_rps / starts.span_s
    arrivals: list[SimRequest] = []
    following: dict[str, tuple[float, SimRequest]] = {}
    for number, (at_s, calls) in enumerate(zip((starts.arrived_at_s * stretch).tolist(), kept, strict=True)):
        rounds = [
            factory.build(
                f"s{number}-{turn}",
                at_s,
                prompt,
                output,
                "tool",
                cached_tokens=cached,
                session_id=f"s{number}",
                stage="final" if turn == len(calls) - 1 else "loop",
            )
            for turn, (prompt, output, cached) in enumerate(calls)
        ]
        arrivals += rounds[:1]
        for before, after in pairwise(rounds):
            following[before.request.request_id] = float(rng.choice(tool_times_s)), after
    return Workload(
        name="tool-calling",
        arrivals=arrivals,
        duration_s=starts.span_s * stretch,
        following=following,
        num_dropped=sum(len(calls) for calls in drawn) - num_rounds,
        hints=factory.hints,
        history=[("tool", prompt, output) for calls in recorded for prompt, output, _ in calls],
    )


def _redraw(calls: list[Call], rng: np.random.Generator) -> list[Call]:
    first = int(np.exp(rng.normal(FIRST_PROMPT_LOG_MEAN, FIRST_PROMPT_LOG_SIGMA)))
    shift = max(first, 16) - calls[0][0]
    return [
        (prompt + shift, output, max(0, cached + shift) if turn else 0)
        for turn, (prompt, output, cached) in enumerate(calls)
    ]


def _that_fit(calls: list[Call], max_model_len: int) -> list[Call]:
    for turn, (prompt, output, _) in enumerate(calls):
        if prompt + output > max_model_len:
            return calls[:turn]
    return calls
