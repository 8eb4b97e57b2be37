"""The SLO planner: which requests are promised, and what the next batch computes.

Theory of operation. A step has four questions, answered in this order.

1. *Can what was promised be kept?* Simulate the promised requests with the mean model. If a deadline
   cannot be met, recovery lets the cheapest promises go until the rest can (`Plan.at_risk`); they keep
   being served, after the others.
2. *Who else can be served?* A request stays a candidate while its slack lasts. The dynamic programme
   of `admission` (or all candidates at once, where a simulation shows that they fit) proposes a set; the
   set is simulated with the model's margin, repaired and extended. A candidate that even an idle engine
   could not serve in time is told so. A promise is final. One that would not hold with prefill `reserve`
   times slower is postponed until the batch that finishes the prompt, because cheaper requests may come in a
   burst before. Until then the set is chosen anew each time.
3. *What runs next?* `step` composes a batch for that set: eagerly, if the deadlines also hold with every
   decode in every batch, otherwise decodes join only when they must. Where they hold with brief batches
   too, batches are brief, because a newcomer with a short prompt cannot wait for the end of a long one.
4. *What is left over* goes to undecided candidates, then to best-effort work, oldest first. Best-effort
   requests lose their KV blocks, newest first, when promised work needs them.

The planner keeps nothing between calls: the same state gives the same plan.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from slos_serve.core.perf import each_batch_seconds
from slos_serve.core.planning import admission, steady
from slos_serve.core.planning.columns import BATCH_FIXED_MULTIPLE, Columns
from slos_serve.core.planning.demand import (
    DEADLINE,
    DUE,
    EPS_S,
    GAIN,
    LEFT,
    MISSED,
    OUTPUT_LEFT,
    REQUIRED,
    STEPS,
    STUCK,
    VALUE,
    VERIFY,
    Demand,
    headroom,
    needed_each,
)
from slos_serve.core.planning.dry_run import DryRun, simulate
from slos_serve.core.planning.glance import glance
from slos_serve.core.planning.step import NOBODY, Stepping
from slos_serve.core.types import Plan, Verdict

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.types import BatchPlan, IntArray, ReplicaState

# Promises are let go only where they are out of reach by more than the model's usual error, and soon:
# lengths are high quantiles, and what would be late after so many tokens may have ended by then.
RECOVERY_MARGIN = 0.97
RECOVERY_TOKENS = 64
# More candidates than this are looked at in order of urgency.
MAX_CANDIDATES = 256


class SloPlanner:
    """Plan for the SLOs of every request; see the module's text.

    `batch_fixed_multiple`: a batch lasts at most this many times the fixed cost of a step, so that a
    newcomer never waits long behind it; `brief_fixed_multiple`: the same for batches with prompts where
    deadlines hold with it (a TTFT of five times the unloaded prefill leaves the shortest prompt four).
    `reserve`: a promise is given early where it would hold with prompts that take so many times as long
    (1: wherever it holds). `admission_name`: `dp` (the dynamic programme) or `greedy` (by value density,
    for comparison). `beam_width`: most labels of the programme.
    """

    makes_promises: ClassVar[bool] = True

    def __init__(
        self,
        *,
        batch_fixed_multiple: float = BATCH_FIXED_MULTIPLE,
        brief_fixed_multiple: float = 4.0,
        reserve: float = 2.0,
        admission_name: str = "dp",
        beam_width: int = 200,
    ) -> None:
        if admission_name not in ("dp", "greedy"):
            raise ValueError(f"admission_name = {admission_name!r}: expected 'dp' or 'greedy'")
        if not reserve >= 1:
            raise ValueError(f"reserve = {reserve!r}: expected at least 1")
        if not brief_fixed_multiple > 0 or not batch_fixed_multiple > 0 or beam_width < 1:
            raise ValueError("brief_fixed_multiple, batch_fixed_multiple and beam_width: expected positive values")
        self.batch_fixed_multiple = batch_fixed_multiple
        self.brief_fixed_multiple = min(brief_fixed_multiple, batch_fixed_multiple)
        self.reserve = reserve
        self.admission_name = admission_name
        self.beam_width = beam_width

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch and what has become known about promises."""
        plan = glance(
            state,
            batch_fixed_multiple=self.batch_fixed_multiple,
            brief_share=self.brief_fixed_multiple / self.batch_fixed_multiple,
            reserve=self.reserve,
            most=MAX_CANDIDATES if state.limits.looks_at_new else 0,
        )
        return plan or _Planning(self, state).run()

    def count_steps(self, state: ReplicaState, plan: Plan, ends_s: FloatArray) -> int:
        """Return how many of the steps that end at `ends_s` run this `plan` again, if nobody comes or leaves.

        It must be the plan of this state, one token for each request.
        """
        columns = Columns(state, self.batch_fixed_multiple)
        order = state.requests.find(plan.batch.request_ids)
        return steady.count_steps(columns, order, ends_s, state.limits.work_limit // 2)


class _Planning(Stepping):
    """One call of `SloPlanner.plan`: the steps it takes."""

    def __init__(self, options: SloPlanner, state: ReplicaState) -> None:
        super().__init__(state, options.batch_fixed_multiple)
        self.options = options

    def run(self) -> Plan:
        """Answer the four questions and assemble the plan."""
        verdicts: list[Verdict] = []
        crowded_out = at_risk = self.crowded_out()
        order = self.by_deadline(np.setdiff1d(self.promised, crowded_out) if crowded_out.size else self.promised)
        candidates = self.servable(verdicts) if self.state.limits.looks_at_new else NOBODY
        if candidates.size and not at_risk.size:
            order = self.by_deadline(np.concatenate([order, candidates]))
        demand = self.demand(order, np.where(self.is_promised, self.granted, 0.0))
        # Nearly always everything fits, and one look answers the first two questions.
        dry_run = self.look(demand, parts=4 if candidates.size else 2)
        run_ahead = dry_run.kept
        if not run_ahead:
            kept = self.recover(demand)
            if kept is not None:
                order, demand = order[kept], demand[:, kept]
                at_risk = np.setdiff1d(self.promised, order)
            demand, chosen, dry_run, run_ahead = self.admit_priced(demand, changed=kept is not None)
            order, demand = order[chosen], demand[:, chosen]
        batch = self.batch(order, demand, at_risk, crowded_out, run_ahead=run_ahead, outcome=dry_run.outcome)
        self.promise(order, demand, dry_run, batch, verdicts)
        return Plan(
            batch=batch,
            verdicts=tuple(verdicts),
            at_risk=tuple(self.ids[i] for i in self.by_deadline(at_risk).tolist()),
            work=self.work_budget.spent,
            headroom_tokens_per_s=headroom(self.machine, demand, self.now),
        )

    def look(self, demand: Demand, *, parts: int) -> DryRun:
        """Return the dry run of everyone with decodes running ahead; prompts go in brief batches where that holds."""
        machine, options = self.machine, self.options
        share = options.brief_fixed_multiple / options.batch_fixed_multiple
        with self.work_budget.part(parts) as work_budget:
            if share < 1.0 and demand[LEFT].any():
                brief = machine._replace(max_batch_s=machine.max_batch_s * share)
                dry_run = simulate(brief, demand, self.now, work_budget, run_ahead=True)
                if dry_run.kept:
                    self.machine = brief
                    return dry_run
            return simulate(machine, demand, self.now, work_budget, run_ahead=True)

    def recover(self, demand: Demand) -> IntArray | None:
        """Return the positions of the promises to keep where not all can be; None where all can."""
        mean = self.machine._replace(margin_prefill=RECOVERY_MARGIN, margin_decode=RECOVERY_MARGIN)
        promised = np.flatnonzero(demand[REQUIRED])
        near = demand[:, promised]
        np.minimum(near[OUTPUT_LEFT], RECOVERY_TOKENS, out=near[OUTPUT_LEFT])
        # A token late by less than one batch of all may be made up for before it counts.
        np.maximum(near[DUE], self.decode_seconds(self.is_promised & (self.left == 0)), out=near[DUE])
        with self.work_budget.part(2) as work_budget:
            if simulate(mean, near, self.now, work_budget, run_ahead=False).outcome not in (MISSED, STUCK):
                return None
            if simulate(mean, near, self.now, work_budget, run_ahead=True).kept:
                return None
            near[REQUIRED] = 0
            kept, _ = admission.select(mean, near, self.now, work_budget, name="greedy", width=1)
        return promised[kept]

    def servable(self, verdicts: list[Verdict]) -> IntArray:
        """Return the candidates that an idle engine could still serve in time; say so of the others."""
        started = np.flatnonzero(self.pending & ((self.produced > 0) | (self.rows["missed"] == 1)))
        for i in started.tolist():
            # A first token without a promise: it can no longer be promised.
            reason = "deadline-passed" if self.rows["missed"][i] else "compute"
            verdicts.append(Verdict(request_id=self.ids[i], promised=False, reason=reason))
        index = self.candidates
        if not index.size:
            return index
        left = self.left[index]
        pairs = left * (self.context[index] + 0.5 * left)
        alone = each_batch_seconds(self.machine.lines, left, pairs=pairs)
        too_big = self.start[index] > self.state.limits.num_kv_blocks
        past = self.deadline[index] <= self.now
        too_fast = needed_each(self.demand(index, self.held), self.now) < self.token_seconds(index) - EPS_S
        hopeless = too_big | past | too_fast | (self.now + alone > self.deadline[index] + EPS_S)
        for k in np.flatnonzero(hopeless & self.pending[index]).tolist():
            reason = "memory" if too_big[k] else "deadline-passed" if past[k] else "compute"
            verdicts.append(Verdict(request_id=self.ids[int(index[k])], promised=False, reason=reason))
        return self.by_deadline(index[~hopeless])[:MAX_CANDIDATES]

    def admit(self, demand: Demand, *, changed: bool) -> tuple[IntArray, DryRun, bool]:
        """Return the positions to promise or keep, their dry run, and whether decodes may run ahead.

        `changed`: promises were let go since everyone was tried with decodes running ahead.
        """
        required = demand[REQUIRED] > 0
        if required.all():
            chosen = np.arange(len(required))
            dry_run = simulate(self.machine, demand, self.now, self.work_budget, run_ahead=False)
        else:
            chosen, dry_run = admission.select(
                self.machine, demand, self.now, self.work_budget,
                name=self.options.admission_name, width=self.options.beam_width,
            )  # fmt: skip
        if dry_run.kept or (required.all() and not changed):
            return chosen, dry_run, False
        # The promises made so far may hold only with decodes running ahead.
        chosen = np.flatnonzero(required)
        dry_run = simulate(self.machine, demand[:, chosen], self.now, self.work_budget, run_ahead=True)
        return chosen, dry_run, dry_run.kept

    def admit_priced(self, demand: Demand, *, changed: bool) -> tuple[Demand, IntArray, DryRun, bool]:
        """Return `admit`'s answer with drafts, or without where that serves more, and the demand it is about."""
        chosen, dry_run, run_ahead = self.admit(demand, changed=changed)
        if len(chosen) == demand.shape[1] or not demand[STEPS].any():
            return demand, chosen, dry_run, run_ahead
        plain = demand.copy()
        plain[VERIFY], plain[GAIN], plain[STEPS] = 1.0, 1.0, 0.0
        others, other_trial, other_eager = self.admit(plain, changed=changed)
        if not other_trial.kept or plain[VALUE, others].sum() <= demand[VALUE, chosen].sum():
            return demand, chosen, dry_run, run_ahead
        self.verify[:], self.gain[:] = 1.0, 1.0
        return plain, others, other_trial, other_eager

    def promise(
        self, order: IntArray, demand: Demand, dry_run: DryRun, batch: BatchPlan, verdicts: list[Verdict]
    ) -> None:
        """Promise the candidates in `order` whose place nobody should take; say when their prefills will end."""
        new = np.flatnonzero(demand[REQUIRED] == 0)
        if not new.size:
            return
        chunk = dict(zip(batch.request_ids, batch.num_tokens.tolist(), strict=True))
        given = np.array([chunk.get(self.ids[int(order[k])], 0) for k in new.tolist()]) >= demand[LEFT, new]
        if self.options.reserve == 1.0:
            given[:] = True
        elif not given.all():
            slow = self.machine._replace(margin_prefill=self.machine.margin_prefill * self.options.reserve)
            finished_at = simulate(slow, demand, self.now, self.work_budget, run_ahead=False).finished_at
            given |= finished_at[new] <= demand[DEADLINE, new]
        for k in new[given].tolist():
            row = int(order[k])
            done, deadline = float(dry_run.finished_at[k]), float(demand[DEADLINE, k])
            verdicts.append(
                Verdict(
                    request_id=self.ids[row],
                    promised=True,
                    slack_s=deadline - done if math.isfinite(deadline) else 0.0,
                    predicted_ttft_s=done + self.state.now_s - float(self.rows["arrival_s"][row]),
                )
            )
