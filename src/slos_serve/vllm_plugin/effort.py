"""The planner's work limit, calibrated so that a plan takes about two milliseconds on this machine."""

from __future__ import annotations

PLAN_S = 0.002
START = 40_000
LEAST, MOST = 5_000, 1_000_000
MEASURED = 2_000  # plans with less work say nothing about the price of work
CHANGE = 1.25


class WorkLimit:
    """Follow the price of a unit of work; `value` moves in steps of a quarter, so that states stay alike."""

    def __init__(self) -> None:
        self.value = START
        self._unit_s = PLAN_S / START

    def observe(self, work: int, seconds: float) -> bool:
        """Take one plan's work and time; tell whether the limit moved."""
        if work < MEASURED:
            return False
        self._unit_s += 0.05 * (seconds / work - self._unit_s)
        wanted = min(max(PLAN_S / self._unit_s, LEAST), MOST)
        if self.value / CHANGE < wanted < self.value * CHANGE:
            return False
        before, self.value = self.value, round(wanted)
        return self.value != before
