"""What happens around each engine step: refresh, plan, steer; then grade, learn, publish.

Nothing here may stop the engine. Every entry point that vLLM's scheduler calls catches what our code
raises; a step whose plan failed runs in vLLM's own order.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.jit import why_not_kept
from slos_serve.core.perf import PER_TOKEN
from slos_serve.core.planning.ageing import Ageing
from slos_serve.core.planning.steady import foretell
from slos_serve.core.tight import is_too_tight
from slos_serve.core.types import Plan, ReplicaState, Tier
from slos_serve.core.warmup import warm_up
from slos_serve.records.writer import StepRecorder
from slos_serve.vllm_plugin.carried import Carried
from slos_serve.vllm_plugin.ended import Ended
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.clock import Clock
from slos_serve.vllm_plugin.engine.expiry import Expiry
from slos_serve.vllm_plugin.engine.shape import Shapes
from slos_serve.vllm_plugin.engine.steer import Steering, expire
from slos_serve.vllm_plugin.engine.tracking import Tracker
from slos_serve.vllm_plugin.explaining import Explainer
from slos_serve.vllm_plugin.housekeeping import Housekeeper
from slos_serve.vllm_plugin.learning.drafting import DraftWatch
from slos_serve.vllm_plugin.learning.learner import Learner
from slos_serve.vllm_plugin.learning.learnt import Learnt
from slos_serve.vllm_plugin.pauses import Pauses
from slos_serve.vllm_plugin.pipeline import InFlight, Pipeline
from slos_serve.vllm_plugin.progress import Progress
from slos_serve.vllm_plugin.promises import Promises
from slos_serve.vllm_plugin.recorded import engine_facts, request_facts, request_line
from slos_serve.vllm_plugin.report import Ring
from slos_serve.vllm_plugin.safety.cost import Cost
from slos_serve.vllm_plugin.safety.faults import Faults
from slos_serve.vllm_plugin.safety.rules import StepDown
from slos_serve.vllm_plugin.safety.watchdog import PlannerHungError, Watchdog
from slos_serve.vllm_plugin.safety.work_limit import WorkLimit
from slos_serve.vllm_plugin.settings import Settings
from slos_serve.vllm_plugin.snapshot import capture, facts, snapshot
from slos_serve.vllm_plugin.wire.channel import Publisher, Seat, engine_folder, instance_name
from slos_serve.vllm_plugin.wire.outbox import Outbox

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from slos_serve.vllm_plugin.engine.live import Live

logger = logging.getLogger("vllm.slos_serve")

SWITCH_S = 0.0005  # until a thread of the engine's process gives way to another
STOCK_SHARE = 0.5  # of a step's fixed cost
WATCHED_EVERY = 8  # steps, of which one is looked at where nobody asks for anything
STARVED_STEPS = 4  # empty plans in a row, with work present, before vLLM's own order runs once


class SloRuntime:
    """The plug-in's state for one vLLM scheduler; see the module's text."""

    def __init__(self, scheduler: Any, *, is_async: bool) -> None:
        config = scheduler.vllm_config
        additional = config.additional_config
        document = additional.get("slo") if isinstance(additional, dict) else None
        self.scheduler = scheduler
        self.settings = settings = Settings.parse(document)
        self.modes = settings.resolved_modes(given=document is not None, is_cpu=view.is_cpu())
        self.may_enforce = settings.may_enforce or self.modes.is_steering or view.is_cpu()
        self.differences = view.probe()
        if not self.differences:
            self.differences = [f"{name} cannot be steered" for name in view.unsupported(scheduler)]
        self.differences += view.mismatch(scheduler, is_async=is_async)
        self._work_limit = WorkLimit()
        self.limits = view.limits(scheduler, guard_s=settings.guard_s, work_limit=self._work_limit.value)
        self.clock = Clock()
        self.tracker = Tracker(
            scheduler, settings.config, self.clock, self._sets_aside, is_async=is_async, edge_only=settings.edge
        )
        self.tracker.hits.is_used = settings.use_prefix_hits
        self.learner = Learner(path=settings.profile, key=settings.profile_key)
        self.safety = StepDown(settings.safety)
        self.watchdog = Watchdog(settings.safety.max_plan_s)
        self.drafts = DraftWatch() if self.limits.max_draft_length else None
        self.faults = Faults(settings.fault_dir)
        index = int(config.parallel_config.data_parallel_index)
        self.recorder = StepRecorder(settings.record_path(index), max_bytes=int(settings.record_max_mb * 1e6))
        self.learnt = Learnt(settings.state_path(index), self.learner, self.tracker, self.drafts)
        self._seat = self._take_seat(instance_name(config), index)
        self.outbox = Outbox(
            self._publisher(),
            index,
            lambda: capture(self),
            lambda: facts(self),
            refresh=self._refresh,
            failed=lambda error: self.faults.add("publish", error),
        )
        self.progress, self.explainer = Progress(), Explainer(settings.make_planner)
        self.promises = Promises(
            self.tracker, self.safety, self.outbox, self.faults, self._is_too_tight, progress=self.progress
        )
        self.pauses = Pauses()
        self.expiry = Expiry()
        self.ageing = Ageing(self.limits)
        self.divergences: Counter[str] = Counter()
        self.num_steps = self.num_plans = 0
        self.num_preempted = self.num_expired = 0
        self.plan_times = Ring()
        self.ended = Ended(self.learner, self.safety, self._work_limit, self.recorder)
        self.last_plan: Plan | None = None
        self.device = view.emulated_device()
        self.per_unit = view.blocks_per_unit(scheduler)
        self._state: ReplicaState | None = None
        self._steering: Steering | None = None
        self._phase, self._began = "", 0.0
        self._cost = Cost()
        self._carried: Carried | None = None
        self._shapes = Shapes(scheduler)
        self._num_empty, self._was_enforcing = 0, False
        self._planned_modes = self.modes
        self._pipeline = Pipeline()
        self._done: tuple[InFlight, float] | None = None
        self._is_updating, self._is_watching = False, True
        self._freed: list[Request] = []
        self.planner = settings.make_planner()
        self.recorder.add_fact("engine", self.clock.now(), engine_facts(self, is_async=is_async))
        self._warm_up()
        mode = self.modes.engine
        logger.info("SLO scheduler: mode %s, effective %s. %s", mode, self.effective_mode, self.mode_reason)
        if self.differences:
            logger.warning("SLO scheduler only observes: %s", "; ".join(self.differences))
        self.house = Housekeeper(self, self._address("control"))

    def _take_seat(self, instance_id: str, index: int) -> Seat | None:
        """Take the engine's folder; without one verdicts reach nobody, so nothing is promised."""
        try:
            return Seat(engine_folder(instance_id, index, self.settings.channel_dir))
        except OSError as error:
            self.differences.append(f"no channel to the API server ({error})")
            return None

    def _publisher(self) -> Publisher:
        publisher = Publisher(self._address("out"))
        if publisher.problem:
            self.differences.append(f"no channel to the API server ({publisher.problem})")
        return publisher

    def _address(self, purpose: str) -> str | None:
        return f"ipc://{self._seat.folder / purpose}.sock" if self._seat else None

    def _warm_up(self) -> None:
        # a thread that decodes a long request would else keep the scheduler waiting for 5 ms
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        started = time.perf_counter()
        try:
            warm_up(self.planner, self.limits)
        except Exception as error:  # noqa: BLE001 - a planner that fails is found out when it matters
            self.faults.add("warm-up", error)
        else:
            logger.info("SLO scheduler: planner ready in %.1f s", time.perf_counter() - started)
        if why_not_kept():
            logger.warning("SLO scheduler: compiled loops are not kept, so each start compiles: %s", why_not_kept())

    # -- mode -------------------------------------------------------------------------------------

    @property
    def is_enforcing(self) -> bool:
        """Tell whether plans are carried out now."""
        return self.modes.is_steering and not self.mode_reason

    @property
    def effective_mode(self) -> str:
        """`enforce` or `observe`, whatever was asked for."""
        return "enforce" if self.is_enforcing else "observe"

    @property
    def mode_reason(self) -> str:
        """Why plans are not carried out; "" where they are or nobody asked."""
        if not self.modes.is_steering:
            return ""
        if self.differences:
            return "unsupported: " + self.differences[0]
        if self.pauses.kind:
            return "paused by the operator"
        if not self.learner.has_model:
            return "no performance profile yet"
        return self.safety.reason

    def _is_too_tight(self, live: Live) -> bool:
        """Tell whether a request asks for more than this engine can do at all."""
        model = self.learner.model
        if model is None or not live.has_row:
            return False
        row = self.tracker.table.rows[self.tracker.table.index(live.request_id)]
        return is_too_tight(
            live.slo,
            model,
            prompt_tokens=int(row["num_prompt_tokens"]),
            output_tokens=float(row["predicted_output_tokens"]),
            budget=self.limits.max_num_batched_tokens,
            cached_tokens=int(row["num_cached_tokens"]),
            tokens_per_step=1 + self.limits.max_draft_length,
            guard_s=self.limits.guard_s,
        )

    def _sets_aside(self, slo_class: str) -> bool:
        return self.modes.sets_aside(slo_class)

    def set_mode(self, mode: str | None, slo_class: str | None = None) -> dict[str, Any]:
        """Change the mode of the engine, or of one class, from the next step on; return what holds then.

        Promises that were given are still planned for while plans are carried out. Safe on any thread;
        `ValueError` for an unknown mode or class, and for `enforce` on an engine that nobody has verified.
        """
        if mode == "enforce" and not self.may_enforce:
            expected = "observe, until slos-serve verify has passed for this engine and these flags"
            raise ValueError(f"mode = {mode!r}: expected {expected}")
        if slo_class is not None:
            self.settings.config.check_promising(slo_class)
        self.modes = self.modes.changed(mode, slo_class)
        logger.warning("SLO scheduler: mode %s, effective %s", self.modes.to_json(), self.effective_mode)
        self.outbox.beat(self.clock.peek(), at_once=True)
        return facts(self)

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the replica as the channel carries it."""
        return snapshot(self)

    def _refresh(self) -> None:
        """Bring the table up to date for a snapshot; on the scheduler's thread, at a time without a plan."""
        now = self.clock.now()
        self.ended.learn()
        self.outbox.steps += self.ended.take_rows()
        if self.tracker.is_wanted or self.settings.always_plan or self.settings.publish_replica:
            self.tracker.sync(self._pipeline.starts_at(now))
        self.progress.note(self.tracker.live.values(), now)

    # -- entry points that the scheduler class calls; none of them raises ---------------------------

    def on_add(self, request: Request) -> None:
        """Take up a request."""
        self._cost.start()
        try:
            live = self.tracker.add(request)
            if live is not None:
                self.promises.welcome(live, enforcing=self.is_enforcing, is_paused=bool(self.pauses.kind))
                self.expiry.add(live, self.settings.config.ttl_ms(live.slo_class))
            self._tell_while_paused()
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("add", error)
            self._reconcile()
        finally:
            self._cost.stop()

    def before_schedule(self) -> dict[str, int] | None:
        """Plan the next step; return its caps, None where vLLM's own order is to run."""
        self.num_steps += 1
        self._steering = self._state = None
        self._is_watching = self.num_steps % WATCHED_EVERY == 0 or not self._is_quiet()
        if not self._is_watching:
            self._carried = None
            return None
        self._cost.start()
        self._phase, self._began = "sync", time.perf_counter()
        caps = None
        try:
            steering = self._next_steering()
            if steering is not None:
                steering.begin()
                self._steering, caps = steering, steering.caps
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._carried = None
            self.faults.add(self._phase, error, self._state)
            self.safety.add_plan(faulty=True, hung=isinstance(error, PlannerHungError))
            self._reconcile()
        self._cost.stop()
        return caps

    def _reconcile(self) -> None:
        """See to it that one request that went wrong does not go wrong in every further step."""
        try:
            if count := self.tracker.reconcile():
                self.faults.counts["reconciled"] += count
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("reconcile", error)

    def on_pause(self) -> None:
        """Note that the operator paused or resumed the engine."""
        try:
            self.pauses.change(view.pause_of(self.scheduler), self.clock.now(), self.tracker)
            self.outbox.flush(self.clock.now(), is_idle=True)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("pause", error)

    def _tell_while_paused(self) -> None:
        """Let out at once what no step will."""
        if self.pauses.kind:
            self.outbox.flush(self.clock.now(), is_idle=False)

    def on_cache_reset(self) -> None:
        """Note that the prefix cache has been emptied."""
        try:
            self.tracker.hits.forget()
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("cache", error)

    def end_steering(self, *, throttled: bool) -> None:
        """Restore vLLM's queues after a steered `schedule()`."""
        if self._steering is not None:
            self._steering.finish(throttled=throttled)

    def after_schedule(self, output: SchedulerOutput) -> None:
        """Note what was really scheduled."""
        if not self._is_watching:
            self._pipeline.pass_by()
            return
        self._cost.start()
        try:
            self._note_scheduled(output)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._carried = None
            self.faults.add("scheduled", error, self._state)
        finally:
            self._cost.stop()

    def before_update(self, output: SchedulerOutput) -> None:
        """Take the time of the batch whose output has come."""
        self._is_updating = True
        self._done = self._pipeline.take(output, self.clock.now())

    def on_free(self, request: Request) -> None:
        """Note that a request is finished, on whatever path."""
        self._freed.append(request)
        if not self._is_updating:
            try:
                self._finish_freed(self.clock.now(), None)
                self._tell_while_paused()
            except Exception as error:  # noqa: BLE001 - the engine must go on
                self.faults.add("finish", error)

    def after_update(self, outputs: dict[int, Any] | None) -> None:
        """Grade the output, learn from the step, publish."""
        if self._is_watching:
            self._cost.start()
        try:
            self._note_update({} if outputs is None else outputs)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._carried = None
            self.faults.add("update", error)
        finally:
            self._is_updating = False
            if self._is_watching:
                self._cost.stop()

    def shutdown(self) -> None:
        """Stop the thread, write what is buffered, close the channel."""
        self.house.stop()
        self.ended.stalls.close()
        self.learnt.save()
        self.recorder.flush()
        self.outbox.close()
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.leave()

    # -- before a step ----------------------------------------------------------------------------

    def _next_steering(self) -> Steering | None:
        """Return what carries out the next step: the plan that goes on, else a new one; None for vLLM's own order."""
        if self.learner.take_new():
            self._start_model()
        carried, now = self._carried, self.clock.now()
        starts_s = self._pipeline.starts_at(now)
        if carried is not None:
            free = view.free_units(self.scheduler, self.per_unit)
            is_good = carried.goes_on(self.tracker.version, self._planned_modes, starts_s, free)
            if is_good and not self._is_changed():
                return carried.steering
            self._carried = None
        return self._plan_step(now, starts_s)

    def _is_quiet(self) -> bool:
        """Tell whether nobody asks for anything, so that it is enough to look at a step now and then."""
        settings = self.settings
        return not (
            self.tracker.is_wanted
            or settings.always_plan
            or self.recorder.is_open
            or self.drafts is not None
            or self._planned_modes is not self.modes
            or not self.learner.is_settled
        )

    def _is_changed(self) -> bool:
        """Tell whether plans are to be made for others, or carried out by others, than the last one was."""
        is_mode_new = self._planned_modes is not self.modes or self._was_enforcing is not self.is_enforcing
        is_lost = len(self.scheduler.requests) != len(self.tracker.live)  # somebody came or went unnoticed
        return is_mode_new or is_lost or bool(self.pauses.kind)

    def _plan_step(self, now: float, starts_s: float) -> Steering | None:
        self.last_plan = None
        tracker = self.tracker
        if self._planned_modes is not self.modes:
            self._planned_modes = self.modes
            tracker.regroup()
        model = self.learner.model
        if tracker.blocked:
            tracker.promote()
        wanted = tracker.is_wanted or (self.settings.always_plan and (tracker.rowless or len(tracker.table)))
        if model is None or not wanted or self.safety.is_resting or self.pauses.kind:
            return None  # nothing is promised to anybody: vLLM's own order serves best
        tracker.sync(starts_s)
        enforcing = self.is_enforcing
        if enforcing and not self._was_enforcing:
            tracker.reopen()
        self._was_enforcing = enforcing
        if enforcing:
            self.ageing.step(tracker.table, now)
        state = self._state = ReplicaState(
            now_s=starts_s,
            requests=tracker.table,
            num_free_kv_blocks=view.free_units(self.scheduler, self.per_unit),
            limits=replace(self.limits, work_limit=self._work_limit.value, max_num_seqs=self._free_seats()),
            perf_model=model,
            **({} if self.drafts is None else self.drafts.state(tracker.table.classes, self.limits.max_draft_length)),
        )
        plan = self._plan(state)
        if plan.verdicts:
            self.promises.apply(plan, starts_s, enforcing=enforcing)
            self.outbox.flush(now, is_idle=False)  # before the step: its first tokens must not overtake them
        steering = self._steer(plan) if enforcing else None
        self.safety.add_plan(faulty=False)
        if steering is not None or not enforcing:
            self._carry_on(state, plan, steering)
        return steering

    def _plan(self, state: ReplicaState) -> Plan:
        """Ask the planner, and count what it takes."""
        self._phase = "plan"
        started = time.perf_counter()
        with self.watchdog:
            plan = self.planner.plan(state)
        took = time.perf_counter() - started
        self.num_plans += 1
        self.plan_times.add(took)
        self.outbox.plan_s.append(round(took, 7))
        self._work_limit.spend(plan.work, took)
        self.recorder.ask(self.num_steps, state, plan)  # before its verdicts change the table
        self.explainer.keep(state, plan)
        self._phase = "apply"
        self.last_plan = plan
        return plan

    def _carry_on(self, state: ReplicaState, plan: Plan, steering: Steering | None) -> None:
        """Foresee how long the plan stays good."""
        tracker = self.tracker
        if tracker.stock or tracker.blocked or not hasattr(self.planner, "count_steps"):
            return  # what they need, or how a planner that cannot tell would go on, is seen by planning
        if steering is None and plan.batch.num_tokens.max(initial=1) > 1:
            return  # vLLM's own order may cut the prompts otherwise
        foretold = foretell(state, plan, self._work_limit.run_steps)
        if foretold is None:
            return
        left, ids = tracker.left, tracker.table.request_ids
        if not foretold.is_alone:  # an end lets others in
            foretold = foretold.until(int(left[left > 0].min(initial=1)))
        ending = np.flatnonzero((left > 0) & (left < len(foretold.starts_s))).tolist()
        lasts = sorted(((int(left[i]), ids[i]) for i in ending), reverse=True)
        self._carried = Carried(foretold, steering, tracker.version, self.modes, lasts)

    def _steer(self, plan: Plan) -> Steering | None:
        tracker, batch = self.tracker, plan.batch
        if len(batch.request_ids) or tracker.stock or not len(tracker.table):
            self._num_empty = 0
        else:
            self._num_empty += 1
            if self._num_empty >= STARVED_STEPS:
                self._num_empty = 0
                self.faults.counts["starved"] += 1
                return None
        steering = Steering(
            self.scheduler,
            batch,
            waiting=tracker.runnable_waiting(),
            stock=tracker.stock,
            stock_tokens=self._stock_tokens(plan) if tracker.stock else 0,
            next_draft_length=None if self.drafts is None else self.drafts.take_plan(batch, tracker.table),
        )
        if steering.num_surplus:
            self.divergences["adapters"] += steering.num_surplus
        for request in steering.preempted:
            self.num_preempted += 1
            tracker.note_preempted(request.request_id)
        return steering

    def _free_seats(self) -> int:
        """Return the seats that are not taken by requests without a row."""
        taken = sum(view.holds_seat(request) for request in self.tracker.stock.values()) if self.tracker.stock else 0
        return max(1, self.limits.max_num_seqs - taken)

    def _stock_tokens(self, plan: Plan) -> int:
        """Return the tokens that requests without a row may take: beside promises, half a step's fixed cost."""
        tiers = self.tracker.table.rows["tier"]
        model = self.learner.model
        if model is None or not len(plan.batch.request_ids) or not (tiers == Tier.PROMISED).any():
            return self.limits.max_num_batched_tokens
        return int(STOCK_SHARE * model.seconds(1.0) / max(line[PER_TOKEN] for line in model.lines))

    def _start_model(self) -> None:
        """Pin the reference and let slowdown SLOs mean something."""
        reference = self.learner.reference
        assert reference is not None
        # graders read the same document: the budget it was measured with defines the reference
        known = {} if self.learner.profile is None else self.learner.profile.document
        budget = int(known.get("max_num_batched_tokens") or self.limits.max_num_batched_tokens)
        for live in self.tracker.set_reference(lambda tokens: reference.prefill_seconds(tokens, budget)):
            live.verdict = ""
        self.learnt.restore()
        model = {"perf_model": reference.to_json(), "max_num_batched_tokens": budget}
        self.recorder.add_fact("model", self.clock.now(), model)
        logger.info("SLO scheduler: performance model ready, effective mode %s", self.effective_mode)

    # -- after scheduling -------------------------------------------------------------------------

    def _note_scheduled(self, output: SchedulerOutput) -> None:
        self.recorder.answer(output.num_scheduled_tokens, is_steered=self._steering is not None)
        if not output.num_scheduled_tokens:
            self._carried = None
            return
        shape = self._shapes.of(output)
        predicted = self.learner.predict(shape)
        if self._steering is not None:
            if output.num_scheduled_tokens != self._steering.expected:
                self._carried = None
                self.divergences.update(self._steering.divergences(output.num_scheduled_tokens))
            elif self._carried is not None:
                self._steering.go_on()
        now, ended = self.clock.now(), time.perf_counter()
        cost_s = self._cost.take()
        self._pipeline.add(
            InFlight(
                output=output,
                shape=shape,
                began=ended if self.tracker.is_async else self._began,
                added_s=now,
                starts_at_s=self._pipeline.starts_at(now) if self._state is None else self._state.now_s,
                planned_s=None if predicted is None else predicted * self.learner.margin(shape),
                predicted_s=predicted,
                plan_age=0 if self._carried is None else self._carried.num_steps - 1,
                cost_s=cost_s,
                delay_s=0.0 if predicted is None else min(cost_s, self._pipeline.waited_s(now)),  # else nobody plans
                undrafted=self._undrafted(output.num_scheduled_tokens),
            )
        )

    def _undrafted(self, scheduled: dict[str, int]) -> frozenset[str]:
        if self.drafts is None or not self.tracker.is_async:
            return frozenset()
        return self.drafts.without(scheduled, view.drop_stale_drafts(self.scheduler, scheduled))

    # -- after a step -----------------------------------------------------------------------------

    def _note_update(self, outputs: dict[int, Any]) -> None:
        now = self.clock.now()
        tracker = self.tracker
        for batch in outputs.values():
            if self.drafts is not None and self._done is not None:
                entry = self._done[0]
                scheduled = entry.output.scheduled_spec_decode_tokens
                self.drafts.observe_outputs(tracker.live, scheduled, batch.outputs, entry.undrafted)
            tracker.outputs.take(batch.outputs, now)
        expired = self.expiry.take(now, tracker.live, enforcing=self.is_enforcing)
        if expired:
            self._expire(expired, outputs)
        if self._freed:
            self._finish_freed(now, outputs)
        if self._done is not None:
            entry, seconds = self._done
            self._done = None
            self._learn(entry, seconds, entry.delay_s, now)
        if self._is_watching:
            self._check(now)
        self.outbox.flush(now, is_idle=not tracker.live)

    def _check(self, now: float) -> None:
        """Step down or up where that is due."""
        self.safety.add_clock_step(self.clock.take_step_back())
        if not self.safety.check(now):
            return
        if self.safety.is_down:
            logger.error("ALERT: SLO scheduling stepped down to vLLM's own order: %s", self.safety.reason)
        else:
            logger.warning("SLO scheduling resumed")

    def _finish_freed(self, now: float, outputs: dict[int, Any] | None) -> None:
        freed, self._freed = self._freed, []
        if self._carried is not None and not self._carried.leave_out(
            [request.request_id for request in freed], self.tracker.version
        ):
            self._carried = None
        known = request_facts(self.tracker, freed) if self.recorder.is_open else {}
        told = len(self.outbox.finished)
        self.promises.finish(freed, now, outputs, enforcing=self.is_enforcing)
        if not self.tracker.live:
            self._pipeline.rest()
        if known:
            for end in self.outbox.finished[told:]:
                facts = known[end["request_id"]]
                line = request_line(facts, end, names=self.settings.record_names, enforced=self.is_enforcing)
                self.recorder.add_fact("request", now, line)

    def _expire(self, expired: list[Live], outputs: dict[int, Any]) -> None:
        """End requests that waited too long; they are graded and told with the others that ended."""
        self.num_expired += len(expired)
        for live in expired:
            live.is_expired = True
        expire(self.scheduler, [live.request for live in expired], outputs)

    def _learn(self, entry: InFlight, seconds: float, delay: float, now: float) -> None:
        """Learn from a step of so many `seconds`, before which the device waited for us for `delay`."""
        self.ended.add(entry, seconds, delay, self._pipeline.clock_error_s, step=self.num_steps, now_s=now)
