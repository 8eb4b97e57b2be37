"""The wall clock's time when the engine started, and the seconds since: it neither jumps nor runs backwards."""

from __future__ import annotations

import time
from collections.abc import Callable

NOISE_S = 0.05  # two clocks are not read at the same instant, and are kept at the same pace


class Clock:
    """Tell the time in seconds, whatever is done to the system's clock meanwhile.

    Other processes stamp with the system's clock; `place` puts their stamps on this one. With a `read` of one's own a
    step backwards is made up for: `skew_s` is what has been added.
    """

    def __init__(self, read: Callable[[], float] | None = None) -> None:
        self._ahead_s = _ahead_s()
        self._read = read or (lambda: self._ahead_s + time.monotonic())
        self._last = self._read()
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
        set_by_s = _ahead_s() - self._ahead_s
        moved_s = stamp_s - set_by_s if abs(set_by_s) > NOISE_S else stamp_s
        return min(moved_s + self.skew_s, self._last)

    def peek(self) -> float:
        """Return the time without moving the clock; safe on any thread."""
        return max(self._last, self._read() + self.skew_s)


def _ahead_s() -> float:
    """Return by how much the system's clock is ahead of the one that nobody can set."""
    return time.time() - time.monotonic()
