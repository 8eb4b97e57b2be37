"""One replica on the virtual clock: it executes plans as the vLLM plug-in would, and no others.

Each step: the planner sees the table of live requests and answers with a batch; the engine cuts it to
what it can run (`engine`); the clock moves by the hardware model's time for that batch, times noise;
tokens come out at the end (`outputs`) and what they tell is learnt.

The planner knows a performance model of its own, corrected by the steps it has seen, predicted lengths
and measured acceptance. True lengths and true times stay in here.

A replica may be one of many: `hooks` tell whoever routes to it what it plans, and its requests can be
withdrawn, handed over after their first token, or lost in a crash.

Steps that run one batch again and again need not be taken one by one: see `fast_forward`, whose replica overrides
`begin`, `cut_short` and `settle`.

With `async_lag` the plan for a step is made when the one before it starts, as under vLLM's asynchronous
scheduling, for the state that it is expected to leave: arrivals and accepted drafts are seen one step late, and a
request that ends meanwhile, before it has all the tokens that it may have, is dropped from the batch but its tokens
have been computed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.fit import OnlineCorrection, StepSample
from slos_serve.core.perf import PER_DRAFT, batch_seconds
from slos_serve.core.planning.ageing import Ageing
from slos_serve.core.types import PlannerTraits, ReplicaState, Tier
from slos_serve.errors import ConfigError
from slos_serve.sim.replica import loops
from slos_serve.sim.replica.engine import Engine
from slos_serve.sim.replica.invariants import InvariantError, check_table
from slos_serve.sim.replica.kernel import Kernel, Priority
from slos_serve.sim.replica.outputs import OutputOptions, Outputs
from slos_serve.sim.replica.requests import Record, SimRequest

if TYPE_CHECKING:
    from slos_serve.core.lengths import LengthModel
    from slos_serve.core.perf import PerfModel
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.core.types import Limits, Plan, Planner
    from slos_serve.sim.replica.engine import Step

POLL_S = 1e-3  # how soon the engine asks again after an empty plan
STARVED_S = 60.0  # empty plans for longer than this are a planner's fault
CHECK_EVERY_STEPS = 64
ASYNC_LAG = "plan one step ahead, as asynchronous scheduling does (default: where the hardware's engine does: on GPUs)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions(OutputOptions):
    """How the simulated engine differs from an ideal one, beside what `OutputOptions` says.

    `async_lag`: steps are planned one ahead; None: where the hardware's engine does so. `noise_sigma`: lognormal spread
    of step times, mean 1. `pace`: how long a step takes that starts at a time, from its seconds on the hardware
    (replays). `drafter_step_s`: seconds each drafter step adds to what the hardware model says. `learns_times`: the
    planner's model is corrected online. `drops_declined`: what gets a "no" is turned away, not served.
    """

    async_lag: bool | None = None
    noise_sigma: float = 0.0
    pace: Callable[[float, float], float] | None = None
    drafter_step_s: float = 0.0
    learns_times: bool = True
    drops_declined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Whom a replica tells. `end` gets every request with its grade, `step` every step record.

    `plan` gets plans with their state, verdicts applied, before they run, and returns the time (s) of the next report
    it needs while a plan repeats; inf for none. With `first_token` a request leaves the replica when its first token is
    out. `plan_clock` times the planner and nothing else, in the caller's seconds.
    """

    end: Callable[[SimRequest, GradedRequest], None]
    step: Callable[[dict[str, Any]], None] | None = None
    plan: Callable[[Replica, ReplicaState, Plan], float] | None = None
    first_token: Callable[[Record], None] | None = None
    plan_clock: Callable[[], float] | None = None


class Replica:
    """Serve submitted requests; read the counters when the kernel has run."""

    def __init__(
        self,
        kernel: Kernel,
        planner: Planner,
        *,
        limits: Limits,
        true_model: PerfModel,
        lengths: LengthModel,
        rng: np.random.Generator,
        hooks: Hooks,
        options: ReplicaOptions | None = None,
        plan_model: PerfModel | None = None,
        name: str = "r0",
    ) -> None:
        self.name = name
        self.hooks = hooks
        self.is_dead = False
        self.is_mid_step = False  # a batch refers to rows of the table: none may be removed
        self.kernel = kernel
        self.planner = planner.for_replica() if isinstance(planner, VllmPlanner) else planner
        self.traits = PlannerTraits.of(planner)
        self.limits = limits
        self.options = options or ReplicaOptions()
        self.engine = Engine(limits)
        self.table = self.engine.table
        self.lengths = lengths
        self.ageing = Ageing(limits)
        self.plan_s = array("d")
        self.num_steps = 0
        self.tokens_computed = 0
        self._noise_rng, draft_rng = rng.spawn(2)
        self.outputs = Outputs(self.table, lengths, draft_rng, self.options)
        self.lines = true_model.as_array()
        self.lines[:, PER_DRAFT] += self.options.drafter_step_s
        # somebody looks at single steps, or how long one takes does not follow from its batch alone
        self.is_step_by_step = bool(
            self.options.async_lag
            or self.options.noise_sigma
            or self.options.pace
            or self.hooks.step
            or self.hooks.first_token
        )
        # Nobody sees the corrected model of a planner that does not read it, unless plans are told further.
        is_unread = not self.is_step_by_step and self.traits.ignores_times
        self._base_model = plan_model or true_model
        self.correction = OnlineCorrection(self._base_model) if self.options.learns_times and not is_unread else None
        self.notify_at_s = math.inf  # when the router wants the next report of a plan that goes on
        self._next_check = 0
        self._busy = False
        self._next_plan: Plan | None = None
        self._turned_away: list[str] = []  # who leaves when the step under way has ended
        self._starved_since_s: float | None = None
        self._record: dict[str, Any] = {}  # of the step under way

    @property
    def plan_model(self) -> PerfModel:
        """The performance model the planner is given now."""
        return self._base_model if self.correction is None else self.correction.model

    def submit(self, sim: SimRequest, record: Record | None = None) -> None:
        """Take a request that arrives now; with a `record`, one whose prompt was computed elsewhere."""
        self.cut_short()
        request = sim.request
        if request.num_prompt_tokens + sim.num_output_tokens > self.limits.max_model_len:
            self.hooks.end(sim, Record(sim).fail())
            return
        if record is None and isinstance(self.planner, VllmPlanner) and self.planner.turns_away(self.table.rows):
            self.hooks.end(sim, Record(sim).fail(rejected=True))
            return
        index = self.engine.add(
            request,
            cached_tokens=sim.num_cached_tokens,
            session_id=sim.session_id,
        )
        self.outputs.add(sim, index, record)
        if record is not None:
            first_s = record.grader.first_token_s
            self.engine.continue_decode(index, first_token_s=first_s, num_thinking_tokens=sim.num_thinking_tokens)
        if not self._busy:
            self._busy = True
            self.kernel.schedule(self.kernel.now_s, Priority.PLAN, self._plan_and_run)

    def withdraw(self, request_id: str) -> Record:
        """Take a request back, whatever it holds."""
        self.settle()
        index = self.table.index(request_id)
        self.engine.withdraw(index, session_id=self.outputs.records[index].sim.session_id)
        return self.outputs.remove(index)

    def abandon(self) -> list[Record]:
        """Let go of every live request and return them in order of arrival here."""
        self.settle()
        order = np.argsort(self.table.rows["seq"], kind="stable").tolist()
        return [self.withdraw(request_id) for request_id in [self.table.request_ids[i] for i in order]]

    def crash(self) -> list[Record]:
        """Stop for good, in the middle of a step; return the requests that were there."""
        self.is_dead = True
        return self.abandon()

    def change_speed(self, factor: float) -> None:
        """Make every further step take `factor` times as long as now."""
        self.settle()
        self.lines = self.lines * factor

    def state(self, now_s: float) -> ReplicaState:
        """Return what the planner sees."""
        return ReplicaState(
            now_s=now_s,
            requests=self.table,
            num_free_kv_blocks=self.engine.pool.num_free,
            limits=self.limits,
            perf_model=self.plan_model,
            acceptance=self.outputs.measured_acceptance(),
        )

    def _plan(self, now_s: float) -> Plan:
        """Ask the planner and apply its verdicts."""
        if self.traits.makes_promises:
            self.ageing.step(self.table, now_s)
        state = self.state(now_s)
        clock = self.hooks.plan_clock
        if clock is None:
            plan = self.planner.plan(state)
        else:
            start = clock()
            plan = self.planner.plan(state)
            self.plan_s.append(clock() - start)
        if plan.verdicts and not self.traits.makes_promises:
            key = f"{type(self.planner).__name__}.makes_promises"
            raise ConfigError(where="planner", key=key, value=False, expected="True: its plans hold verdicts")
        for verdict in plan.verdicts:
            index = self.table.index(verdict.request_id)
            self.table.rows["tier"][index] = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
            record = self.outputs.records[index]
            if verdict.promised and record.promised_s == math.inf:
                record.promised_s = self.kernel.now_s
        if self.options.drops_declined:
            plan = self._drop(plan)
        if self.hooks.plan is not None:
            self.notify_at_s = self.hooks.plan(self, state, plan)
        return plan

    def _drop(self, plan: Plan) -> Plan:
        """Turn away what the plan says no to, and take it out of the batch."""
        declined = {verdict.request_id for verdict in plan.verdicts if not verdict.promised}
        declined = {name for name in declined if not self.table.rows["num_output_tokens"][self.table.index(name)]}
        if not declined:
            return plan
        self._turned_away += sorted(declined)
        if not self.is_mid_step:
            self._turn_away()
        batch = plan.batch
        kept = [i for i, name in enumerate(batch.request_ids) if name not in declined]
        ids = [batch.request_ids[i] for i in kept]
        tokens, drafts = batch.num_tokens[kept], batch.draft_lengths[kept]
        return replace(plan, batch=replace(batch, request_ids=ids, num_tokens=tokens, draft_lengths=drafts))

    def _turn_away(self) -> None:
        """Let those go whom a plan has turned away."""
        for request_id in self._turned_away:
            if request_id in self.table:
                record = self.withdraw(request_id)
                self.hooks.end(record.sim, record.fail(rejected=True))
        self._turned_away.clear()

    def _plan_and_run(self) -> None:
        """Start the next step, or wait for work."""
        now_s = self.kernel.now_s
        if self.is_dead:
            return
        if not len(self.table):
            self._busy, self._next_plan = False, None
            return
        if self.num_steps >= self._next_check:
            check_table(self.table, self.engine.pool, self.limits, now_s)
            self._next_check = self.num_steps + CHECK_EVERY_STEPS
        plan, self._next_plan = self._next_plan or self._plan(now_s), None
        self.begin(plan)

    def begin(self, plan: Plan) -> None:
        """Carry out a plan that was made now."""
        self.run(plan)

    def cut_short(self) -> None:
        """Let nothing be under way but the step that is: so it is where steps are taken one by one."""

    def settle(self) -> None:
        """Bring all that has been done into the table: it is where steps are taken one by one."""

    def run(self, plan: Plan, end_s: float | None = None) -> None:
        """Start a step, which ends at `end_s` where that is known; wait where nothing can run."""
        now_s = self.kernel.now_s
        step = self.engine.start(plan.batch)
        if step is None:
            self._wait(now_s)
            return
        self._starved_since_s = None
        sample = self._sample(step)
        self.num_steps += 1
        self.tokens_computed += int(sample.num_tokens)
        self.is_mid_step = True
        end_s = now_s + sample.seconds if end_s is None else end_s
        self.kernel.schedule(end_s, Priority.STEP_END, lambda: self._complete(step, sample))
        if self.hooks.step is not None:
            self._record = {"step": self.num_steps, "t": now_s, **sample._asdict(), "planned_s": None}
            self._record["predicted_s"] = plan.batch.predicted_s
        if self.options.async_lag:
            ends_s = now_s + float(batch_seconds(self.plan_model.as_array(), *sample[:5]))
            self.outputs.foretell(step, ends_s)
            self._next_plan = self._plan(ends_s)

    def _wait(self, now_s: float) -> None:
        """Ask again soon, as an engine does that was told to run nothing."""
        if self._starved_since_s is None:
            self._starved_since_s = now_s
        if now_s - self._starved_since_s > STARVED_S:
            raise InvariantError(f"nothing ran for {STARVED_S} s while {len(self.table)} requests wait")
        self.kernel.schedule(now_s + POLL_S, Priority.PLAN, self._plan_and_run)

    def _complete(self, step: Step, sample: StepSample) -> None:
        """Let the step's tokens out, learn from it, finish requests, and plan again."""
        if self.is_dead:
            return
        self.is_mid_step = False
        for index in self.outputs.emit(step, self.kernel.now_s):
            self.finish(index)
        self._turn_away()
        if self.hooks.first_token is not None:
            started = np.flatnonzero(self.table.rows["num_output_tokens"])
            for request_id in [self.table.request_ids[i] for i in started.tolist()]:
                self.hooks.first_token(self.withdraw(request_id))
        if self.correction is not None:
            self.correction.observe(sample)
        if self.hooks.step is not None:
            self.hooks.step(self._record)
        self.go_on()

    def go_on(self) -> None:
        """Plan the next step when everything that happens now has happened."""
        self.kernel.soon(Priority.PLAN, self._plan_and_run)

    def finish(self, index: int) -> None:
        """Take a request whose last token is out from its row, and grade it."""
        blocks = int(self.table.rows["num_kv_blocks"][index])
        record = self.outputs.remove(index)
        sim, request = record.sim, record.sim.request
        self.engine.pool.give(blocks, sim.session_id, request.num_prompt_tokens + sim.num_output_tokens - 1)
        self.lengths.observe(request.slo_class, request.num_prompt_tokens, sim.num_output_tokens)
        self.hooks.end(sim, record.finish(self.kernel.now_s, makes_promises=self.traits.makes_promises))

    def _sample(self, step: Step) -> StepSample:
        """Return the size of a step and its true time."""
        tokens, context, drafts, pairs, num_prefill = step.totals[: loops.NUM_NEW]
        tokens += step.gone_tokens
        count = len(step.rows)
        seconds = batch_seconds(self.lines, tokens, count, context, drafts, pairs)
        if self.options.pace is not None:
            seconds = self.options.pace(self.kernel.now_s, seconds)
        sigma = self.options.noise_sigma
        if sigma:
            seconds *= math.exp(sigma * self._noise_rng.standard_normal() - 0.5 * sigma * sigma)
        return StepSample(int(tokens), count, int(context), int(drafts), pairs, int(num_prefill > 0), float(seconds))
