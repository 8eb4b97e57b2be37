"""What the plug-in is made of for one scheduler: made once, and read by whatever plans, learns and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slos_serve.records.writer import StepRecorder
from slos_serve.vllm_plugin.ended import Ended
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.clock import Clock
from slos_serve.vllm_plugin.engine.expiry import Expiry
from slos_serve.vllm_plugin.engine.tracking import Tracker
from slos_serve.vllm_plugin.explaining import Explainer
from slos_serve.vllm_plugin.learning.drafting import DraftWatch
from slos_serve.vllm_plugin.learning.learner import Learner
from slos_serve.vllm_plugin.learning.learnt import Learnt
from slos_serve.vllm_plugin.pipeline import Pipeline
from slos_serve.vllm_plugin.progress import TokenTimes
from slos_serve.vllm_plugin.promises import Promises
from slos_serve.vllm_plugin.report import Ring
from slos_serve.vllm_plugin.safety.faults import Faults
from slos_serve.vllm_plugin.safety.rules import StepDown
from slos_serve.vllm_plugin.safety.watchdog import Watchdog
from slos_serve.vllm_plugin.safety.work_limit import WorkLimit
from slos_serve.vllm_plugin.settings import Settings
from slos_serve.vllm_plugin.standing import Standing
from slos_serve.vllm_plugin.wire.channel import Channel, instance_name
from slos_serve.vllm_plugin.wire.outbox import Outbox

if TYPE_CHECKING:
    from slos_serve.core.types import Plan


class Parts:
    """Everything that outlives a step. `num_...`, `divergences` and `plan_times` (s) count what has happened.

    `capture` makes the snapshots that the outbox sends, after `refresh`.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        is_async: bool,
        capture: Callable[[Parts], Callable[[], dict[str, Any]]],
        refresh: Callable[[], None],
    ) -> None:
        config = scheduler.vllm_config
        additional = config.additional_config
        document = additional.get("slo") if isinstance(additional, dict) else None
        index = int(config.parallel_config.data_parallel_index)
        self.scheduler = scheduler
        self.per_unit = view.blocks_per_unit(scheduler)
        self.settings = settings = Settings.parse(document)
        self.work_limit = WorkLimit()
        self.limits = view.limits(scheduler, guard_s=settings.guard_s, work_limit=self.work_limit.value)
        self.clock, self.pipeline = Clock(), Pipeline()
        self.learner = Learner(path=settings.profile, key=settings.profile_key)
        self.safety = StepDown(settings.safety)
        self.standing = Standing(
            scheduler, settings, self.learner, self.safety, is_given=document is not None, is_async=is_async
        )
        self.watchdog = Watchdog(settings.safety.max_plan_s)
        self.faults = Faults(settings.fault_dir)
        self.tracker = Tracker(
            scheduler,
            settings.config,
            self.clock,
            self.standing.sets_aside,
            is_async=is_async,
            edge_only=settings.edge,
        )
        self.tracker.hits.is_used = settings.use_prefix_hits
        self.drafts = DraftWatch() if self.limits.max_draft_length else None
        self.learnt = Learnt(settings.state_path(index), self.learner, self.tracker, self.drafts)
        self.recorder = StepRecorder(settings.record_path(index), max_bytes=int(settings.record_max_mb * 1e6))
        self.ended = Ended(self.learner, self.safety, self.work_limit, self.recorder)
        self.expiry = Expiry()
        self.channel = Channel(instance_name(config), index, settings.channel_dir)
        if self.channel.problem:  # verdicts reach nobody, so nothing is promised
            self.standing.differences.append(self.channel.problem)
        self.outbox = Outbox(
            self.channel.publisher,
            index,
            lambda: capture(self),
            self.standing.facts,
            refresh=refresh,
            failed=lambda error: self.faults.add("publish", error),
        )
        self.progress, self.explainer = TokenTimes(), Explainer(settings.make_planner)
        self.promises = Promises(
            self.tracker,
            self.learner,
            self.limits,
            self.safety,
            outbox=self.outbox,
            faults=self.faults,
            progress=self.progress,
        )
        self.planner = settings.make_planner()
        self.last_plan: Plan | None = None
        self.num_steps = self.num_plans = self.num_preempted = self.num_expired = 0
        self.divergences: Counter[str] = Counter()
        self.plan_times = Ring()
