"""Our planner with one of its ideas taken out: what each is worth.

Each is a planner around `SloPlanner`. Nothing of the planner itself is changed, so that an ablation never
differs from the real thing in more than it says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Plan, Tier, Verdict

if TYPE_CHECKING:
    from slos_serve.core.types import Planner, ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class AtArrival:
    """No deferral: what gets no promise from the first plan that sees it never gets one."""

    makes_promises: ClassVar[bool] = True

    inner: Planner

    def plan(self, state: ReplicaState) -> Plan:
        """Return the inner plan, with a "no" for whoever it left undecided."""
        rows = state.requests.rows
        closed = (rows["tier"] == Tier.BEST_EFFORT) & (rows["missed"] == 0)
        rows["missed"][closed] = 1  # the planner promises nothing to what has missed
        plan = self.inner.plan(state)
        rows["missed"][closed] = 0
        decided = {verdict.request_id for verdict in plan.verdicts}
        ids = [state.requests.request_ids[i] for i in np.flatnonzero(rows["tier"] == Tier.PENDING).tolist()]
        no = tuple(Verdict(request_id=name, promised=False, reason="compute") for name in ids if name not in decided)
        return replace(plan, verdicts=plan.verdicts + no)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoLowerTier:
    """No best-effort tier: what cannot be promised is not told so, and keeps its place in deadline order."""

    makes_promises: ClassVar[bool] = True

    inner: Planner

    def plan(self, state: ReplicaState) -> Plan:
        """Return the inner plan without its refusals."""
        plan = self.inner.plan(state)
        return replace(plan, verdicts=tuple(verdict for verdict in plan.verdicts if verdict.promised))


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBatch:
    """One batch size: no step holds more than `token_budget` tokens, whatever the deadlines allow."""

    makes_promises: ClassVar[bool] = True

    inner: Planner
    token_budget: int = 512

    def plan(self, state: ReplicaState) -> Plan:
        """Return the inner plan for an engine of that budget."""
        budget = min(self.token_budget, state.limits.max_num_batched_tokens)
        return self.inner.plan(replace(state, limits=replace(state.limits, max_num_batched_tokens=budget)))


def at_arrival(**settings: float) -> Planner:
    """Return our planner without deferral."""
    # With one look at each request, a promise is given wherever it holds.
    return AtArrival(inner=SloPlanner(**{"reserve": 1.0, **settings}))  # type: ignore[arg-type]


def no_lower_tier(**settings: float) -> Planner:
    """Return our planner without a best-effort tier."""
    return NoLowerTier(inner=SloPlanner(**settings))  # type: ignore[arg-type]


def fixed_batch(token_budget: int = 512, **settings: float) -> Planner:
    """Return our planner with one batch size."""
    return FixedBatch(inner=SloPlanner(**settings), token_budget=token_budget)  # type: ignore[arg-type]
