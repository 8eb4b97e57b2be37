"""Batches on their way through the engine, and how long each one took."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from slos_serve.vllm_plugin.record import BatchShape

BUSY_GAP_S = 0.01  # from one output to the next schedule(): longer, and the engine had nothing to do


@dataclass(slots=True)
class InFlight:
    """One scheduled batch on its way through the engine. `ends_at_s` is expected, on the wall clock.

    `began`: when its `schedule()` was called, on `perf_counter`. `planned_s`: with margin, `predicted_s`
    without.
    """

    output: SchedulerOutput
    shape: BatchShape
    began: float
    ends_at_s: float
    planned_s: float | None
    predicted_s: float | None
    overhead_s: float


class Pipeline:
    """The batches in flight, oldest first: one, or two under async scheduling."""

    def __init__(self) -> None:
        self._entries: deque[InFlight] = deque()
        self._last_update = 0.0

    def add(self, entry: InFlight) -> None:
        """Take up a batch that was just scheduled."""
        self._entries.append(entry)

    def starts_at(self, now_s: float) -> float:
        """Return when a batch scheduled now starts: under async scheduling, when the one in flight ends."""
        return max(now_s, self._entries[-1].ends_at_s) if self._entries else now_s

    def take(self, output: SchedulerOutput) -> tuple[InFlight, float] | None:
        """Return the batch whose output has come and its seconds; None where it was not noted.

        A busy engine's step lasts from one output to the next, scheduling included.
        """
        now = time.perf_counter()
        done = None
        while self._entries:
            entry = self._entries.popleft()
            if entry.output is output:
                busy = entry.began - self._last_update < BUSY_GAP_S
                done = (entry, now - (self._last_update if busy else entry.began))
                break
        self._last_update = now
        return done
