"""What a replica says about itself: the snapshot that travels with what is published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slos_serve.core.routing.snapshots import snapshot_of
from slos_serve.core.types import ReplicaState, RequestTable, Status, Tier
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.parts import Parts


def capture(parts: Parts) -> Callable[[], dict[str, Any]]:
    """Read what a step may change; return what makes the snapshot of it, which may run on any thread."""
    table = parts.tracker.table.copy()
    plan, drafts = parts.last_plan, parts.drafts
    headroom = plan.headroom_tokens_per_s if plan is not None else None
    num_rowless = len(parts.tracker.rowless)
    told: dict[str, Any] = {
        "num_running": len(parts.scheduler.running),
        "num_waiting": sum(len(queue) for queue in view.waiting_queues(parts.scheduler)),
        "free_kv_blocks": view.free_units(parts.scheduler, parts.per_unit),
        "num_kv_blocks": parts.limits.num_kv_blocks,
        "headroom_tokens_per_s": headroom,
        "device_time_lost": parts.safety.time_share,
        "plans": parts.num_plans,
        "planner_faults": dict(parts.faults.counts),
        "divergences": dict(parts.divergences),
        "best_effort_preemptions": parts.num_preempted,
        "expired": parts.num_expired,
        "steps": parts.num_steps,
        "margin_coverage": parts.learner.coverage,
        "model_error": {"mape": parts.learner.mape},
        "invalid": parts.tracker.asked.num_invalid,
        "would_be_by_class": {name: dict(words) for name, words in parts.promises.would_be.items()},
        "outrun": parts.promises.num_outrun,
        "draft_lengths": {} if drafts is None else dict(drafts.lengths),
        "acceptance": {} if drafts is None else drafts.acceptance,
        "step_downs": parts.safety.num_step_downs,
    }
    make_replica = _capture_replica(parts, table) if parts.settings.publish_replica else None

    def make() -> dict[str, Any]:
        rows = table.rows
        tiers = rows["tier"]
        backlog = float(rows["num_prompt_tokens"][rows["status"] == Status.WAITING].sum())
        return {
            **parts.standing.facts(),
            **told,
            "num_promised": int((tiers == Tier.PROMISED).sum()),
            "num_best_effort": int((tiers == Tier.BEST_EFFORT).sum()) + num_rowless,
            "num_pending": int((tiers == Tier.PENDING).sum()),
            "drain_s": backlog / headroom if headroom else 0.0,
            "plan_s": parts.plan_times.quantiles(),
            "overhead_s": parts.ended.overheads.quantiles(),
            "delay_s": parts.ended.delays.quantiles(),
            "clock_error_s": parts.ended.clock_errors.quantiles(),
            "would_be": dict(sum(map(Counter, told["would_be_by_class"].values()), Counter())),
            **({} if make_replica is None else {"replica": make_replica()}),
        }

    return make


def replica(parts: Parts) -> dict[str, Any] | None:
    """Return what a router plans with, None before there is a performance model. The router knows the name."""
    return _capture_replica(parts, parts.tracker.table)()


def _capture_replica(parts: Parts, table: RequestTable) -> Callable[[], dict[str, Any] | None]:
    """Read what `replica` is made of, but for the rows of the `table`, and return what makes it."""
    model, plan = parts.learner.next_model, parts.last_plan
    if model is None:
        return lambda: None
    drafts, live, mode, planner = parts.drafts, parts.tracker.live, parts.standing.effective_mode, parts.planner
    state = ReplicaState(
        now_s=parts.clock.peek(),
        requests=table,
        num_free_kv_blocks=view.free_units(parts.scheduler, parts.per_unit),
        limits=parts.limits,
        perf_model=model,
        **({} if drafts is None else drafts.state(table.classes, parts.limits.max_draft_length)),
    )
    headroom = (plan.headroom_tokens_per_s if plan is not None else None) or 0.0
    step_s = plan.batch.predicted_s if plan is not None and len(table) else 0.0  # idle: no step is under way

    def make() -> dict[str, Any]:
        summary = snapshot_of(
            state, replica_id="-", headroom_tokens_per_s=headroom, step_s=step_s, planner=planner, mode=mode
        )
        document = summary.to_json()
        for row in document["prefills"]:
            one = live.get(row[0])
            row[0] = (one.slo_id if one is not None else None) or row[0]  # as the router calls it
        return document

    return make
