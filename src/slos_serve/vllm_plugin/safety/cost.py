"""What the plug-in costs: the CPU time of its code on the scheduler's thread, from one hand-over to the next.

CPU time, because on a busy machine the clock on the wall runs while others do. What of it users feel is the part
during which the device had nothing to do: under asynchronous scheduling a batch is in flight while the next is
planned, and only what exceeds it delays anybody.
"""

from __future__ import annotations

from time import thread_time


class Cost:
    """A stopwatch of the calling thread's CPU time, in seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._spent_s = 0.0

    def start(self) -> None:
        """Begin to count; our code has been entered."""
        self._began = thread_time()

    def stop(self) -> None:
        """Stop counting; our code is left."""
        self._spent_s += thread_time() - self._began

    def take(self) -> float:
        """Return what was counted since the last call; our code is still in it."""
        now = thread_time()
        spent, self._spent_s, self._began = self._spent_s + now - self._began, 0.0, now
        return spent
