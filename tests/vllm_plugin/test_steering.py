"""Plans are carried out to the token, and vLLM's queues look untouched afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.types import BatchPlan, Plan, Status
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler


class RandomPlanner:
    """Random subsets, orders, chunks, draft lengths and preemptions that the engine can hold."""

    def __init__(self, seed: int, *, preempt: float = 0.05, drafts: int = 0, heeds_memory: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self.preempt = preempt
        self.drafts = drafts
        self.heeds_memory = heeds_memory
        self.plans: list[Plan] = []

    def plan(self, state):
        rows, limits, rng = state.requests.rows, state.limits, self.rng
        ids = state.requests.request_ids
        running = rows["status"] == Status.RUNNING
        preempted = [i for i in np.flatnonzero(running).tolist() if rng.random() < self.preempt]
        budget = limits.max_num_batched_tokens
        seats = limits.max_num_seqs - int(running.sum())
        free = state.num_free_kv_blocks if self.heeds_memory else 10**9
        order, tokens = [], []
        # vLLM serves what runs first, so running rows come first in an exact plan
        sequence = (
            rng.permutation(np.flatnonzero(running)).tolist() + rng.permutation(np.flatnonzero(~running)).tolist()
        )
        for i in sequence:
            if i in preempted or rng.random() < 0.3 or budget <= 0:
                continue
            computed = int(rows["num_computed_tokens"][i])
            total = int(rows["num_prompt_tokens"][i] + rows["num_output_tokens"][i])
            start = computed if running[i] else int(rows["num_cached_tokens"][i])
            count = int(min(total - start, budget, rng.integers(1, 97)))
            ends_at = start + count + self.drafts
            blocks = -(-max(ends_at, 0 if running[i] else total) // limits.block_size) + bool(self.drafts)
            extra = blocks - int(rows["num_kv_blocks"][i])
            if extra > free or (not running[i] and seats <= 0):
                continue
            free -= max(0, extra)
            seats -= not running[i]
            budget -= count + self.drafts
            order.append(i)
            tokens.append(count)
        lengths = rng.integers(0, self.drafts + 1, len(order)) if self.drafts else np.zeros(len(order), np.int64)
        plan = Plan(
            batch=BatchPlan(
                request_ids=[ids[i] for i in order],
                num_tokens=np.array(tokens, np.int64),
                draft_lengths=lengths,
                preempted=[ids[i] for i in preempted],
            )
        )
        self.plans.append(plan)
        return plan


def feed(scheduler, count: int, rng: np.random.Generator, **options) -> list[str]:
    names = [f"r{i}" for i in range(count)]
    for i, name in enumerate(names):
        scheduler.add_request(
            make_request(
                name,
                prompt_tokens=int(rng.integers(1, 200)),
                max_tokens=int(rng.integers(1, 24)),
                args={"slo_class": "chat"} if i % 2 else None,
                **options,
            )
        )
    return names


def check_clean(scheduler, engine, names) -> None:
    assert set(engine.finished) == set(names)
    slo = scheduler.slo
    assert not slo.tracker.live
    assert not len(slo.tracker.table)
    assert not slo.tracker.stock
    assert not slo.tracker.blocked
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert not getattr(scheduler, "skipped_waiting", None)
    assert not getattr(scheduler, "kv_holding_waiting", None)
    assert not getattr(scheduler, "deferred_waiting", None)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == slo.limits.num_kv_blocks
    assert not slo.faults.counts, slo.faults.counts


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_is_the_planned_one(build, seed, policy) -> None:
    planner = RandomPlanner(seed)
    scheduler = build(planner, policy=policy)
    engine = Engine(scheduler)
    names = feed(scheduler, 40, np.random.default_rng(seed))
    while scheduler.has_unfinished_requests():
        output = engine.step()
        batch = planner.plans[-1].batch
        if not scheduler.slo._next._num_empty and len(batch.request_ids):
            assert output.num_scheduled_tokens == dict(zip(batch.request_ids, batch.num_tokens.tolist(), strict=True))
        assert output.preempted_req_ids >= set(batch.preempted)
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)
    assert not scheduler.slo.divergences
    assert sum(len(plan.batch.preempted) for plan in planner.plans) > 0


def limits_on_prefill(scheduler) -> tuple[int, int]:
    """Return vLLM's threshold for long prompts and its cadence of prefills, which older ones have not."""
    return scheduler.scheduler_config.long_prefill_token_threshold, getattr(scheduler, "local_prefill_interval", 1)


@pytest.mark.parametrize("seed", range(2))
def test_vllms_own_limits_on_prefill_cut_no_planned_share_and_hold_again_afterwards(build, seed) -> None:
    planner = RandomPlanner(seed)
    scheduler = build(planner)
    scheduler.scheduler_config.long_prefill_token_threshold = 8
    if hasattr(scheduler, "local_prefill_interval"):
        scheduler.local_prefill_interval = 4
    before = limits_on_prefill(scheduler)
    engine = Engine(scheduler)
    names = feed(scheduler, 20, np.random.default_rng(seed))
    while scheduler.has_unfinished_requests():
        engine.step()
        assert limits_on_prefill(scheduler) == before
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)
    assert not scheduler.slo.divergences
    assert max(max(batch.values(), default=0) for batch in engine.batches) > 8


def test_a_threshold_for_long_prompts_leaves_no_planned_step_emptier(build) -> None:
    steps = {}
    for threshold in (0, 64):
        scheduler = build(VllmPlanner())
        scheduler.scheduler_config.long_prefill_token_threshold = threshold
        engine = Engine(scheduler)
        for i in range(10):
            scheduler.add_request(make_request(f"r{i}", prompt_tokens=300, max_tokens=4, args={"slo_class": "chat"}))
        steps[threshold] = engine.run()
    assert steps[64] == steps[0]


@pytest.mark.parametrize("seed", range(3))
def test_plans_are_carried_out_one_step_ahead_under_async_scheduling(build, seed) -> None:
    planner = RandomPlanner(seed, preempt=0.0)
    scheduler = build(planner, cls=AsyncSloScheduler)
    engine = Engine(scheduler, depth=2)
    names = feed(scheduler, 30, np.random.default_rng(seed))
    engine.run()
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)
    assert set(scheduler.slo.divergences) <= {"missing", "extra"}  # a request whose last token is in flight is skipped
    assert not scheduler.slo.divergences["extra"]


@pytest.mark.parametrize("seed", range(3))
def test_a_request_whose_last_token_is_in_flight_is_not_planned(build, seed) -> None:
    ours = {"planner": "slos_serve.core.planner.SloPlanner", "always_plan": False}
    scheduler = build(cls=AsyncSloScheduler, slo=ours)
    engine = Engine(scheduler, depth=2)
    names = feed(scheduler, 30, np.random.default_rng(seed))
    engine.run()
    check_clean(scheduler, engine, names)
    assert scheduler.slo.num_plans
    assert not scheduler.slo.divergences


def test_preemptions_under_async_scheduling_lose_no_request(build) -> None:
    scheduler = build(RandomPlanner(3, preempt=0.1), cls=AsyncSloScheduler)
    engine = Engine(scheduler, depth=2)
    names = feed(scheduler, 30, np.random.default_rng(5))
    engine.run()
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)


@pytest.mark.parametrize("seed", range(3))
def test_prefix_hits_are_known_to_the_planner_and_shrink_no_plan_wrongly(build, seed) -> None:
    planner = RandomPlanner(seed)
    scheduler = build(planner, prefix_caching=True)
    engine = Engine(scheduler)
    names = feed(scheduler, 12, np.random.default_rng(seed), seed=1)
    engine.run()
    later = [f"later{i}" for i in range(12)]
    for name in later:
        scheduler.add_request(make_request(name, prompt_tokens=160, max_tokens=4, seed=1))
    engine.step()
    assert max(planner_rows := scheduler.slo.tracker.table.rows["num_cached_tokens"].tolist()) > 0, planner_rows
    engine.run()
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names + later)
    assert set(scheduler.slo.divergences) <= {"short"}  # a longer hit than was known at the look-up


@pytest.mark.parametrize("seed", range(3))
def test_draft_lengths_are_capped_per_request(build, seed) -> None:
    planner = RandomPlanner(seed, drafts=3)
    scheduler = build(planner, speculative_tokens=3)
    rng = np.random.default_rng(seed)
    engine = Engine(scheduler, accept=lambda _, drafts: int(rng.integers(0, drafts + 1)))
    names = feed(scheduler, 20, np.random.default_rng(seed))
    while scheduler.has_unfinished_requests():
        output = engine.step()
        batch = planner.plans[-1].batch
        caps = {e.request_id: e for e in batch.entries}
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            assert len(drafts) <= caps[request_id].draft_length
        for request_id, count in output.num_scheduled_tokens.items():
            entry = caps[request_id]
            assert entry.num_tokens <= count <= entry.num_tokens + entry.draft_length
        for request in scheduler.running:
            if not request.is_prefill_chunk:
                request.spec_token_ids = [5] * int(rng.integers(0, 4))
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)
    assert not scheduler.slo.divergences


def test_a_plan_that_ignores_memory_evicts_as_vllm_would_and_every_request_finishes(build) -> None:
    scheduler = build(RandomPlanner(1, heeds_memory=False), num_blocks=40)
    engine = Engine(scheduler)
    names = feed(scheduler, 30, np.random.default_rng(1))
    engine.run()
    scheduler.slo.faults.counts.pop("starved", None)
    check_clean(scheduler, engine, names)
    assert scheduler.slo.divergences


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_waiting_requests_that_are_not_planned_keep_their_order(build, policy) -> None:
    class OnlyTheFourth:
        def plan(self, state):
            ids = [i for i in state.requests.request_ids if i == "r4"]
            return Plan(
                batch=BatchPlan(
                    request_ids=ids, num_tokens=np.ones(len(ids), np.int64), draft_lengths=np.zeros(len(ids), np.int64)
                )
            )

    scheduler = build(OnlyTheFourth(), policy=policy)
    for i in range(8):
        scheduler.add_request(make_request(f"r{i}", priority=-i, arrival_s=100.0 + i))
    before = [r.request_id for r in scheduler.waiting]
    other = "skipped_waiting" if hasattr(scheduler, "skipped_waiting") else "kv_holding_waiting"
    waiting, skipped = scheduler.waiting, getattr(scheduler, other)
    scheduler.schedule()
    assert scheduler.waiting is waiting
    assert getattr(scheduler, other) is skipped
    assert [r.request_id for r in scheduler.waiting] == [i for i in before if i != "r4"]
    assert [r.request_id for r in scheduler.running] == ["r4"]
    assert scheduler.policy.value == policy


def test_holding_every_running_request_keeps_blocks_and_order(build) -> None:
    class Hold:
        on = False

        def plan(self, state):
            ids = [] if self.on else list(state.requests.request_ids)
            count = len(ids)
            return Plan(
                batch=BatchPlan(
                    request_ids=ids[::-1], num_tokens=np.full(count, 8), draft_lengths=np.zeros(count, np.int64)
                )
            )

    planner = Hold()
    scheduler = build(planner)
    engine = Engine(scheduler)
    for i in range(4):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=64))
    engine.step()
    running = [r.request_id for r in scheduler.running]
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    planner.on = True
    output = engine.step()
    assert output.num_scheduled_tokens == {}
    assert [r.request_id for r in scheduler.running] == running
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    ("ours", "stock", "depth"), [(SloScheduler, Scheduler, 1), (AsyncSloScheduler, AsyncScheduler, 2)]
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_observing_schedules_exactly_what_stock_vllm_schedules(build, tmp_path, ours, stock, depth, policy) -> None:
    watched = Engine(
        build(RandomPlanner(0), cls=ours, slo={"mode": "observe"}, policy=policy, num_blocks=60), depth=depth
    )
    plain = Engine(make_scheduler(tmp_path, cls=stock, policy=policy, num_blocks=60), depth=depth)
    for engine in (watched, plain):
        feed(engine.scheduler, 30, np.random.default_rng(7), arrival_s=1.0)
        engine.run()
    assert watched.batches == plain.batches
    assert watched.outputs == plain.outputs
    assert len(watched.scheduler.slo.planner.plans) > 10


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_without_slo_traffic_an_enforcing_scheduler_is_stock_vllm(build, tmp_path, policy) -> None:
    ours = Engine(build(RandomPlanner(0), slo={"always_plan": False}, policy=policy, num_blocks=60))
    plain = Engine(make_scheduler(tmp_path, cls=Scheduler, policy=policy, num_blocks=60))
    for engine in (ours, plain):
        for i in range(30):
            engine.scheduler.add_request(make_request(f"r{i}", prompt_tokens=10 + 7 * i, max_tokens=20, arrival_s=1.0))
        engine.run()
    assert ours.batches == plain.batches
    assert not ours.scheduler.slo.planner.plans
    ours.scheduler.add_request(make_request("r", args={"slo_ttft_ms": 5000}))
    ours.run()
    assert ours.scheduler.slo.planner.plans


def test_a_share_of_nothing_blocks_nobody_behind_it(build) -> None:
    class FirstGetsNothing:
        def plan(self, state):
            ids = list(state.requests.request_ids)
            counts = np.full(len(ids), 8)
            counts[0] = 0
            return Plan(batch=BatchPlan(request_ids=ids, num_tokens=counts, draft_lengths=np.zeros(len(ids), np.int64)))

    scheduler = build(FirstGetsNothing())
    for i in range(3):
        scheduler.add_request(make_request(f"r{i}"))
    assert scheduler.schedule().num_scheduled_tokens == {"r1": 8, "r2": 8}
    assert [r.request_id for r in scheduler.waiting] == ["r0"]
    assert not scheduler.slo.divergences
