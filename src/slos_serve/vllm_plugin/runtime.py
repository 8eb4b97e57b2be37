"""What happens around each engine step: refresh, plan, steer; then grade, learn, publish.

Nothing here may stop the engine. Every entry point that vLLM's scheduler calls catches what our code
raises; a step whose plan failed runs in vLLM's own order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slos_serve.core.types import Plan, ReplicaState, Status, Tier
from slos_serve.vllm_plugin import view
from slos_serve.vllm_plugin.channel import Publisher, address
from slos_serve.vllm_plugin.clock import Clock
from slos_serve.vllm_plugin.drafting import DraftWatch
from slos_serve.vllm_plugin.effort import WorkLimit
from slos_serve.vllm_plugin.faults import Faults
from slos_serve.vllm_plugin.learning import Learner
from slos_serve.vllm_plugin.outbox import Outbox
from slos_serve.vllm_plugin.promises import Promises
from slos_serve.vllm_plugin.record import BatchShape, StepRecorder
from slos_serve.vllm_plugin.report import Ring
from slos_serve.vllm_plugin.safety import StepDown
from slos_serve.vllm_plugin.settings import Settings
from slos_serve.vllm_plugin.shape import batch_shape
from slos_serve.vllm_plugin.steer import Steering
from slos_serve.vllm_plugin.tracking import Tracker
from slos_serve.vllm_plugin.warmup import warm_up

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.slos_serve")

STARVED_STEPS = 4  # empty plans in a row, with work present, before vLLM's own order runs once
TICK_S = 0.5
BUSY_GAP_S = 0.01  # from one output to the next schedule(): longer, and the engine had nothing to do


@dataclass(slots=True)
class InFlight:
    """One scheduled batch on its way through the engine. `ends_at_s` is expected, on the wall clock.

    `began`: when its `schedule()` was called, on `perf_counter`. `planned_s`: with margin, `predicted_s`
    without.
    """

    output: SchedulerOutput
    shape: BatchShape
    began: float
    ends_at_s: float
    planned_s: float | None
    predicted_s: float | None
    overhead_s: float


class SloRuntime:
    """The plug-in's state for one vLLM scheduler; see the module's text."""

    def __init__(self, scheduler: Any, *, is_async: bool) -> None:
        config = scheduler.vllm_config
        additional = config.additional_config
        document = additional.get("slo") if isinstance(additional, dict) else None
        self.scheduler = scheduler
        self.settings = settings = Settings.parse(document)
        self.mode = settings.resolved_mode(given=document is not None, is_cpu=view.is_cpu())
        self.differences = view.probe()
        if not self.differences:
            self.differences = [f"{name} cannot be steered" for name in view.unsupported(scheduler)]
        self._work_limit = WorkLimit()
        self.limits = view.limits(scheduler, guard_s=settings.guard_s, work_limit=self._work_limit.value)
        self.clock = Clock()
        self.tracker = Tracker(scheduler, settings.config, self.clock, is_async=is_async)
        self.learner = Learner(path=settings.profile, key=settings.profile_key)
        self.recorder = StepRecorder(settings.record)
        self.safety = StepDown(settings.safety)
        self.drafts = DraftWatch() if self.limits.max_draft_length else None
        self.faults = Faults(settings.fault_dir)
        index = int(config.parallel_config.data_parallel_index)
        self.outbox = Outbox(Publisher(address(config.instance_id, index)), index, self.snapshot, self._facts)
        self.promises = Promises(self.tracker, self.safety, self.outbox)
        self.divergences: Counter[str] = Counter()
        self.num_steps = 0
        self.num_preempted = 0
        self.plan_times = Ring()
        self.overheads = Ring()
        self.last_plan: Plan | None = None
        self._state: ReplicaState | None = None
        self._steering: Steering | None = None
        self._phase = ""
        self._overhead = self._began = 0.0
        self._num_empty = 0
        self._was_enforcing = False
        self._in_flight: deque[InFlight] = deque()
        self._done: tuple[InFlight, float] | None = None
        self._last_update = 0.0
        self._is_updating = False
        self._freed: list[Request] = []
        self._per_unit = view.blocks_per_unit(scheduler)
        self.planner = settings.make_planner()
        self._warm_up()
        logger.info("SLO scheduler: mode %s, effective %s. %s", self.mode, self.effective_mode, self.mode_reason)
        if self.differences:
            logger.warning("SLO scheduler only observes: %s", "; ".join(self.differences))
        self._report_at = time.monotonic() + settings.report_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_house, name="slos-serve", daemon=True)
        self._thread.start()

    def _warm_up(self) -> None:
        try:
            took = warm_up(self.planner, self.limits)
        except Exception as error:  # noqa: BLE001 - a planner that fails is found out when it matters
            self.faults.add("warm-up", error)
        else:
            logger.info("SLO scheduler: planner ready in %.1f s", took)

    # -- mode -------------------------------------------------------------------------------------

    @property
    def is_enforcing(self) -> bool:
        """Tell whether plans are carried out now."""
        return self.mode == "enforce" and not self.mode_reason

    @property
    def effective_mode(self) -> str:
        """`enforce` or `observe`, whatever was asked for."""
        return "enforce" if self.is_enforcing else "observe"

    @property
    def mode_reason(self) -> str:
        """Why plans are not carried out; "" where they are or nobody asked."""
        if self.mode != "enforce":
            return ""
        if self.differences:
            return "unsupported: " + self.differences[0]
        if not self.learner.has_model:
            return "no performance profile yet"
        return self.safety.reason

    # -- entry points that the scheduler class calls; none of them raises ---------------------------

    def on_add(self, request: Request) -> None:
        """Take up a request."""
        try:
            live = self.tracker.add(request)
            if live is not None:
                self.promises.welcome(live, enforcing=self.is_enforcing)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("add", error)

    def before_schedule(self) -> dict[str, int] | None:
        """Plan the next step; return its caps, None where vLLM's own order is to run."""
        started = self._began = time.perf_counter()
        self._steering = self._state = self.last_plan = None
        self._phase = "sync"
        caps = None
        try:
            steering = self._plan_step()
            if steering is not None:
                steering.begin()
                self._steering, caps = steering, steering.caps
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add(self._phase, error, self._state)
            self.safety.add_plan(faulty=True)
        self._overhead = time.perf_counter() - started
        return caps

    def end_steering(self, *, throttled: bool) -> None:
        """Restore vLLM's queues after a steered `schedule()`."""
        if self._steering is not None:
            self._steering.finish(throttled=throttled)

    def after_schedule(self, output: SchedulerOutput) -> None:
        """Note what was really scheduled."""
        started = time.perf_counter()
        try:
            self._note_scheduled(output, started)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("scheduled", error, self._state)

    def before_update(self, output: SchedulerOutput) -> None:
        """Take the time of the batch whose output has come."""
        now = time.perf_counter()
        self._is_updating = True
        self._done = None
        while self._in_flight:
            entry = self._in_flight.popleft()
            if entry.output is output:
                # A busy engine's step lasts from one output to the next, scheduling included.
                busy = entry.began - self._last_update < BUSY_GAP_S
                self._done = (entry, now - (self._last_update if busy else entry.began))
                break
        self._last_update = now

    def on_free(self, request: Request) -> None:
        """Note that a request is finished, on whatever path."""
        self._freed.append(request)
        if not self._is_updating:
            try:
                self._finish_freed(self.clock.now(), None)
            except Exception as error:  # noqa: BLE001 - the engine must go on
                self.faults.add("finish", error)

    def after_update(self, outputs: dict[int, Any] | None) -> None:
        """Grade the output, learn from the step, publish."""
        started = time.perf_counter()
        try:
            self._note_update(outputs or {}, started)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self.faults.add("update", error)
        finally:
            self._is_updating = False

    def shutdown(self) -> None:
        """Stop the thread, write what is buffered, close the channel."""
        self._stop.set()
        self._thread.join(timeout=5)
        self.recorder.flush()
        self.outbox.publisher.close()

    # -- before a step ----------------------------------------------------------------------------

    def _plan_step(self) -> Steering | None:
        self.num_steps += 1
        if self.learner.take_new():
            self._start_model()
        now = self.clock.now()
        tracker = self.tracker
        tracker.sync()
        model = self.learner.model
        wanted = tracker.num_with_slo or (self.settings.always_plan and len(tracker.table))
        if model is None or not wanted:
            return None  # nothing is promised to anybody: vLLM's own order serves best
        enforcing = self.is_enforcing
        if enforcing and not self._was_enforcing:
            tracker.reopen()
        self._was_enforcing = enforcing
        if self._in_flight:  # async: the planned batch starts when the one in flight ends
            now = max(now, self._in_flight[-1].ends_at_s)
        state = self._state = ReplicaState(
            now_s=now,
            requests=tracker.table,
            num_free_kv_blocks=view.free_units(self.scheduler, self._per_unit),
            limits=replace(self.limits, work_limit=self._work_limit.value),
            perf_model=model,
            **({} if self.drafts is None else self.drafts.state(tracker.table.classes, self.limits.max_draft_length)),
        )
        self._phase = "plan"
        started = time.perf_counter()
        plan = self.planner.plan(state)
        took = time.perf_counter() - started
        self.plan_times.add(took)
        self.outbox.plan_s.append(round(took, 7))
        self._work_limit.spend(plan.work, took)
        self._phase = "apply"
        if plan.verdicts:
            self.promises.apply(plan, now, enforcing=enforcing)
            self.outbox.flush(now, is_idle=False)  # before the step: its first tokens must not overtake them
        steering = self._steer(plan) if enforcing else None
        self.last_plan = plan
        self.safety.add_plan(faulty=False)
        return steering

    def _steer(self, plan: Plan) -> Steering | None:
        tracker, batch = self.tracker, plan.batch
        if len(batch.request_ids) or tracker.stock:
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
            next_draft_length=None if self.drafts is None else self.drafts.take_plan(batch, tracker.table),
        )
        for request in steering.preempted:
            self.num_preempted += 1
            tracker.note_preempted(request.request_id)
        return steering

    def _start_model(self) -> None:
        """Pin the reference and let slowdown SLOs mean something."""
        reference = self.learner.reference
        assert reference is not None
        # graders read the same document: the budget it was measured with defines the reference
        budget = int((self.learner.profile or {}).get("max_num_batched_tokens") or self.limits.max_num_batched_tokens)
        for live in self.tracker.set_reference(lambda tokens: reference.prefill_seconds(tokens, budget)):
            live.verdict = ""
        logger.info("SLO scheduler: performance model ready, effective mode %s", self.effective_mode)

    # -- after scheduling -------------------------------------------------------------------------

    def _note_scheduled(self, output: SchedulerOutput, started: float) -> None:
        if not output.num_scheduled_tokens:
            return
        shape = batch_shape(self.tracker, output)
        predicted = self.learner.predict(shape)
        if self._steering is not None:
            self._compare(output, self._steering)
        begins = self.clock.now()
        if self._in_flight:
            begins = max(begins, self._in_flight[-1].ends_at_s)
        finished = time.perf_counter()
        self._in_flight.append(
            InFlight(
                output=output,
                shape=shape,
                began=self._began,
                ends_at_s=begins + (predicted or 0.0),
                planned_s=None if predicted is None else predicted * self.learner.margin(shape),
                predicted_s=predicted,
                overhead_s=self._overhead + finished - started,
            )
        )

    def _compare(self, output: SchedulerOutput, steering: Steering) -> None:
        """Count how the engine's batch differs from the planned one."""
        expected, found = steering.expected, output.num_scheduled_tokens
        if expected == found:
            return
        caps = steering.caps
        for request_id, tokens in expected.items():
            scheduled = found.get(request_id, 0)
            if not tokens <= scheduled <= caps[request_id]:
                self.divergences["missing" if not scheduled else "short" if scheduled < tokens else "long"] += 1
        stock = self.tracker.stock
        for request_id in found:
            if request_id not in expected and request_id not in stock:
                self.divergences["extra"] += 1

    # -- after a step -----------------------------------------------------------------------------

    def _note_update(self, outputs: dict[int, Any], started: float) -> None:
        now = self.clock.now()
        tracker = self.tracker
        for batch in outputs.values():
            if self.drafts is not None and self._done is not None:
                scheduled = self._done[0].output.scheduled_spec_decode_tokens
                self.drafts.observe_outputs(tracker.live, scheduled, batch.outputs)
            tracker.take_outputs(batch.outputs, now)
        if self._freed:
            self._finish_freed(now, outputs)
        if self._done is not None:
            entry, seconds = self._done
            self._done = None
            overhead = entry.overhead_s + time.perf_counter() - started
            self._learn(entry, seconds, overhead, now)
        if self.safety.check(now):
            if self.safety.is_down:
                logger.error("ALERT: SLO scheduling stepped down to vLLM's own order: %s", self.safety.reason)
            else:
                logger.warning("SLO scheduling resumed")
        self.outbox.flush(now, is_idle=not tracker.live)

    def _finish_freed(self, now: float, outputs: dict[int, Any] | None) -> None:
        freed, self._freed = self._freed, []
        self.promises.finish(freed, now, outputs, enforcing=self.is_enforcing)

    def _learn(self, entry: InFlight, seconds: float, overhead: float, now: float) -> None:
        self.overheads.add(overhead)
        self._work_limit.earn(seconds)
        self.learner.observe(entry.shape, seconds, entry.predicted_s)
        self.recorder.add(self.num_steps, now, entry.shape, seconds, entry.planned_s, entry.predicted_s)
        self.safety.add_step(seconds, overhead)
        self.safety.set_coverage(self.learner.coverage, int(self.learner.num_errors))
        if entry.predicted_s is not None:
            self.outbox.step_error_s.append(round(seconds - entry.predicted_s, 7))

    # -- what others see --------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the replica as the channel carries it."""
        rows = self.tracker.table.rows
        tiers = rows["tier"]
        plan = self.last_plan
        headroom = plan.headroom_tokens_per_s if plan is not None else None
        backlog = float(rows["num_prompt_tokens"][rows["status"] == Status.WAITING].sum())
        return {
            "mode": self.mode,
            **self._facts(),
            "num_promised": int((tiers == Tier.PROMISED).sum()),
            "num_best_effort": int((tiers == Tier.BEST_EFFORT).sum()),
            "num_pending": int((tiers == Tier.PENDING).sum()),
            "num_running": len(self.scheduler.running),
            "num_waiting": sum(len(queue) for queue in view.waiting_queues(self.scheduler)),
            "free_kv_blocks": view.free_units(self.scheduler, self._per_unit),
            "num_kv_blocks": self.limits.num_kv_blocks,
            "headroom_tokens_per_s": headroom,
            "drain_s": backlog / headroom if headroom else 0.0,
            "plan_s": self.plan_times.quantiles(),
            "overhead_s": self.overheads.quantiles(),
            "planner_faults": dict(self.faults.counts),
            "divergences": dict(self.divergences),
            "best_effort_preemptions": self.num_preempted,
            "steps": self.num_steps,
            "margin_coverage": self.learner.coverage,
            "model_error": {"mape": self.learner.mape},
            "invalid": self.tracker.num_invalid,
            "would_be": dict(self.promises.would_be),
            "draft_lengths": {} if self.drafts is None else dict(self.drafts.lengths),
            "acceptance": {} if self.drafts is None else self.drafts.acceptance,
            "step_downs": self.safety.num_step_downs,
        }

    def _facts(self) -> dict[str, Any]:
        """Return what may change while no step runs."""
        return {
            "effective_mode": self.effective_mode,
            "reason": self.mode_reason,
            "profile": self.learner.summary,
        }

    # -- the thread -------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """Do what is slow or must happen without traffic: profile, end-of-thinking token, files, heartbeat."""
        try:
            self.tracker.thinking_end = view.thinking_end(self.scheduler, self.settings.thinking_end)
        except Exception as error:  # noqa: BLE001 - thinking is then graded as answer
            logger.info("SLO scheduler: no end-of-thinking token known (%s)", error)
        while not self._stop.wait(TICK_S):
            try:
                self._tick()
            except Exception as error:  # noqa: BLE001 - the thread must go on
                self.faults.add("housekeeping", error)

    def _tick(self) -> None:
        self.learner.poll()
        self.recorder.flush()
        self.outbox.beat(self.clock.peek())
        now = time.monotonic()
        if self.settings.report_s and now >= self._report_at:
            self._report_at = now + self.settings.report_s
            tally = self.promises.tally
            if tally.is_news:
                for line in tally.text(self.outbox.snapshot).splitlines():
                    logger.info("%s", line)
