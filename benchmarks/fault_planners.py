"""Planners with faults, for `faults.py`: ours, but for some of its plans."""

from __future__ import annotations

import time

from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Plan, ReplicaState

EVERY, HANG_S = 20, 2.5


class Raises(SloPlanner):
    """Every twentieth plan is an exception."""

    num_plans = 0

    def plan(self, state: ReplicaState) -> Plan:
        """Plan as ours does, mostly."""
        self.num_plans += 1
        if self.num_plans % EVERY == 0:
            raise ZeroDivisionError("a fault of the planner, made on purpose")
        return super().plan(state)


class Hangs(SloPlanner):
    """One plan in a hundred does not end for seconds."""

    num_plans = 0

    def plan(self, state: ReplicaState) -> Plan:
        """Plan as ours does, mostly."""
        self.num_plans += 1
        if self.num_plans % (5 * EVERY) == 0:
            until = time.monotonic() + HANG_S
            while time.monotonic() < until:
                pass
        return super().plan(state)
