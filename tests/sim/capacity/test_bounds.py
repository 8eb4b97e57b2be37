"""The clairvoyant bound: never below what a real run attains, and exact where the answer is plain."""

import numpy as np
import pytest
from tests.sim.worlds import hardware, sim, workload

from slos_serve.core.baselines import EdfPlanner, VllmPlanner
from slos_serve.core.perf import PerfModel
from slos_serve.core.planner import SloPlanner
from slos_serve.sim.capacity.bounds import clairvoyant_attainment
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import run_workload

pytest.importorskip("scipy")

CHEAP_DRAFTS = PerfModel.from_terms([{"per_token_s": 1e-4, "fixed_s": 0.02}])


def load_of(seed, rate, count=60):
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(0.25, 4 / rate, count)  # bursts: a coefficient of variation of 2
    rows = zip(np.cumsum(gaps), rng.integers(10, 400, count), rng.integers(1, 60, count), strict=True)
    sims = [
        sim(f"r{i}", int(p), int(o), at_s=float(t), ttft_s=0.1 + 3e-3 * float(p), slo_class="ab"[i % 2])
        for i, (t, p, o) in enumerate(rows)
    ]
    return workload(*sims, duration_s=float(gaps.sum()))


def worst_class(result):
    shares = []
    for name in {grade.slo_class for grade in result.graded}:
        mine = [grade for grade in result.graded if grade.slo_class == name]
        shares.append(sum(grade.outcome == "met" for grade in mine) / len(mine))
    return min(shares)


@pytest.mark.parametrize("rate", [2.0, 5.0, 9.0])
@pytest.mark.parametrize("seed", range(3))
def test_nobody_attains_more_than_the_bound(seed, rate):
    load, hw = load_of(seed, rate), hardware()
    bound = clairvoyant_attainment(load, hw)
    ours = ReplicaOptions(known_lengths=True)
    for planner, options in ((SloPlanner(), ours), (VllmPlanner(), None), (EdfPlanner(), None)):
        assert worst_class(run_workload(load, planner, hw, options=options)) <= bound + 1e-6


def test_what_is_easy_is_attained_in_full():
    assert clairvoyant_attainment(workload(sim("a", 100, 5)), hardware()) == pytest.approx(1.0)


def test_a_prompt_that_is_too_long_for_its_deadline_cannot_be_met():
    load = workload(sim("a", 900, 5, ttft_s=0.5), sim("b", 100, 5))
    assert clairvoyant_attainment(load, hardware()) == pytest.approx(0.5)


def test_ten_at_once_are_met_as_far_as_the_engine_computes_their_prompts_in_time():
    load = workload(*[sim(f"r{i}", 500, 1, ttft_s=2.0) for i in range(10)])
    # 1 ms a token and 10 ms a step: fewer than 4 prompts in 2 s
    assert 0.36 < clairvoyant_attainment(load, hardware()) <= 0.4


def test_decodes_that_do_not_fit_a_period_lower_the_bound():
    load = workload(*[sim(f"r{i}", 1, 200, ttft_s=1.0, tpot_s=0.05) for i in range(80)])
    # a step of 50 ms holds 40 tokens
    assert clairvoyant_attainment(load, hardware()) < 0.8


def test_drafts_raise_the_bound_where_steps_are_slower_than_the_pace():
    load = workload(sim("a", 10, 300, ttft_s=0.1, tpot_s=0.008))
    assert clairvoyant_attainment(load, hardware()) < 1.0
    assert clairvoyant_attainment(load, hardware(), acceptance=0.7, max_draft_length=3) == pytest.approx(1.0)


def test_memory_lowers_the_bound():
    load = workload(*[sim(f"r{i}", 400, 150, ttft_s=4.0, tpot_s=0.02) for i in range(8)])
    roomy, tight = hardware(), hardware(kv_tokens=800, max_model_len=800)
    assert clairvoyant_attainment(load, tight) < clairvoyant_attainment(load, roomy)


def test_the_bound_falls_with_the_rate():
    low, middle, high = (clairvoyant_attainment(load_of(1, rate), hardware()) for rate in (1.0, 6.0, 18.0))
    assert 1.0 >= low > middle > high


@pytest.mark.parametrize("rate", [3.0, 9.0])
def test_nobody_who_drafts_attains_more_than_the_bound_with_drafts(rate):
    drafts = {"acceptance": 0.7, "max_draft_length": 4}
    load, hw = load_of(2, rate, count=100), hardware(perf_model=CHEAP_DRAFTS)
    options = ReplicaOptions(known_lengths=True, acceptance={"": 0.7})
    result = run_workload(load, SloPlanner(), hw, options=options, max_draft_length=4)
    bound = clairvoyant_attainment(load, hw, **drafts)
    assert worst_class(result) <= bound + 1e-6
    assert bound >= clairvoyant_attainment(load, hw)


def test_a_draft_token_is_paid_for():
    """Ten of one pace, faster than a step: what is drafted and not accepted was computed all the same."""
    load = workload(*[sim(f"r{i}", 10, 200, ttft_s=0.2, tpot_s=0.018) for i in range(10)])
    dear, free = hardware(), hardware(perf_model=CHEAP_DRAFTS)
    assert clairvoyant_attainment(load, dear) < 1.0  # a step of 20 ms
    assert clairvoyant_attainment(load, dear, acceptance=0.3, max_draft_length=3) < 1.0
    assert clairvoyant_attainment(load, free, acceptance=0.3, max_draft_length=3) == pytest.approx(1.0)


def test_rounds_that_wait_for_others_have_no_bound():
    load = workload(sim("a", 10, 2), following={"a": (0.1, sim("b", 10, 2))})
    with pytest.raises(ValueError, match="rounds"):
        clairvoyant_attainment(load, hardware())
