"""The virtual clock: a heap of events and one rule about their order.

Events run in ascending (time, priority, sequence). Time is in seconds and never falls. Among events at
one time the smaller priority runs first, and among those the one that was scheduled first:

    STEP_END  0   results of a step become visible
    ARRIVAL   1   requests reach the replica
    PLAN      2   a replica decides its next step, seeing everything that happened until now

So a request that arrives exactly when a step ends is seen by the next plan, and no run depends on how a
heap breaks ties. Nothing here reads a wall clock; an event may schedule others at its own time or later.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from enum import IntEnum


class Priority(IntEnum):
    """Who goes first among events at the same time."""

    STEP_END = 0
    ARRIVAL = 1
    PLAN = 2


class Kernel:
    """Run events in order; read `now_s` (seconds) and `num_events` (run so far)."""

    def __init__(self, start_s: float = 0.0) -> None:
        self.now_s = start_s
        self.num_events = 0
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._stopped = False

    def __len__(self) -> int:
        return len(self._heap)

    def schedule(self, at_s: float, priority: Priority, action: Callable[[], None]) -> None:
        """Run `action` at `at_s` seconds. `ValueError` for a time in the past or not finite."""
        if not (math.isfinite(at_s) and at_s >= self.now_s):
            raise ValueError(f"at_s = {at_s!r}: expected a finite time not before now, {self.now_s!r}")
        heapq.heappush(self._heap, (at_s, priority, self._sequence, action))
        self._sequence += 1

    def soon(self, priority: Priority, action: Callable[[], None]) -> None:
        """Run `action` now, behind what is due now and goes first: at once where nothing is."""
        if self._stopped or (self._heap and self._heap[0][0] <= self.now_s):
            self.schedule(self.now_s, priority, action)
        else:
            self.num_events += 1
            action()

    def stop(self) -> None:
        """End `run` after the current event."""
        self._stopped = True

    def run(self, until_s: float = math.inf) -> None:
        """Run events until none is left, `stop` is called, or the next one is after `until_s`."""
        self._stopped = False
        while self._heap and not self._stopped and self._heap[0][0] <= until_s:
            self.now_s, _, _, action = heapq.heappop(self._heap)
            self.num_events += 1
            action()
