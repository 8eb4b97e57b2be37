"""Batches on their way through the engine: when the next one starts, and how long each one took.

Theory of operation. The device is a queue of one: a batch starts when it is handed over or when the one before it
ends, whichever is later. Under asynchronous scheduling a batch is scheduled while another is in flight, so its start
is a prediction. Every prediction counts from the last output, which is when the device became free for what is
in flight now; none counts from another prediction whose truth is known. So what is predicted wrong about one batch
is forgotten when its output comes, and the planner's clock cannot drift away from the wall clock.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from slos_serve.records.writer import BatchShape

BUSY_GAP_S = 0.05  # from one output to the next schedule(): longer, and the engine was kept from working


@dataclass(slots=True)
class InFlight:
    """One scheduled batch on its way through the engine.

    `added_s`: when it was handed over, `starts_at_s`: when it was expected to start, on the wall clock. `began`: when
    its time would begin on an idle engine, on `perf_counter`: with the call of `schedule()`, which is part of a step
    under synchronous scheduling, else with the end of that call. `planned_s`: with margin, `predicted_s` without.
    `plan_age`: steps since its plan was made. `cost_s`: the CPU time of our code since the hand-over before; `delay_s`:
    what the device waited of it, beside what others had the CPUs for.
    """

    output: SchedulerOutput
    shape: BatchShape
    began: float
    added_s: float
    starts_at_s: float
    planned_s: float | None
    predicted_s: float | None
    plan_age: int
    cost_s: float
    delay_s: float
    undrafted: frozenset[str] = frozenset()  # who came back without drafts, having been held


class Pipeline:
    """The batches in flight, oldest first: one, or two under async scheduling."""

    def __init__(self) -> None:
        self._entries: deque[InFlight] = deque()
        self._last_update = 0.0
        self._first: InFlight | None = None  # of those that came to an idle engine, the last
        self._is_idle = True
        self._free_at_s = -math.inf  # the last output, on the wall clock
        self.clock_error_s = 0.0  # of the batch taken last: its expected start minus the true one

    def add(self, entry: InFlight) -> None:
        """Take up a batch that was just scheduled."""
        self._entries.append(entry)
        if self._is_idle:
            self._first, self._is_idle = entry, False

    def pass_by(self) -> None:
        """Note that a batch was scheduled that is not taken up."""
        self._first, self._is_idle = None, False

    def rest(self) -> None:
        """Note that the engine has nothing left to do: how long it does nothing is no part of a step."""
        self._is_idle = True

    def starts_at(self, now_s: float) -> float:
        """Return when a batch scheduled now starts: under async scheduling, when the one in flight ends."""
        free_at_s = self._free_at_s
        for entry in self._entries:
            ends_at_s = max(free_at_s, entry.added_s) + (entry.predicted_s or 0.0)
            free_at_s = max(ends_at_s, now_s)  # what should have ended and has not ends any moment
        return max(now_s, free_at_s)

    def waited_s(self, now_s: float) -> float:
        """Return for how long the device has had nothing to do; what is in flight is taken to last as predicted."""
        free_at_s = self._free_at_s
        for entry in self._entries:
            free_at_s = max(free_at_s, entry.added_s) + (math.inf if entry.predicted_s is None else entry.predicted_s)
        return max(0.0, now_s - free_at_s)

    def take(self, output: SchedulerOutput, now_s: float) -> tuple[InFlight, float] | None:
        """Return the batch whose output has come and its seconds; None for one that was not noted.

        A busy engine's step lasts from one output to the next, the first one since it was idle from when it began.
        """
        now, before = time.perf_counter(), self._last_update
        self._last_update = now
        entries = self._entries
        if not entries or not (entries[0].output is output or any(entry.output is output for entry in entries)):
            self._free_at_s = now_s
            return None  # an empty batch, for which the device was not asked, or one that was not taken up
        while (entry := entries.popleft()).output is not output:
            pass
        self.clock_error_s = entry.starts_at_s - max(self._free_at_s, entry.added_s)
        self._free_at_s = now_s
        is_first = entry is self._first or entry.began - before > BUSY_GAP_S
        return entry, now - (entry.began if is_first else before)
