"""What happens around each engine step: refresh, plan, steer; then grade, learn, publish.

Nothing here may stop the engine. Every entry point that vLLM's scheduler calls catches what our code
raises; that step then runs in vLLM's own order, the fault is counted by kind, and the first ones are
logged with the planner's whole input in a file that replays them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.core import deadlines
from slos_serve.core.types import Plan, ReplicaState, Status, Tier
from slos_serve.vllm_plugin import view
from slos_serve.vllm_plugin.channel import Publisher, address
from slos_serve.vllm_plugin.clock import Clock
from slos_serve.vllm_plugin.drafting import DraftWatch
from slos_serve.vllm_plugin.learning import Learner
from slos_serve.vllm_plugin.record import BatchShape, StepRecorder
from slos_serve.vllm_plugin.report import Ring, Tally
from slos_serve.vllm_plugin.safety import StepDown
from slos_serve.vllm_plugin.settings import Settings
from slos_serve.vllm_plugin.shape import batch_shape
from slos_serve.vllm_plugin.steer import Steering
from slos_serve.vllm_plugin.tracking import Live, Tracker
from slos_serve.vllm_plugin.warmup import warm_up

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.slos_serve")

STARVED_STEPS = 4  # empty plans in a row, with work present, before vLLM's own order runs once
MAX_DUMPS = 5
PUBLISH_EVERY_S = 0.25
HEARTBEAT_S = 1.0
TICK_S = 0.5


@dataclass(slots=True)
class InFlight:
    """One scheduled batch on its way through the engine. `ends_at_s` is expected, on the wall clock."""

    output: SchedulerOutput
    shape: BatchShape
    scheduled: float  # perf_counter
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
        self.mode = settings.resolved_mode(given=document is not None, is_cpu=_is_cpu())
        self.differences = view.probe()
        if not self.differences:
            self.differences = [f"{name} cannot be steered" for name in view.unsupported(scheduler)]
        self.clock = Clock()
        self.tracker = Tracker(scheduler, settings.config, self.clock, is_async=is_async)
        self.learner = Learner(path=settings.profile, key=settings.profile_key)
        self.recorder = StepRecorder(settings.record)
        self.safety = StepDown(settings.safety)
        self.tally = Tally()
        self.limits = view.limits(scheduler, guard_s=settings.guard_s, work_limit=100_000)
        self.drafts = DraftWatch() if self.limits.max_draft_length else None
        self.planner = settings.make_planner()
        self.faults: Counter[str] = Counter()
        self._warm_up()
        self.divergences: Counter[str] = Counter()
        self.would_be: Counter[str] = Counter()
        self.num_steps = 0
        self.num_preempted = 0
        self.plan_times = Ring()
        self.overheads = Ring()
        self.last_plan: Plan | None = None
        self._state: ReplicaState | None = None
        self._steering: Steering | None = None
        self._phase = ""
        self._overhead = 0.0
        self._was_enforcing = False
        self._num_empty = 0
        self._num_dumps = 0
        self._in_flight: deque[InFlight] = deque()
        self._done: tuple[InFlight, float] | None = None
        self._last_update = 0.0
        self._is_updating = False
        self._freed: list[Request] = []
        self._verdicts: list[dict[str, Any]] = []
        self._finished: list[dict[str, Any]] = []
        self._samples: dict[str, list[float]] = {"plan_s": [], "step_error_s": []}
        self._engine_index = int(config.parallel_config.data_parallel_index)
        self._snapshot: dict[str, Any] = {}
        self._snapshot_at = 0.0
        self._sent_at = 0.0
        self._per_unit = view.blocks_per_unit(scheduler)
        self.publisher = Publisher(address(config.instance_id, self._engine_index))
        self._stop = threading.Event()
        self._report_at = time.monotonic() + settings.report_s
        self._thread = threading.Thread(target=self._keep_house, name="slos-serve", daemon=True)
        self._say_hello()
        self._thread.start()

    def _say_hello(self) -> None:
        logger.info("SLO scheduler: mode %s, effective %s %s", self.mode, self.effective_mode, self.mode_reason)
        if self.differences:
            logger.warning("SLO scheduler only observes: %s", "; ".join(self.differences))

    def _warm_up(self) -> None:
        try:
            took = warm_up(self.planner, self.limits)
        except Exception as error:  # noqa: BLE001 - a planner that fails is found out when it matters
            self.faults["warm-up"] += 1
            logger.warning("SLO scheduler: the planner fails on made-up requests", exc_info=error)
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
                self._first_verdict(live)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._fault("add", error)

    def before_schedule(self) -> dict[str, int] | None:
        """Plan the next step; return its caps, None where vLLM's own order is to run."""
        started = time.perf_counter()
        self._steering = self._state = self.last_plan = None
        self._phase = "sync"
        caps = None
        try:
            steering = self._plan_step()
            if steering is not None:
                steering.begin()
                self._steering, caps = steering, steering.caps
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._fault(self._phase, error)
            self.safety.add_plan(faulty=True)
        self._overhead = time.perf_counter() - started
        return caps

    def end_steering(self) -> None:
        """Restore vLLM's queues after a steered `schedule()`."""
        if self._steering is not None:
            self._steering.finish()

    def after_schedule(self, output: SchedulerOutput) -> None:
        """Note what was really scheduled."""
        started = time.perf_counter()
        try:
            self._note_scheduled(output, started)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._fault("scheduled", error)

    def before_update(self, output: SchedulerOutput) -> None:
        """Take the time of the batch whose output has come."""
        now = time.perf_counter()
        self._is_updating = True
        self._done = None
        while self._in_flight:
            entry = self._in_flight.popleft()
            if entry.output is output:
                self._done = (entry, now - max(entry.scheduled, self._last_update))
                break
        self._last_update = now

    def on_free(self, request: Request) -> None:
        """Note that a request is finished, on whatever path."""
        self._freed.append(request)
        if not self._is_updating:
            try:
                self._finish_freed(self.clock.now())
            except Exception as error:  # noqa: BLE001 - the engine must go on
                self._fault("finish", error)

    def after_update(self, outputs: dict[int, Any] | None) -> None:
        """Grade the output, learn from the step, publish."""
        started = time.perf_counter()
        try:
            self._note_update(outputs or {}, started)
        except Exception as error:  # noqa: BLE001 - the engine must go on
            self._fault("update", error)
        finally:
            self._is_updating = False

    def shutdown(self) -> None:
        """Stop the thread, write what is buffered, close the channel."""
        self._stop.set()
        self._thread.join(timeout=5)
        self.recorder.flush()
        self.publisher.close()

    # -- before a step ----------------------------------------------------------------------------

    def _plan_step(self) -> Steering | None:
        self.num_steps += 1
        if self.learner.take_new():
            self._start_model()
        now = self.clock.now()
        tracker = self.tracker
        tracker.sync()
        model = self.learner.model
        if model is None or not (tracker.num_with_slo or (self.settings.always_plan and len(tracker.table))):
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
            limits=self.limits,
            perf_model=model,
            **self._draft_state(),
        )
        self._phase = "plan"
        started = time.perf_counter()
        plan = self.planner.plan(state)
        took = time.perf_counter() - started
        self.plan_times.add(took)
        self._samples["plan_s"].append(round(took, 7))
        self._phase = "apply"
        if plan.verdicts:
            self._apply_verdicts(plan, now, enforcing=enforcing)
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
                self.faults["starved"] += 1
                return None
        steering = Steering(
            self.scheduler,
            batch,
            waiting=tracker.runnable_waiting(),
            stock=tracker.stock,
            next_draft_length=self._note_drafts(plan),
        )
        for request in steering.preempted:
            self.num_preempted += 1
            tracker.note_preempted(request.request_id)
        return steering

    def _draft_state(self) -> dict[str, Any]:
        drafts = self.drafts
        if drafts is None:
            return {}
        classes = self.tracker.table.classes
        default = self.limits.max_draft_length
        lengths = {name: drafts.lengths.get(name, default) for name in classes}
        return {"acceptance": drafts.known(classes), "draft_lengths": lengths}

    def _note_drafts(self, plan: Plan) -> int | None:
        """Return the draft length to make for the next step: the longest that this plan's decodes verify."""
        if self.drafts is None:
            return None
        table, batch = self.tracker.table, plan.batch
        index = [table.index(request_id) for request_id in batch.request_ids]
        classes = table.rows["class_index"][index].tolist()
        produced = table.rows["num_output_tokens"][index].tolist()
        lengths: dict[str, int] = {}
        for i, count in enumerate(batch.draft_lengths.tolist()):
            if produced[i]:
                name = table.classes[classes[i]]
                lengths[name] = max(count, lengths.get(name, 0))
        self.drafts.note_plan(lengths)
        return self.drafts.next_length

    def _start_model(self) -> None:
        """Pin the reference and let slowdown SLOs mean something."""
        reference = self.learner.reference
        assert reference is not None
        # graders read the same document: the budget it was measured with defines the reference
        budget = int((self.learner.profile or {}).get("max_num_batched_tokens") or self.limits.max_num_batched_tokens)
        for live in self.tracker.set_reference(lambda tokens: reference.prefill_seconds(tokens, budget)):
            live.verdict = ""
        logger.info("SLO scheduler: performance model ready, effective mode %s", self.effective_mode)

    # -- verdicts ---------------------------------------------------------------------------------

    def _first_verdict(self, live: Live) -> None:
        """Say at once what no plan can change."""
        if not live.has_slo and live.is_resolved:
            live.verdict = "best-effort"
            self._tell(live, "best-effort", live.reason)
        elif not self.is_enforcing:
            self._tell(live, "best-effort", "observe")

    def _apply_verdicts(self, plan: Plan, now: float, *, enforcing: bool) -> None:
        table = self.tracker.table
        tiers = table.rows["tier"]
        for verdict in plan.verdicts:
            tiers[table.index(verdict.request_id)] = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
            live = self.tracker.live[verdict.request_id]
            if not enforcing:
                word = "promised" if verdict.promised else "best-effort"
                if live.would_be != word:
                    live.would_be = word
                    self.would_be[word] += 1
                continue
            if verdict.promised:
                if live.was_promised:
                    continue
                word = "promoted" if live.verdict == "best-effort" else "promised"
                live.was_promised = True
                if not live.num_output_tokens:
                    live.is_declined = False
                    if live.slo.ttft_s is not None:
                        live.promise_lead_s = live.arrival_s + live.slo.ttft_s - now
            else:
                word = "best-effort"
                if live.verdict == word:
                    continue
                live.is_declined = not live.was_promised
            live.verdict, live.reason = word, verdict.reason
            self._tell(live, word, verdict.reason, verdict.slack_s, verdict.predicted_ttft_s)

    def _tell(
        self, live: Live, verdict: str, reason: str, slack_s: float = 0.0, predicted_ttft_s: float = math.inf
    ) -> None:
        self._verdicts.append(
            {
                "slo_id": live.slo_id,
                "request_id": live.request_id,
                "slo_class": live.slo_class,
                "tenant": live.tenant,
                "verdict": verdict,
                "reason": reason,
                "slack_ms": round(slack_s * 1000, 3),
                "predicted_ttft_ms": round(predicted_ttft_s * 1000, 3) if math.isfinite(predicted_ttft_s) else None,
            }
        )

    # -- after scheduling -------------------------------------------------------------------------

    def _note_scheduled(self, output: SchedulerOutput, started: float) -> None:
        if not output.num_scheduled_tokens:
            return
        shape = batch_shape(self.tracker, output)
        predicted = self.learner.predict(shape)
        if self._steering is not None:
            self._compare(output)
        plan = self.last_plan
        begins = self.clock.now()
        if self._in_flight:
            begins = max(begins, self._in_flight[-1].ends_at_s)
        planned = plan.batch.predicted_s if plan is not None else None
        finished = time.perf_counter()
        self._in_flight.append(
            InFlight(
                output=output,
                shape=shape,
                scheduled=finished,
                ends_at_s=begins + (predicted or 0.0),
                planned_s=planned,
                predicted_s=predicted,
                overhead_s=self._overhead + finished - started,
            )
        )

    def _compare(self, output: SchedulerOutput) -> None:
        """Count how the engine's batch differs from the planned one."""
        assert self._steering is not None
        expected, found = self._steering.expected, output.num_scheduled_tokens
        if expected == found:
            return
        caps = self._steering.caps
        for request_id, tokens in expected.items():
            scheduled = found.get(request_id, 0)
            if tokens <= scheduled <= caps[request_id]:
                continue
            self.divergences["missing" if not scheduled else "short" if scheduled < tokens else "long"] += 1
        stock = self.tracker.stock
        for request_id in found:
            if request_id not in expected and request_id not in stock:
                self.divergences["extra"] += 1

    # -- after a step -----------------------------------------------------------------------------

    def _note_update(self, outputs: dict[int, Any], started: float) -> None:
        now = self.clock.now()
        for batch in outputs.values():
            if self.drafts is not None and self._done is not None:
                scheduled = self._done[0].output.scheduled_spec_decode_tokens
                self.drafts.observe_outputs(self.tracker.live, scheduled, batch.outputs)
            self.tracker.take_outputs(batch.outputs, now)
        if self._freed:
            self._finish_freed(now, outputs)
        if self._done is not None:
            entry, seconds = self._done
            self._done = None
            overhead = entry.overhead_s + time.perf_counter() - started
            self.overheads.add(overhead)
            self._learn(entry, seconds, overhead, now)
        if self.safety.check(now):
            self._alert()
        self._publish(now)

    def _learn(self, entry: InFlight, seconds: float, overhead: float, now: float) -> None:
        self.learner.observe(entry.shape, seconds, entry.predicted_s)
        if entry.predicted_s is not None:
            self._samples["step_error_s"].append(round(seconds - entry.predicted_s, 7))
        self.recorder.add(self.num_steps, now, entry.shape, seconds, entry.planned_s, entry.predicted_s)
        self.safety.add_step(seconds, overhead)
        self.safety.set_coverage(self.learner.coverage, int(self.learner.num_errors))

    def _alert(self) -> None:
        if self.safety.is_down:
            logger.error("ALERT: SLO scheduling stepped down to vLLM's own order: %s", self.safety.reason)
        else:
            logger.warning("SLO scheduling resumed")

    def _finish_freed(self, now: float, outputs: dict[int, Any] | None = None) -> None:
        freed, self._freed = self._freed, []
        ends: dict[str, str] = {}
        for request in freed:
            live = self.tracker.remove(request.request_id)
            if live is not None:
                ends[request.request_id] = self._grade(live, now)
        if outputs and ends:
            _set_stop_reasons(outputs, ends)

    def _grade(self, live: Live, now: float) -> str:
        """Grade a finished request, tell about it, and return what its final chunk says, "" for nothing."""
        how = view.how_it_ended(live.request, live.num_output_tokens)
        grade = live.grade(now)
        outcome = deadlines.outcome(
            grade, has_slo=live.has_slo, promised=not live.is_declined, cancelled=how == "cancelled", failed=how == "failed"
        )
        if how == "finished":
            self.tracker.lengths.observe(live.slo_class, live.request.num_prompt_tokens, live.num_output_tokens)
        self.tally.add(live.slo_class, outcome, promised=live.was_promised)
        if live.was_promised and outcome in ("met", "missed"):
            self.safety.add_promise(outcome == "met")
        first, last, count = live.first_token_s, live.last_token_s, live.num_output_tokens
        self._finished.append(
            {
                "slo_id": live.slo_id,
                "request_id": live.request_id,
                "slo_class": live.slo_class,
                "tenant": live.tenant,
                "outcome": outcome,
                "promised": live.was_promised,
                "stages": dict(grade.stages) if grade is not None else {},
                "ttft_ms": round((first - live.arrival_s) * 1000, 3) if count else None,
                "tpot_ms": round((last - first) / (count - 1) * 1000, 3) if count > 1 else None,
                "num_prompt_tokens": live.request.num_prompt_tokens,
                "num_output_tokens": count,
                "promise_lead_ms": None if live.promise_lead_s is None else round(live.promise_lead_s * 1000, 3),
            }
        )
        if live.slo_id is not None or not live.is_asked_for:
            return ""
        verdict = live.verdict or ("observe" if not self.is_enforcing else "pending")
        return f"slo:{verdict}:{live.reason if outcome == 'none' else outcome}"

    # -- publishing -------------------------------------------------------------------------------

    def _publish(self, now: float) -> None:
        is_due = now - self._snapshot_at >= PUBLISH_EVERY_S or not self.tracker.live
        if is_due:
            self._snapshot, self._snapshot_at = self.snapshot(), now
        if not (is_due or self._verdicts or self._finished):
            return
        message = self._message(now, verdicts=self._verdicts, finished=self._finished, **self._samples)
        self._verdicts, self._finished = [], []
        self._samples = {"plan_s": [], "step_error_s": []}
        self._sent_at = time.monotonic()
        self.publisher.send(message)

    def _message(self, now: float, **parts: Any) -> dict[str, Any]:
        snapshot = {**(self._snapshot or self.snapshot()), **self._mode_facts()}
        return {"v": 1, "engine": self._engine_index, "t": now, "verdicts": [], "finished": [], **parts, "snapshot": snapshot}

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the replica as the channel carries it."""
        table = self.tracker.table
        rows = table.rows
        tiers, status = rows["tier"], rows["status"]
        waiting = status == Status.WAITING
        plan = self.last_plan
        headroom = plan.headroom_tokens_per_s if plan is not None else None
        backlog = float(rows["num_prompt_tokens"][waiting].sum())
        return {
            "mode": self.mode,
            **self._mode_facts(),
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
            "planner_faults": dict(self.faults),
            "divergences": dict(self.divergences),
            "best_effort_preemptions": self.num_preempted,
            "steps": self.num_steps,
            "margin_coverage": self.learner.coverage,
            "model_error": {"mape": self.learner.mape},
            "invalid": sum(self.tracker.invalid.values()),
            "would_be": dict(self.would_be),
            "draft_lengths": dict(self.drafts.lengths) if self.drafts is not None else {},
            "acceptance": self.drafts.acceptance if self.drafts is not None else {},
            "step_downs": self.safety.num_step_downs,
        }

    def _mode_facts(self) -> dict[str, Any]:
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
                self._fault("housekeeping", error)

    def _tick(self) -> None:
        self.learner.poll()
        now = time.monotonic()
        self.recorder.flush()
        if now - self._sent_at > HEARTBEAT_S:
            self._sent_at = now
            self.publisher.send(self._message(self.clock.peek()))
        if now >= self._report_at and self.settings.report_s:
            self._report_at = now + self.settings.report_s
            if self.tally.is_news:
                logger.info("%s", self.tally.text({**self._snapshot, **self._mode_facts()}))

    # -- faults -----------------------------------------------------------------------------------

    def _fault(self, kind: str, error: Exception) -> None:
        """Count a fault of ours; log and dump the first of each kind."""
        self.faults[kind] += 1
        if self.faults[kind] > 1 or self._num_dumps >= MAX_DUMPS:
            return
        self._num_dumps += 1
        where = self._dump(kind)
        logger.error(
            "SLO scheduler fault (%s): this step runs in vLLM's own order; state: %s", kind, where, exc_info=error
        )

    def _dump(self, kind: str) -> str:
        """Write the state that the planner was given; returns the file, or why there is none."""
        if self._state is None:
            return "none"
        folder = self.settings.fault_dir or Path(tempfile.gettempdir())
        path = folder / f"slos-serve-fault-{os.getpid()}-{self.num_steps}-{kind}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._state.to_json()), encoding="utf-8")
        except Exception as error:  # noqa: BLE001 - a dump is a convenience
            return f"not written ({error})"
        return str(path)


def _set_stop_reasons(outputs: dict[int, Any], ends: dict[str, str]) -> None:
    """Say the verdict and the outcome on the final chunk where nothing else is said."""
    for batch in outputs.values():
        for output in batch.outputs:
            text = ends.get(output.request_id)
            if text and output.finish_reason is not None and output.stop_reason is None:
                output.stop_reason = text


def _is_cpu() -> bool:
    from vllm.platforms import current_platform  # noqa: PLC0415 - detecting the platform is not free

    return bool(current_platform.is_cpu())
