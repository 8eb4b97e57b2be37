"""The simulator makes the batches that vLLM's own scheduler makes, at the same virtual times: stock and ours.

The installed vLLM says which rules it has: the threshold for long prompts holds for a request that is alone up to 0.30
(`always`) and not from 0.31 on (`shared`); active seats are from 0.31, the prefill interval on one engine from 0.33.
"""

from dataclasses import replace

import numpy as np
import pytest
from tests.sim.worlds import hardware, sim, workload

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import ageing
from slos_serve.core.types import PlannerTraits
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import run_workload

pytest.importorskip("vllm")


class Watched:
    """A planner that notes its batches."""

    def __init__(self, planner):
        self.planner = planner
        self.makes_promises = PlannerTraits.of(planner).makes_promises
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


def has_attribute(name):
    """Tell whether vLLM's scheduler sets an attribute, which says what the version does with a setting."""
    import inspect

    from vllm.v1.core.sched.scheduler import Scheduler

    return f"self.{name} =" in inspect.getsource(Scheduler.__init__)


# set on vLLM's scheduler once it is made; the same for ours; what the constructor of a vLLM that has it sets
KNOBS = {
    "a threshold": (
        {"scheduler_config.long_prefill_token_threshold": 24},
        {"chunk_limit": 24, "chunk_rule": "always"},
        None,
    ),
    "a threshold that spares who is alone": (
        {"scheduler_config.long_prefill_token_threshold": 24},
        {"chunk_limit": 24, "chunk_rule": "shared"},
        "adaptive_long_prefill_threshold",
    ),
    "an adaptive threshold": (
        {"scheduler_config.long_prefill_token_threshold": 8, "adaptive_long_prefill_threshold": True},
        {"chunk_limit": 8, "chunk_rule": "adaptive"},
        "adaptive_long_prefill_threshold",
    ),
    "active seats": ({"max_num_active_reqs": 3}, {"max_num_seqs": 3}, "max_num_active_reqs"),
    "an interval of 2": ({"local_prefill_interval": 2}, {"prefill_interval": 2}, "local_prefill_interval"),
    "an interval of 4": ({"local_prefill_interval": 4}, {"prefill_interval": 4}, "local_prefill_interval"),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", ["plenty of everything", "a small budget", "little of everything"])
@pytest.mark.parametrize("knob", KNOBS)
def test_the_settings_of_todays_vllm_do_in_the_simulator_what_they_do_there(tmp_path, knob, case, seed):
    from vllm.v1.core.sched.scheduler import Scheduler

    from slos_serve.sim.vllm_replica import serve

    theirs_has, settings, needed = KNOBS[knob]
    if needed is not None and not has_attribute(needed):
        pytest.skip(f"this vLLM has no {needed}")
    if settings.get("chunk_rule") == "always" and has_attribute("adaptive_long_prefill_threshold"):
        pytest.skip("this vLLM spares a request that is alone")

    class Set(Scheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name, value in theirs_has.items():
                *path, last = name.split(".")
                setattr(getattr(self, path[0]) if path else self, last, value)
            if "local_prefill_interval" in theirs_has:
                self.last_prefill_step = -self.local_prefill_interval

    hw = hardware(**CASES[case])
    load = load_of(seed)
    theirs = serve(load, hw, tmp_path, Set)
    planner = Watched(VllmPlanner(token_budget=hw.max_num_batched_tokens, **settings))
    run_workload(load, planner, hw)
    assert planner.batches == theirs.batches


@pytest.mark.parametrize("limits", [(None, None), (5, None), (None, 600), (6, 400)])
def test_a_full_queue_turns_away_whom_vllms_api_server_turns_away(limits):
    from types import SimpleNamespace

    from vllm.v1.engine.async_llm import AsyncLLM

    from slos_serve.core.types import RequestTable

    num_reqs, num_tokens = limits
    planner = VllmPlanner(max_num_queued_reqs=num_reqs, max_num_queued_tokens=num_tokens)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(200):
        rows = np.zeros(int(rng.integers(0, 9)), RequestTable().rows.dtype)
        rows["num_prompt_tokens"] = rng.integers(1, 300, len(rows))
        rows["num_output_tokens"] = rng.integers(0, 3, len(rows))
        count, prompts = len(rows), int(rows["num_prompt_tokens"][rows["num_output_tokens"] == 0].sum())
        server = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_queued_reqs=num_reqs, max_num_queued_tokens=num_tokens),
            admission_stats=None,
            get_num_unfinished_requests=lambda count=count: count,
            get_num_queued_tokens=lambda tokens=prompts: tokens,
            _record_admission_rejection=lambda reason: None,
        )
        try:
            AsyncLLM.check_admission(server)
            theirs = False
        except Exception:  # noqa: BLE001 -- its classes are not the same in every version
            theirs = True
        assert planner.turns_away(rows) == theirs
        refused += theirs
    assert bool(refused) == (limits != (None, None))


def test_who_is_turned_away_by_a_full_queue_counts_as_rejected_and_takes_nothing():
    load = load_of(0, 60, rate=40.0)
    run = run_workload(load, VllmPlanner(token_budget=256, max_num_queued_reqs=4), hardware())
    outcomes = {grade.outcome for grade in run.graded}
    assert len(run.graded) == 60
    assert "rejected" in outcomes
    assert outcomes - {"rejected"}


def test_two_replicas_count_their_steps_apart():
    from slos_serve.sim.cluster.cluster import ClusterOptions

    planner = VllmPlanner(token_budget=64, prefill_interval=4)
    alone = run_workload(load_of(1), planner, hardware())
    again = run_workload(load_of(1), planner, hardware())
    assert [grade.finish_s for grade in alone.graded] == [grade.finish_s for grade in again.graded]
    two = run_workload(load_of(1), planner, hardware(), cluster=ClusterOptions(num_replicas=2, router="round-robin"))
    assert two.cluster.replicas[0].planner._cadence is not two.cluster.replicas[1].planner._cadence


@pytest.mark.parametrize(
    ("settings", "words"), [({"chunk_rule": "mine"}, "one of always"), ({"prefill_interval": 0}, "1 or more steps")]
)
def test_a_setting_that_vllm_could_not_have_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        VllmPlanner(**settings)


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
    options = ReplicaOptions()
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
    options = ReplicaOptions(async_lag=True)
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
        run = run_workload(load, planner, hw)
        return [batch for batch in planner.batches if batch], run.replica.ageing.chosen

    still, nobody = simulated()
    monkeypatch.setattr(ageing, "STILL_S", 1.0)
    monkeypatch.setattr(ageing, "GRACE_S", 1.0)
    aged, somebody = simulated()
    assert (nobody, somebody is None) == (None, False)
    assert still != aged == serve(load, hw, tmp_path, SloScheduler).batches
