"""What happens around each engine step: refresh, plan, steer; then grade, learn, publish.

Nothing here may stop the engine. Every entry point that vLLM's scheduler calls catches what our code
raises; a step whose plan failed runs in vLLM's own order.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from slos_serve.core.jit import why_not_kept
from slos_serve.core.warmup import warm_up
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.shape import Shapes
from slos_serve.vllm_plugin.engine.steer import Steering, expire
from slos_serve.vllm_plugin.housekeeping import Housekeeper
from slos_serve.vllm_plugin.next_step import NextStep
from slos_serve.vllm_plugin.parts import Parts
from slos_serve.vllm_plugin.pipeline import InFlight
from slos_serve.vllm_plugin.recorded import engine_facts, request_facts, request_line
from slos_serve.vllm_plugin.safety.cost import Cost
from slos_serve.vllm_plugin.safety.watchdog import PlannerHungError
from slos_serve.vllm_plugin.snapshot import capture

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from slos_serve.core.types import Plan, ReplicaState
    from slos_serve.vllm_plugin.engine.live import Live

logger = logging.getLogger("vllm.slos_serve")

SWITCH_S = 0.0005  # until a thread of the engine's process gives way to another


class SloRuntime(Parts):
    """The plug-in's state for one vLLM scheduler; see the module's text."""

    def __init__(self, scheduler: Any, *, is_async: bool) -> None:
        super().__init__(scheduler, is_async=is_async, capture=capture, refresh=self._refresh)
        self._next = NextStep(self, self._ask)
        self._steering: Steering | None = None
        self._began = 0.0
        self._cost, self._cpu_wait = Cost(), self.ended.stalls.cpu_wait
        self._waited_cpu_s = 0.0  # by the hand-over before
        self._shapes = Shapes(scheduler)
        self._done: tuple[InFlight, float] | None = None
        self._is_updating, self._is_watching = False, True
        self._freed: list[Request] = []
        self.recorder.add_fact("engine", self.clock.now(), engine_facts(self, is_async=is_async))
        self._warm_up()
        standing = self.standing
        mode, effective = standing.modes.engine, standing.effective_mode
        logger.info("SLO scheduler: mode %s, effective %s. %s", mode, effective, standing.mode_reason)
        if standing.differences:
            logger.warning("SLO scheduler only observes: %s", "; ".join(standing.differences))
        self.housekeeper = Housekeeper(self, self.channel.address("control"))

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

    @property
    def is_enforcing(self) -> bool:
        """Tell whether plans are carried out now."""
        return self.standing.is_enforcing

    @property
    def effective_mode(self) -> str:
        """`enforce` or `observe`, whatever was asked for."""
        return self.standing.effective_mode

    @property
    def mode_reason(self) -> str:
        """Why plans are not carried out; "" where they are or nobody asked."""
        return self.standing.mode_reason

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the replica as the channel carries it."""
        return capture(self)()

    def _refresh(self) -> None:
        """Bring the table up to date for a snapshot; on the scheduler's thread, at a time without a plan."""
        now = self.clock.now()
        self.ended.learn()
        self.outbox.steps += self.ended.take_rows()
        if self.tracker.is_wanted or self.settings.always_plan or self.settings.publish_replica:
            self.tracker.sync(self.pipeline.starts_at(now))
        self.progress.note(self.tracker.live.values(), now)

    # -- entry points that the scheduler class calls; none of them raises ---------------------------

    def on_add(self, request: Request) -> None:
        """Take up a request."""
        self._cost.start()
        try:
            live = self.tracker.add(request)
            if live is not None:
                is_paused = bool(self.standing.pauses.kind)
                self.promises.first_verdict(live, enforcing=self.is_enforcing, is_paused=is_paused)
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
        step = self._next
        self._steering = step.state = None
        step.phase = "sync"
        self._is_watching = step.is_worth_a_look()
        if not self._is_watching:
            step.carried = None
            return None
        self._cost.start()
        self._began = time.perf_counter()
        caps = None
        try:
            if self.learner.take_new():
                self._take_model()
            steering = step.choose()
            if steering is not None:
                steering.begin()
                self._steering, caps = steering, steering.caps
        except Exception as error:  # noqa: BLE001 - the engine must go on
            step.carried = None
            self.faults.add(step.phase, error, step.state)
            self.safety.add_plan(faulty=True, hung=isinstance(error, PlannerHungError))
            self._reconcile()
        self._cost.stop()
        return caps

    def _take_model(self) -> None:
        """Take up the performance model that has come."""
        model = self.learnt.begin(self.limits.max_num_batched_tokens)
        self.recorder.add_fact("model", self.clock.now(), model)
        logger.info("SLO scheduler: performance model ready, effective mode %s", self.effective_mode)

    def _ask(self, state: ReplicaState) -> Plan:
        """Ask the planner, for so long as it may take, and count what it takes."""
        started = time.perf_counter()
        with self.watchdog:
            plan = self.planner.plan(state)
        took = time.perf_counter() - started
        self.num_plans += 1
        self.plan_times.add(took)
        self.outbox.plan_s.append(round(took, 7))
        self.work_limit.spend(plan.work, took)
        self.recorder.ask(self.num_steps, state, plan)  # before its verdicts change the table
        self.explainer.keep(state, plan)
        return plan

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
            self.standing.pauses.change(view.pause_of(self.scheduler), self.clock.now(), self.tracker)
            self.outbox.flush(self.clock.now(), is_idle=True)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("pause", error)

    def _tell_while_paused(self) -> None:
        """Let out at once what no step will."""
        if self.standing.pauses.kind:
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
            self.pipeline.pass_by()
            return
        self._cost.start()
        try:
            self._note_scheduled(output)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._next.carried = None
            self.faults.add("scheduled", error, self._next.state)
        finally:
            self._cost.stop()

    def before_update(self, output: SchedulerOutput) -> None:
        """Take the time of the batch whose output has come."""
        self._is_updating = True
        self._done = self.pipeline.take(output, self.clock.now())

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
            self._next.carried = None
            self.faults.add("update", error)
        finally:
            self._is_updating = False
            if self._is_watching:
                self._cost.stop()

    def shutdown(self) -> None:
        """Stop the thread, write what is buffered, close the channel."""
        self.housekeeper.stop()
        self.ended.stalls.close()
        self.learnt.save()
        self.recorder.flush()
        self.outbox.close()
        self.channel.leave()

    # -- after scheduling -------------------------------------------------------------------------

    def _note_scheduled(self, output: SchedulerOutput) -> None:
        self.recorder.answer(output.num_scheduled_tokens, is_steered=self._steering is not None)
        if not output.num_scheduled_tokens:
            self._next.carried = None
            return
        shape = self._shapes.of(output)
        predicted = self.learner.predict(shape)
        if self._steering is not None:
            if output.num_scheduled_tokens != self._steering.expected:
                self._next.carried = None
                self.divergences.update(self._steering.divergences(output.num_scheduled_tokens))
            elif self._next.carried is not None:
                self._steering.go_on()
        now, ended = self.clock.now(), time.perf_counter()
        cost_s, waited_cpu_s = self._cost.take(), self._cpu_wait.read_s()
        others_s, self._waited_cpu_s = waited_cpu_s - self._waited_cpu_s, waited_cpu_s
        waited_s = max(0.0, self.pipeline.waited_s(now) - others_s)  # else, with an unknown time, nobody plans
        self.pipeline.add(
            InFlight(
                output=output,
                shape=shape,
                began=ended if self.tracker.is_async else self._began,
                added_s=now,
                starts_at_s=self.pipeline.starts_at(now) if self._next.state is None else self._next.state.now_s,
                planned_s=None if predicted is None else predicted * self.learner.margin(shape),
                predicted_s=predicted,
                plan_age=0 if self._next.carried is None else self._next.carried.num_steps - 1,
                cost_s=cost_s,
                delay_s=0.0 if predicted is None else min(cost_s, waited_s),
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
        self._next.leave_out(request.request_id for request in freed)
        known = request_facts(self.tracker, freed) if self.recorder.is_open else {}
        told = len(self.outbox.finished)
        self.promises.finish(freed, now, outputs, enforcing=self.is_enforcing)
        if not self.tracker.live:
            self.pipeline.rest()
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
        self.ended.add(entry, seconds, delay, self.pipeline.clock_error_s, step=self.num_steps, now_s=now)
