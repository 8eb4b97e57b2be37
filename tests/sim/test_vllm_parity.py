"""The simulator makes the batches that vLLM's own scheduler makes, at the same virtual times: stock and ours."""

from dataclasses import replace

import numpy as np
import pytest
from tests.sim.worlds import hardware, sim, workload

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import ageing
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import run_workload

pytest.importorskip("vllm")


class Watched:
    """A planner that notes its batches."""

    def __init__(self, planner):
        self.planner = planner
        self.batches = []

    def plan(self, state):
        plan = replace(self.planner.plan(state), repeats=False)
        self.batches.append({entry.request_id: entry.num_tokens for entry in plan.batch.entries})
        return plan


def load_of(seed, count=40, *, rate=8.0, longest=300):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    rows = zip(times, rng.integers(1, longest, count), rng.integers(1, 60, count), strict=True)
    return workload(
        *[sim(f"r{i}", int(p), int(o), at_s=float(t), max_output_tokens=100) for i, (t, p, o) in enumerate(rows)]
    )


CASES = {
    "plenty of everything": {},
    "few seats": {"max_num_seqs": 4},
    "a small budget": {"max_num_batched_tokens": 48, "max_num_seqs": 16},
    "little memory": {"kv_tokens": 800, "max_model_len": 400},
    "little of everything": {"kv_tokens": 640, "max_model_len": 400, "max_num_batched_tokens": 64, "max_num_seqs": 6},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_the_vllm_baseline_and_vllm_make_the_same_batches_at_the_same_times(tmp_path, case, seed):
    from vllm.v1.core.sched.scheduler import Scheduler

    from slos_serve.sim.vllm_replica import serve

    hw = hardware(**CASES[case])
    load = load_of(seed)
    theirs = serve(load, hw, tmp_path, Scheduler)
    planner = Watched(VllmPlanner(token_budget=hw.max_num_batched_tokens))
    ours = run_workload(load, planner, hw)
    assert planner.batches == theirs.batches
    first = sorted(times[0] for times in theirs.token_times_s.values())
    assert first == pytest.approx(sorted(grade.arrival_s + grade.ttft_s for grade in ours.graded))
    last = sorted(times[-1] for times in theirs.token_times_s.values())
    assert last == pytest.approx(sorted(grade.finish_s for grade in ours.graded))
    if case.startswith("little"):
        assert ours.replica.engine.num_preemptions > 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "case",
    [
        "plenty of everything",
        "few seats",
        "little memory",
    ],
)
def test_the_plug_in_inside_vllm_serves_as_the_simulated_replica_does(tmp_path, case, seed):
    from slos_serve.sim.vllm_replica import serve
    from slos_serve.vllm_plugin.scheduler import SloScheduler

    hw = hardware(**CASES[case])
    load = load_of(seed, 30)
    theirs = serve(load, hw, tmp_path, SloScheduler)
    options = ReplicaOptions(makes_promises=True)
    planner = Watched(SloPlanner())
    ours = run_workload(load, planner, hw, options=options)
    mine = [batch for batch in planner.batches if batch]
    same = sum(a == b for a, b in zip(mine, theirs.batches, strict=False))
    assert same >= 0.97 * max(len(mine), len(theirs.batches))
    met = sum(grade.outcome == "met" for grade in ours.graded)
    assert abs(met - sum(grade.outcome == "met" for grade in theirs.graded)) <= 1
    promised = sum(grade.promised for grade in ours.graded)
    assert abs(promised - sum(grade.promised for grade in theirs.graded)) <= 1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", ["plenty of everything", "few seats"])
def test_one_batch_ahead_the_plug_in_serves_as_the_replica_simulated_with_that_lag(tmp_path, case, seed):
    from slos_serve.sim.vllm_replica import serve
    from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler

    hw = hardware(**CASES[case])
    load = load_of(seed, 30)
    theirs = serve(load, hw, tmp_path, AsyncSloScheduler)
    options = ReplicaOptions(makes_promises=True, async_lag=True)
    ours = run_workload(load, SloPlanner(), hw, options=options)
    met = [sum(grade.outcome == "met" for grade in graded) for graded in (ours.graded, theirs.graded)]
    promised = [sum(grade.promised for grade in graded) for graded in (ours.graded, theirs.graded)]
    assert abs(met[0] - met[1]) <= 1
    assert abs(promised[0] - promised[1]) <= 1
    ended = [{grade.arrival_s: grade.finish_s for grade in graded} for graded in (ours.graded, theirs.graded)]
    gaps = [abs(ended[0][arrival] - ended[1][arrival]) for arrival in ended[0]]
    assert np.median(gaps) < 0.15  # this engine knows max_tokens, and skips the step after the last token


def test_best_effort_work_ages_in_the_plug_in_as_in_the_simulated_replica(tmp_path, monkeypatch):
    from slos_serve.sim.vllm_replica import serve
    from slos_serve.vllm_plugin.scheduler import SloScheduler

    hw = hardware()
    work = [sim(f"work{i}", 150, 20, at_s=0.5, ttft_s=None, tpot_s=None, slo_class="best-effort") for i in range(2)]
    chats = load_of(0, 60, rate=16.0).arrivals  # about twice what the engine could serve
    load = workload(*work, *chats)

    def simulated():
        planner = Watched(SloPlanner())
        run = run_workload(load, planner, hw, options=ReplicaOptions(makes_promises=True))
        return [batch for batch in planner.batches if batch], run.replica.ageing.chosen

    still, nobody = simulated()
    monkeypatch.setattr(ageing, "STILL_S", 1.0)
    monkeypatch.setattr(ageing, "GRACE_S", 1.0)
    aged, somebody = simulated()
    assert (nobody, somebody is None) == (None, False)
    assert still != aged == serve(load, hw, tmp_path, SloScheduler).batches
