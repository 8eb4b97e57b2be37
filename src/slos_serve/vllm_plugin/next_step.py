"""What the next step runs: the plan that goes on, else a new one, carried out by steering or only made."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.perf import PER_TOKEN
from slos_serve.core.planning.ageing import Ageing
from slos_serve.core.planning.steady import foretell
from slos_serve.core.types import Plan, ReplicaState, Tier
from slos_serve.vllm_plugin.carried import Carried
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.steer import Steering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from slos_serve.vllm_plugin.parts import Parts

STOCK_SHARE = 0.5  # of a step's fixed cost
WATCHED_EVERY = 8  # steps, of which one is looked at where nobody asks for anything
STARVED_STEPS = 4  # empty plans in a row, with work present, before vLLM's own order runs once


class NextStep:
    """Decide step after step; `ask` asks the planner.

    `state` is what the newest plan was made from, None where none was made for this step. `carried` is the plan that
    goes on, None where the next step needs a new one. `phase` names what is being done, for the report of a fault.
    """

    def __init__(self, parts: Parts, ask: Callable[[ReplicaState], Plan]) -> None:
        self._parts = parts
        self._ask = ask
        self._ageing = Ageing(parts.limits)
        self.state: ReplicaState | None = None
        self.carried: Carried | None = None
        self.phase = ""
        self._num_empty, self._was_enforcing = 0, False
        self._modes = parts.standing.modes  # of the newest plan

    def is_worth_a_look(self) -> bool:
        """Tell whether this step is looked at: where nobody asks for anything, it is enough now and then."""
        parts = self._parts
        return (
            parts.num_steps % WATCHED_EVERY == 0
            or parts.tracker.is_wanted
            or parts.settings.always_plan
            or parts.recorder.is_open
            or parts.drafts is not None
            or self._modes is not parts.standing.modes
            or not parts.learner.is_settled
        )

    def leave_out(self, request_ids: Iterable[str]) -> None:
        """Take note of requests that have ended: the plan goes on without them where that is possible."""
        if self.carried is not None and not self.carried.leave_out(request_ids, self._parts.tracker.version):
            self.carried = None

    def choose(self) -> Steering | None:
        """Return what carries out the next step; None for vLLM's own order."""
        parts, carried = self._parts, self.carried
        now = parts.clock.now()
        starts_s = parts.pipeline.starts_at(now)
        if carried is not None:
            free = view.free_units(parts.scheduler, parts.per_unit)
            is_good = carried.goes_on(parts.tracker.version, self._modes, starts_s, free)
            if is_good and not self._is_changed():
                return carried.steering
            self.carried = None
        return self._plan_step(now, starts_s)

    def _is_changed(self) -> bool:
        """Tell whether plans are to be made for others, or carried out by others, than the last one was."""
        parts = self._parts
        standing = parts.standing
        is_mode_new = self._modes is not standing.modes or self._was_enforcing is not standing.is_enforcing
        is_lost = len(parts.scheduler.requests) != len(parts.tracker.live)  # somebody came or went unnoticed
        return is_mode_new or is_lost or bool(standing.pauses.kind)

    def _plan_step(self, now: float, starts_s: float) -> Steering | None:
        parts = self._parts
        tracker, standing = parts.tracker, parts.standing
        parts.last_plan = None
        if self._modes is not standing.modes:
            self._modes = standing.modes
            tracker.regroup()
        if tracker.blocked:
            tracker.promote()
        wanted = tracker.is_wanted or (parts.settings.always_plan and (tracker.rowless or len(tracker.table)))
        if parts.learner.model is None or not wanted or parts.safety.is_resting or standing.pauses.kind:
            return None  # nothing is promised to anybody: vLLM's own order serves best
        tracker.sync(starts_s)
        enforcing = standing.is_enforcing
        if enforcing and not self._was_enforcing:
            tracker.reopen()
        self._was_enforcing = enforcing
        if enforcing:
            self._ageing.step(tracker.table, now)
        state = self.state = self._read(starts_s)
        self.phase = "plan"
        plan = parts.last_plan = self._ask(state)
        self.phase = "apply"
        if plan.verdicts:
            parts.promises.apply(plan, starts_s, enforcing=enforcing)
            parts.outbox.flush(now, is_idle=False)  # before the step: its first tokens must not overtake them
        steering = self._steer(plan) if enforcing else None
        parts.safety.add_plan(faulty=False)
        if steering is not None or not enforcing:
            self._carry_on(state, plan, steering)
        return steering

    def _read(self, starts_s: float) -> ReplicaState:
        """Return what the planner is asked about a step that starts at `starts_s`."""
        parts = self._parts
        model, table, drafts = parts.learner.model, parts.tracker.table, parts.drafts
        assert model is not None
        return ReplicaState(
            now_s=starts_s,
            requests=table,
            num_free_kv_blocks=view.free_units(parts.scheduler, parts.per_unit),
            limits=replace(
                parts.limits,
                work_limit=parts.work_limit.value,
                max_num_seqs=self._free_seats(),
                looks_at_new=parts.work_limit.affords_new(len(table)),
            ),
            perf_model=model,
            **({} if drafts is None else drafts.state(table.classes, parts.limits.max_draft_length)),
        )

    def _carry_on(self, state: ReplicaState, plan: Plan, steering: Steering | None) -> None:
        """Foresee how long the plan stays good."""
        parts = self._parts
        tracker = parts.tracker
        if tracker.stock or tracker.blocked or not hasattr(parts.planner, "count_steps"):
            return  # what they need, or how a planner that cannot tell would go on, is seen by planning
        if steering is None and plan.batch.num_tokens.max(initial=1) > 1:
            return  # vLLM's own order may cut the prompts otherwise
        foretold = foretell(state, plan, parts.work_limit.run_steps)
        if foretold is None:
            return
        left, ids = tracker.moves.left, tracker.table.request_ids
        if not foretold.is_alone:  # an end lets others in
            foretold = foretold.until(int(left[left > 0].min(initial=1)))
        ending = np.flatnonzero((left > 0) & (left < len(foretold.starts_s))).tolist()
        lasts = sorted(((int(left[i]), ids[i]) for i in ending), reverse=True)
        self.carried = Carried(foretold, steering, tracker.version, parts.standing.modes, lasts)

    def _steer(self, plan: Plan) -> Steering | None:
        parts, batch = self._parts, plan.batch
        tracker = parts.tracker
        if len(batch.request_ids) or tracker.stock or not len(tracker.table):
            self._num_empty = 0
        else:
            self._num_empty += 1
            if self._num_empty >= STARVED_STEPS:
                self._num_empty = 0
                parts.faults.counts["starved"] += 1
                return None
        steering = Steering(
            parts.scheduler,
            batch,
            waiting=tracker.waiting(batch.request_ids),
            stock=tracker.stock,
            stock_tokens=self._stock_tokens(plan) if tracker.stock else 0,
            next_draft_length=None if parts.drafts is None else parts.drafts.take_plan(batch, tracker.table),
        )
        if steering.num_surplus:
            parts.divergences["adapters"] += steering.num_surplus
            if not steering.expected:
                return None  # held requests keep all adapters that fit: vLLM's own order lets them end
        for request in steering.preempted:
            parts.num_preempted += 1
            tracker.note_preempted(request.request_id)
        return steering

    def _free_seats(self) -> int:
        """Return the seats that are not taken by requests without a row."""
        stock, most = self._parts.tracker.stock, self._parts.limits.max_num_seqs
        taken = sum(view.holds_seat(request) for request in stock.values()) if stock else 0
        return max(1, most - taken)

    def _stock_tokens(self, plan: Plan) -> int:
        """Return the tokens that requests without a row may take: beside promises, half a step's fixed cost."""
        tiers = self._parts.tracker.table.rows["tier"]
        model = self._parts.learner.model
        if model is None or not len(plan.batch.request_ids) or not (tiers == Tier.PROMISED).any():
            return self._parts.limits.max_num_batched_tokens
        return int(STOCK_SHARE * model.seconds(1.0) / max(line[PER_TOKEN] for line in model.lines))
