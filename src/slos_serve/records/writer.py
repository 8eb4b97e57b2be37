"""What `--record FILE` writes, one JSON object a line: steps, requests, and what the planner was asked.

- A *step* (no `kind`): what it computed, how long it took, what was predicted; a performance model is fitted
  from these. About 250 bytes.
- `engine`, once at the start: schema, versions, limits, classes, planner; `model`: the pinned reference, when
  there is one.
- `request`, when one ends: what it asked for, its true lengths, what became of it, and how its
  tokens came. 850 bytes to 1.6 KB.
- `plan`: the planner's whole input (`ReplicaState`) and output (`Plan`), and what vLLM then scheduled; for every plan
  with a verdict and every `PLAN_EVERY`-th without. About 1.5 KB and 0.25 KB for each live request, so these are
  rationed: `PLAN_BYTES_PER_S` on average, `PLAN_BURST_BYTES` at once, `MAX_PLAN_BYTES` in all.

At 50 steps and 10 finished requests a second it grows by at most 86 KB a second, up to `max_bytes` in all: the file
and three older ones beside it (see `slos_serve.lines`), each of which begins with `engine` and `model`.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.lines import LineFile

if TYPE_CHECKING:
    from slos_serve.core.types import Plan, ReplicaState

logger = logging.getLogger("vllm.slos_serve")

SCHEMA = "slos-serve-record/1"
MAX_BUFFERED = 10_000
PLAN_EVERY = 16
PLAN_BYTES, PLAN_BYTES_PER_REQUEST = 1500, 250  # what a plan's line is taken to cost before it is written
PLAN_BYTES_PER_S = 64 << 10
PLAN_BURST_BYTES = 8 << 20
MAX_PLAN_BYTES = 1 << 30
MAX_BYTES = 4 << 30
HEADER = ("engine", "model")  # what makes the lines after it readable


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch computes, in the terms of the performance model (see `core.perf`)."""

    num_tokens: int
    num_requests: int
    context_tokens: int
    draft_steps: int
    attention_pairs: float
    has_prefill: bool
    num_prompt_tokens: int = 0


class StepRecorder:
    """Append records to a file; buffered, bounded, and silent after the first error of the disk.

    Thread-safe where one thread adds and another flushes. Lines of JSON are made when they are flushed.
    """

    def __init__(self, path: Path | None, *, plan_every: int = PLAN_EVERY, max_bytes: int = MAX_BYTES) -> None:
        self._file = None if path is None else LineFile(path, max_bytes=max_bytes)
        self.num_dropped = 0
        self.num_plans_skipped = 0
        self._plan_every = plan_every
        self._buffer: deque[Callable[[], dict[str, Any]]] = deque()
        self._asked: tuple[int, float, ReplicaState, Plan] | None = None
        self._credit: float = PLAN_BURST_BYTES
        self._credited_s: float | None = None
        self._left = MAX_PLAN_BYTES
        self._num_plans = 0

    @property
    def is_open(self) -> bool:
        """Tell whether anything is written at all."""
        return self._file is not None and not self._file.problem

    def _append(self, make: Callable[[], dict[str, Any]]) -> None:
        if not self.is_open:
            return
        if len(self._buffer) >= MAX_BUFFERED:
            self.num_dropped += 1
            return
        self._buffer.append(make)

    def add(  # noqa: PLR0917 - one column each
        self,
        step: int,
        time_s: float,
        shape: BatchShape,
        seconds: float,
        planned_s: float | None,
        predicted_s: float | None,
        plan_age: int = 0,
        *,
        stall: Mapping[str, float] | None = None,
    ) -> None:
        """Keep one step; times in seconds, None where there was no plan or no model.

        `plan_age`: how many steps before, the plan was made that it went on with; such a step has no `plan` of its own.
        `stall`: seconds by cause, of a step that took many times as long as predicted.
        """
        self._append(
            lambda: {
                "step": step,
                "t": round(time_s, 6),
                "num_tokens": shape.num_tokens,
                "num_requests": shape.num_requests,
                "context_tokens": shape.context_tokens,
                "draft_steps": shape.draft_steps,
                "attention_pairs": round(shape.attention_pairs, 1),
                "has_prefill": int(shape.has_prefill),
                "num_prompt_tokens": shape.num_prompt_tokens,
                "seconds": round(seconds, 7),
                "planned_s": None if planned_s is None else round(planned_s, 7),
                "predicted_s": None if predicted_s is None else round(predicted_s, 7),
                **({"plan_age": plan_age} if plan_age else {}),
                **({} if stall is None else {"stall": {name: round(seconds, 6) for name, seconds in stall.items()}}),
            }
        )

    def add_fact(self, kind: str, time_s: float, facts: Mapping[str, Any]) -> None:
        """Keep an `engine`, `model` or `request` line; `facts` is not copied and must not change any more."""
        self._append(lambda: {"kind": kind, "schema": SCHEMA, "t": round(time_s, 6), **facts})

    def ask(self, step: int, state: ReplicaState, plan: Plan) -> None:
        """Take up a plan that was just made, before anything of it is carried out, if it is to be kept."""
        self._asked = None
        if not self.is_open:
            return
        self._num_plans += 1
        if not plan.verdicts and self._num_plans % self._plan_every:
            return
        now = state.now_s
        if self._credited_s is not None:
            earned = PLAN_BYTES_PER_S * max(0.0, now - self._credited_s)
            self._credit = min(self._credit + earned, PLAN_BURST_BYTES)
        self._credited_s = now
        cost = PLAN_BYTES + PLAN_BYTES_PER_REQUEST * len(state.requests)
        if cost > self._credit or cost > self._left:
            self.num_plans_skipped += 1
            return
        self._credit -= cost
        self._left -= cost
        self._asked = (step, now, replace(state, requests=state.requests.copy()), plan)

    def answer(self, scheduled: Mapping[str, int], *, is_steered: bool) -> None:
        """Keep the plan that was taken up with what the engine scheduled in its step, drafts included."""
        if self._asked is None:
            return
        (step, now, state, plan), self._asked = self._asked, None
        found = dict(scheduled)
        self._append(
            lambda: {
                "kind": "plan",
                "step": step,
                "t": round(now, 6),
                "steered": is_steered,
                "scheduled": found,
                "plan": plan.to_json(),
                "state": state.to_json(),
            }
        )

    def flush(self) -> None:
        """Write what is buffered."""
        file = self._file
        if not self._buffer or file is None or file.problem:
            return
        made = (self._line(self._buffer.popleft()) for _ in range(len(self._buffer)))
        if not file.write([line for line in made if line]):
            logger.warning("slos-serve: step records stop, %s cannot be written: %s", file.path, file.problem)

    def _line(self, make: Callable[[], dict[str, Any]]) -> str:
        """Return one line; "" where it cannot be said in JSON, which is counted."""
        try:
            document = make()
            line = json.dumps(document)
        except (TypeError, ValueError):
            self.num_dropped += 1
            return ""
        if self._file is not None and document.get("kind") in HEADER:
            self._file.header = [*self._file.header, line] if document["kind"] != "engine" else [line]
        return line
