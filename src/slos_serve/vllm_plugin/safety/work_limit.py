"""How much work the planner may do in the next plan: a share of step time, saved up for bursts.

Planning earns `SHARE` of every step's time and spends what it takes. Most plans cost next to nothing, so
there is usually enough saved for the expensive one, when many requests arrive at once; a planner that is
always expensive is held to its share. Never less than `LEAST` units, never more than `MOST_S` at a time.
"""

from __future__ import annotations

SHARE = 0.03  # of step time; enforcing steps down at 5 %
MOST_S = 0.02
LEAST, MOST = 10_000, 2_000_000  # units of work
MEASURED = 2_000  # plans with less work say nothing about the price of work
_UNIT_S = 50e-9  # until it is measured


class WorkLimit:
    """Follow the price of a unit of work and what has been saved, in seconds."""

    def __init__(self) -> None:
        self._unit_s = _UNIT_S
        self._saved_s = MOST_S

    @property
    def value(self) -> int:
        """The limit for the next plan, in units of work."""
        return round(min(max(self._saved_s / self._unit_s, LEAST), MOST))

    def earn(self, step_s: float) -> None:
        """Count the time of a step."""
        self._saved_s = min(self._saved_s + SHARE * step_s, MOST_S)

    def spend(self, work: int, seconds: float) -> None:
        """Count a plan's work and the seconds it took."""
        self._saved_s = max(self._saved_s - seconds, 0.0)
        if work >= MEASURED:
            self._unit_s += 0.1 * (seconds / work - self._unit_s)
