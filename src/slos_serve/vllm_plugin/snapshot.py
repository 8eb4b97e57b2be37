"""What a replica says about itself: the snapshot that travels with what is published."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from slos_serve.core.routing.snapshots import snapshot_of
from slos_serve.core.types import ReplicaState, Status, Tier
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.runtime import SloRuntime


def snapshot(runtime: SloRuntime) -> dict[str, Any]:
    """Return the state of the replica as the channel carries it."""
    rows = runtime.tracker.table.rows
    tiers = rows["tier"]
    plan = runtime.last_plan
    headroom = plan.headroom_tokens_per_s if plan is not None else None
    backlog = float(rows["num_prompt_tokens"][rows["status"] == Status.WAITING].sum())
    drafts = runtime.drafts
    return {
        **facts(runtime),
        "num_promised": int((tiers == Tier.PROMISED).sum()),
        "num_best_effort": int((tiers == Tier.BEST_EFFORT).sum()),
        "num_pending": int((tiers == Tier.PENDING).sum()),
        "num_running": len(runtime.scheduler.running),
        "num_waiting": sum(len(queue) for queue in view.waiting_queues(runtime.scheduler)),
        "free_kv_blocks": view.free_units(runtime.scheduler, runtime.per_unit),
        "num_kv_blocks": runtime.limits.num_kv_blocks,
        "headroom_tokens_per_s": headroom,
        "drain_s": backlog / headroom if headroom else 0.0,
        "plan_s": runtime.plan_times.quantiles(),
        "overhead_s": runtime.overheads.quantiles(),
        "delay_s": runtime.delays.quantiles(),
        "device_time_lost": runtime.safety.time_share,
        "plans": runtime.num_plans,
        "clock_error_s": runtime.clock_errors.quantiles(),
        "planner_faults": dict(runtime.faults.counts),
        "divergences": dict(runtime.divergences),
        "best_effort_preemptions": runtime.num_preempted,
        "expired": runtime.num_expired,
        "steps": runtime.num_steps,
        "margin_coverage": runtime.learner.coverage,
        "model_error": {"mape": runtime.learner.mape},
        "invalid": runtime.tracker.num_invalid,
        "would_be": dict(sum(runtime.promises.would_be.values(), Counter())),
        "would_be_by_class": {name: dict(words) for name, words in runtime.promises.would_be.items()},
        "outrun": runtime.promises.num_outrun,
        "draft_lengths": {} if drafts is None else dict(drafts.lengths),
        "acceptance": {} if drafts is None else drafts.acceptance,
        "step_downs": runtime.safety.num_step_downs,
        **({"replica": replica(runtime)} if runtime.settings.publish_replica else {}),
    }


def replica(runtime: SloRuntime) -> dict[str, Any] | None:
    """Return what a router plans with, None before there is a performance model. The router knows the name."""
    model, table, plan = runtime.learner.next_model, runtime.tracker.table, runtime.last_plan
    if model is None:
        return None
    drafts = runtime.drafts
    state = ReplicaState(
        now_s=runtime.clock.peek(),
        requests=table,
        num_free_kv_blocks=view.free_units(runtime.scheduler, runtime.per_unit),
        limits=runtime.limits,
        perf_model=model,
        **({} if drafts is None else drafts.state(table.classes, runtime.limits.max_draft_length)),
    )
    document = snapshot_of(
        state,
        replica_id="-",
        headroom_tokens_per_s=(plan.headroom_tokens_per_s if plan is not None else None) or 0.0,
        step_s=plan.batch.predicted_s if plan is not None and len(table) else 0.0,  # idle: no step is under way
        planner=runtime.planner,
        mode=runtime.effective_mode,
    ).to_json()
    for row in document["prefills"]:
        live = runtime.tracker.live.get(row[0])
        row[0] = (live.slo_id if live is not None else None) or row[0]  # as the router calls it
    return document


def facts(runtime: SloRuntime) -> dict[str, Any]:
    """Return what may change while no step runs; safe on any thread."""
    return {
        **runtime.modes.to_json(),
        "effective_mode": runtime.effective_mode,
        "reason": runtime.mode_reason,
        "paused": runtime.pauses.kind,
        "profile": runtime.learner.summary,
        **({} if runtime.device is None else {"device": runtime.device}),
    }
