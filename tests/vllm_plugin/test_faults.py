"""Whatever our own code does, the engine goes on and every request finishes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.types import BatchPlan, Plan, ReplicaState, Verdict
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request


class Faulty:
    """A planner that raises in a share of its calls."""

    def __init__(self, share: float, error: type[Exception] = RuntimeError) -> None:
        self.inner = VllmPlanner()
        self.rng = np.random.default_rng(0)
        self.share = share
        self.error = error

    def plan(self, state):
        if self.rng.random() < self.share:
            raise self.error("made to fail")
        return self.inner.plan(state)


def batch(ids, tokens=1, drafts=0, preempted=()):
    count = len(ids)
    return Plan(
        batch=BatchPlan(
            request_ids=ids,
            num_tokens=np.full(count, tokens),
            draft_lengths=np.full(count, drafts),
            preempted=list(preempted),
        )
    )


WRONG_PLANS = {
    "unknown id": lambda state: batch(["nobody"]),
    "named twice": lambda state: batch([state.requests.request_ids[0]] * 2),
    "negative share": lambda state: batch(state.requests.request_ids[:1], tokens=-1),
    "preempts what waits": lambda state: batch([], preempted=state.requests.request_ids[:1]),
    "unequal columns": lambda state: Plan(
        batch=BatchPlan(request_ids=["a"], num_tokens=np.zeros(0, np.int64), draft_lengths=np.zeros(0, np.int64))
    ),
    "unknown verdict": lambda state: Plan(
        batch=batch([]).batch, verdicts=(Verdict(request_id="nobody", promised=True),)
    ),
    "no plan at all": lambda state: None,
}


@pytest.mark.parametrize("share", [0.01, 1.0])
@pytest.mark.parametrize(("cls", "depth"), [(SloScheduler, 1), (AsyncSloScheduler, 2)])
def test_every_request_finishes_when_the_planner_raises(build, share, cls, depth) -> None:
    scheduler = build(Faulty(share), cls=cls)
    engine = Engine(scheduler, depth=depth)
    for i in range(60):
        scheduler.add_request(
            make_request(f"r{i}", prompt_tokens=10 + 3 * i, max_tokens=30, args={"slo_class": "chat"})
        )
    engine.run()
    assert len(engine.finished) == 60
    assert all(len(tokens) == 30 for tokens in engine.outputs.values())
    assert scheduler.slo.faults.counts["plan"] > 0
    assert set(scheduler.slo.faults.counts) == {"plan"}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_plan_that_makes_no_sense_is_a_fault_and_changes_nothing(build, name) -> None:
    class Wrong:
        def plan(self, state):
            return WRONG_PLANS[name](state)

    scheduler = build(Wrong())
    engine = Engine(scheduler)
    for i in range(5):
        scheduler.add_request(make_request(f"r{i}"))
    engine.run()
    assert len(engine.finished) == 5
    assert sum(scheduler.slo.faults.counts.values()) > 0


def test_the_first_fault_of_a_kind_leaves_a_state_that_replays(build, tmp_path) -> None:
    scheduler = build(Faulty(1.0))
    engine = Engine(scheduler)
    for i in range(5):
        scheduler.add_request(make_request(f"r{i}", args={"slo_class": "coding"}))
    engine.run()
    (file,) = (tmp_path / "faults").glob("*.json")
    state = ReplicaState.from_json(json.loads(file.read_text()))
    assert sorted(state.requests.request_ids) == [f"r{i}" for i in range(5)]
    assert len(VllmPlanner().plan(state).batch.request_ids) == 5


def test_plans_that_stay_empty_give_way_to_vllms_own_order(build) -> None:
    class Lazy:
        def plan(self, state):
            return batch([])

    scheduler = build(Lazy())
    engine = Engine(scheduler)
    for i in range(3):
        scheduler.add_request(make_request(f"r{i}", max_tokens=5))
    steps = engine.run()
    assert len(engine.finished) == 3
    assert scheduler.slo.faults.counts["starved"] >= 5
    assert steps <= 4 * 8


def test_a_broken_table_does_not_stop_the_engine(build, monkeypatch) -> None:
    scheduler = build(VllmPlanner())
    engine = Engine(scheduler)
    for i in range(4):
        scheduler.add_request(make_request(f"r{i}"))
    engine.step()

    def explode(*_args, **_kwargs):
        raise RuntimeError("table")

    monkeypatch.setattr(scheduler.slo.tracker, "sync", explode)
    monkeypatch.setattr(scheduler.slo.tracker.outputs, "take", explode)
    engine.run()
    assert len(engine.finished) == 4
    assert scheduler.slo.faults.counts["sync"] > 0
    assert scheduler.slo.faults.counts["update"] > 0


BAD_ARGS = [
    {"slo_class": "no-such-class"},
    {"slo_class": 7},
    {"slo_class": ["chat"]},
    {"slo_ttft_ms": "soon"},
    {"slo_ttft_ms": -1},
    {"slo_ttft_ms": math.nan},
    {"slo_tpot_ms": math.inf},
    {"slo_ttft_ms": 10, "slo_ttft_slowdown": 3},
    {"slo_stage": "middle", "slo_class": "tool"},
    {"slo_e2e_ms": 1e300},
    {"slo_ttft_ms": [1, 2]},
    {"slo_arrival_s": "yesterday", "slo_class": "x"},
]


@pytest.mark.parametrize("args", BAD_ARGS)
def test_bad_values_are_best_effort_and_never_raise(build, args) -> None:
    scheduler = build(VllmPlanner())
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args=args))
    live = scheduler.slo.tracker.live["r"]
    assert live.reason == "invalid"
    assert not live.has_slo
    engine.run()
    assert engine.finished["r"].stop_reason == "slo:best-effort:invalid"
    assert not scheduler.slo.faults.counts
    assert scheduler.slo.snapshot()["invalid"] == 1


@pytest.mark.parametrize(
    "args", [{"slo_arrival_s": math.inf}, {"slo_arrival_s": "x"}, {"slo_arrival_s": 1e300}, {5: 1}, {}]
)
def test_odd_but_harmless_arguments_are_ignored(build, args) -> None:
    scheduler = build(VllmPlanner())
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args=args))
    engine.run()
    assert set(engine.finished) == {"r"}
    assert not scheduler.slo.faults.counts


@pytest.mark.parametrize("state", ["waiting", "running", "preempted", "in flight", "grammar"])
@pytest.mark.parametrize(("cls", "depth"), [(SloScheduler, 1), (AsyncSloScheduler, 2)])
def test_an_abort_in_any_state_leaves_nothing_behind(build, state, cls, depth) -> None:
    scheduler = build(VllmPlanner(), cls=cls, max_num_seqs=1)
    engine = Engine(scheduler, depth=depth)
    scheduler.add_request(make_request("busy", prompt_tokens=300, max_tokens=5))
    engine.step()
    victim = make_request("victim", args={"slo_class": "chat"}, grammar=state == "grammar", max_tokens=50)
    scheduler.add_request(victim)
    if state == "in flight":
        engine.abort("busy")
        while victim.status is not RequestStatus.RUNNING:
            engine.step()
    elif state == "running":
        while victim.num_output_tokens < 3:
            engine.step()
    elif state == "preempted":
        while victim.num_output_tokens < 3:
            engine.step()
        scheduler.running.remove(victim)
        scheduler._preempt_request(victim, 0.0)
    engine.abort("victim")
    engine.run()
    slo = scheduler.slo
    assert not slo.tracker.live
    assert not len(slo.tracker.table)
    assert not slo.tracker.blocked
    assert not slo.faults.counts
    assert slo.promises.tally.classes["chat"].outcomes == {"cancelled": 1}
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == slo.limits.num_kv_blocks


def test_an_abort_with_stop_strings_is_how_vllm_ends_a_request(build) -> None:
    scheduler = build(VllmPlanner())
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_ttft_ms": 60000}, stop=["END"], max_tokens=50))
    for _ in range(4):
        engine.step()
    engine.abort("r")
    assert scheduler.slo.promises.tally.classes["custom"].outcomes == {"met": 1}
