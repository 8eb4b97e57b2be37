"""How much the planner may do: work in one plan, and for how many steps a plan may go on.

Planning earns `SHARE` of every step's time and spends what it takes. Most plans cost next to nothing, so
there is usually enough saved for the expensive one, when many requests arrive at once; a planner that is
always expensive is held to its share. Never less than `LEAST` units, never more than `MOST_S` at a time.

A search for new promises among all who wait is begun when what it is expected to cost has been saved: in a flood of
requests that is not every step, and those who come meanwhile wait undecided, for `PATIENCE` plans at most.

Where the device waits for us for a large part of what is allowed, plans get cheaper in steps, before steering is given
up: they go on for longer, and the search is smaller. With the cause the steps go away again.
"""

from __future__ import annotations

SHARE = 0.03  # of step time; enforcing steps down at 5 %
MOST_S = 0.02
LEAST, MOST = 10_000, 2_000_000  # units of work
MEASURED = 5_000  # a plan with less work tells what planning costs beside it, one with more the price of work
NEW_WORK = 40  # units that a search for new promises takes for each request there, about
_UNIT_S = 50e-9  # until it is measured

PATIENCE = 16  # plans in a row that search for no new promise

RUN_STEPS = 32  # a plan may go on for so many steps
MAX_THRIFT = 2  # each of which makes plans go on four times as long and search a quarter
ADAPT_EVERY = 64  # steps
DEAR, CHEAP = 0.6, 0.2  # of the tolerated share of device time: above, thrift grows; below, it goes away


class WorkLimit:
    """Follow the price of a unit of work and what has been saved, in seconds; `thrift` says how cheap plans must be."""

    def __init__(self) -> None:
        self.thrift = 0
        self._unit_s = _UNIT_S
        self._beside_s = 0.0  # of a plan, whatever its work
        self._saved_s = MOST_S
        self._num_passed_over = 0  # plans in a row that were not to search for new promises
        self._num_steps = 0

    @property
    def value(self) -> int:
        """The limit for the next plan, in units of work."""
        limit = round(min(max(self._saved_s / self._unit_s, LEAST), MOST))
        return max(limit >> 2 * self.thrift, 1)

    @property
    def run_steps(self) -> int:
        """For how many steps a plan may go on unasked."""
        return RUN_STEPS << 2 * self.thrift

    def earn(self, step_s: float) -> None:
        """Count the time of a step."""
        self._saved_s = min(self._saved_s + SHARE * step_s, MOST_S)

    def spend(self, work: int, seconds: float) -> None:
        """Count a plan's work and the seconds it took; what planning costs beside the work is not saved for."""
        searching_s = max(seconds - self._beside_s, 0.0)
        self._saved_s = max(self._saved_s - searching_s, 0.0)
        if work >= MEASURED:
            self._unit_s += 0.1 * (searching_s / work - self._unit_s)
        else:
            self._beside_s += 0.1 * (min(seconds, MOST_S) - self._beside_s)

    def affords_new(self, num_requests: int) -> bool:
        """Tell, once a plan, whether it may search for new promises among so many requests: it is paid for, or due."""
        is_paid = self._saved_s >= self._unit_s * NEW_WORK * num_requests
        self._num_passed_over = 0 if is_paid or self._num_passed_over >= PATIENCE else self._num_passed_over + 1
        return self._num_passed_over == 0

    def adapt(self, share: float, tolerated: float) -> None:
        """Take the share of device time lost because of us, once a step, and the share at which steering ends."""
        self._num_steps += 1
        if self._num_steps % ADAPT_EVERY:
            return
        if share > DEAR * tolerated:
            self.thrift = min(self.thrift + 1, MAX_THRIFT)
        elif share < CHEAP * tolerated:
            self.thrift = max(self.thrift - 1, 0)
