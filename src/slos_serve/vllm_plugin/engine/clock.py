"""Wall-clock time that never runs backwards."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Read `time.time()`; where it steps back, go on from the last reading.

    `skew_s` is what has been added; times stamped by other processes are moved by it too (`place`).
    """

    def __init__(self, read: Callable[[], float] = time.time) -> None:
        self._read = read
        self._last = read()
        self.skew_s = 0.0
        self._step_back_s = 0.0

    def now(self) -> float:
        """Return the time in seconds, never less than before."""
        now = self._read() + self.skew_s
        if now < self._last:
            back = self._last - now
            self.skew_s += back
            self._step_back_s = max(self._step_back_s, back)
            now = self._last
        self._last = now
        return now

    def take_step_back(self) -> float:
        """Return the largest step backwards since the last call, in seconds; 0 where there was none."""
        back, self._step_back_s = self._step_back_s, 0.0
        return back

    def place(self, stamp_s: float) -> float:
        """Return another process's wall-clock stamp on this clock, at most now."""
        return min(stamp_s + self.skew_s, self._last)

    def peek(self) -> float:
        """Return the time without moving the clock; safe on any thread."""
        return max(self._last, self._read() + self.skew_s)
