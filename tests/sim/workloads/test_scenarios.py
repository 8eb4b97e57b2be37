"""Scenarios are the same requests at every rate, apart on tuning and reporting windows, and end to end runnable."""

import numpy as np
import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.errors import ConfigError
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.run import run_workload
from slos_serve.sim.workloads import scenarios
from slos_serve.sim.workloads.scenarios import SCENARIOS, Offer, find_scenario
from slos_serve.sim.workloads.sessions import read_sessions, read_tool_times_s
from slos_serve.sim.workloads.workload import RequestFactory, trace_workload
from slos_serve.traces.trace import Trace

HARDWARE = load_hardware("h100-8b-derived")


def offer(data, **changes):
    return Offer(**{"data": data, "hardware": HARDWARE, "rate_rps": 4.0, "part": "tune", **changes})


def lengths(workload):
    sims = [*workload.arrivals, *(sim for _, sim in workload.following.values())]
    return [(sim.request.num_prompt_tokens, sim.num_output_tokens, sim.request.slo_class) for sim in sims]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_rate_stretches_time_and_changes_nothing_else(data, name):
    scenario = find_scenario(name)
    slow, fast = scenario.offer(offer(data, rate_rps=1.0)), scenario.offer(offer(data, rate_rps=4.0))
    assert lengths(slow) == lengths(fast)
    assert slow.rate_rps == pytest.approx(1.0)
    assert fast.rate_rps == pytest.approx(4.0)
    assert slow.duration_s == pytest.approx(4 * fast.duration_s)
    times = [[sim.request.arrival_s for sim in load.arrivals] for load in (slow, fast)]
    assert times[0] == pytest.approx([4 * at_s for at_s in times[1]])


@pytest.mark.parametrize("name", SCENARIOS)
def test_seeds_and_parts_are_other_requests(data, name):
    scenario = find_scenario(name)
    offers = [offer(data), offer(data, seed=1), offer(data, part="report")]
    first, second, third = (lengths(scenario.offer(each)) for each in offers)
    assert first != second
    assert first != third


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_runs_to_its_end(data, name):
    scenario = find_scenario(name)
    workload = scenario.offer(offer(data, rate_rps=20.0))
    result = run_workload(workload, VllmPlanner(), HARDWARE, max_model_len=scenario.max_model_len(HARDWARE))
    assert len(result.graded) == workload.num_requests
    assert {grade.outcome for grade in result.graded} <= {"met", "missed"}


def test_nothing_longer_than_the_context_is_offered(data):
    small = load_hardware("a100-40g-opt-6.7b-published")
    for name in SCENARIOS:
        workload = find_scenario(name).offer(offer(data, hardware=small))
        assert max(prompt + output for prompt, output, _ in lengths(workload)) <= 2038


def test_classes_are_the_shipped_ones_without_floor_or_allowance(data):
    sim = find_scenario("chatbot").offer(offer(data)).arrivals[0]
    assert sim.request.slo.ttft_s == pytest.approx(5 * HARDWARE.reference_s(sim.request.num_prompt_tokens))
    assert sim.request.slo.tpot_s == 0.1


def test_mixed_holds_three_classes_in_order_of_arrival(data):
    workload = find_scenario("mixed").offer(offer(data))
    counts = workload.num_by_class()
    assert set(counts) == {"chat", "coding", "summarization"}
    assert counts["summarization"] / workload.num_requests == pytest.approx(0.1, abs=0.02)
    times = [sim.request.arrival_s for sim in workload.arrivals]
    assert times == sorted(times)


def test_tool_rounds_wait_for_the_one_before_and_the_last_one_is_paced_as_an_answer(data):
    workload = find_scenario("tool-calling").offer(offer(data))
    paces = [sim.request.slo.tpot_s for sim in workload.arrivals]
    assert set(paces) == {0.05}
    last = [sim for _, sim in workload.following.values() if sim.request.request_id not in workload.following]
    assert {sim.request.slo.tpot_s for sim in last} == {0.1}
    assert workload.num_requests == 4 * len(workload.arrivals)


def test_reasoning_thinks_first(data):
    workload = find_scenario("reasoning").offer(offer(data))
    assert all(sim.request.thinks and sim.num_thinking_tokens > 0 for sim in workload.arrivals)


def test_a_long_window_of_reasoning_has_its_lengths_again_and_none_of_the_history(data, monkeypatch):
    monkeypatch.setattr(scenarios, "MAX_REASONING", 20)
    reasoning = find_scenario("reasoning")
    short, long = (lengths(reasoning.offer(offer(data, max_requests=count))) for count in (20, 50))
    shapes = [(prompt, output) for prompt, output, _ in long]
    assert [(prompt, output) for prompt, output, _ in short] == shapes[:20] == shapes[20:40]
    assert not set(shapes) & {(p, o) for _, p, o in reasoning.offer(offer(data, max_requests=50)).history}
    assert reasoning.num_requests("h100-8b-derived") > reasoning.num_requests(reasoning.published)


def test_history_comes_from_outside_the_window(data):
    workload = find_scenario("chatbot").offer(offer(data, part="report"))
    offered = {(prompt, output) for prompt, output, _ in lengths(workload)}
    seen = [(prompt, output) for _, prompt, output in workload.history]
    assert len(seen) > 100
    assert len(offered & set(seen)) < 5
    assert workload.length_model().num_observations("chat") > 100


def test_recorded_tool_times_leave_out_the_time_of_the_output(data):
    times = read_tool_times_s(data / "lengths/lmcache_agent_calls.csv.gz")
    assert times == pytest.approx(np.full(32, 1.5 - 50 / 200))
    assert len(read_sessions(data / "lengths/toolbench_full_sessions_calls.csv.gz")) == 6


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="azure2023_conv"):
        find_scenario("chatbot").offer(offer(tmp_path))


def test_unknown_parts_seeds_and_scenarios_are_refused(data):
    with pytest.raises(ValueError, match="part"):
        offer(data, part="all")
    with pytest.raises(ValueError, match="seed"):
        offer(data, seed=-1)
    with pytest.raises(ConfigError, match="chatbot"):
        find_scenario("poetry")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_quick_look_takes_the_first_requests_at_the_same_rate(data, name):
    scenario = find_scenario(name)
    full, quick = scenario.offer(offer(data)), scenario.offer(offer(data, max_requests=40))
    assert quick.num_requests == pytest.approx(40, abs=4)
    assert quick.rate_rps == pytest.approx(4.0)
    assert lengths(quick)[: len(quick.arrivals)] == lengths(full)[: len(quick.arrivals)]


@pytest.mark.parametrize("name", ["chatbot", "mixed"])
def test_what_is_too_long_is_counted_as_far_as_the_window_goes(data, name):
    small = load_hardware("a100-40g-opt-6.7b-published")
    scenario = find_scenario(name)
    full, cut = (scenario.offer(offer(data, hardware=small, max_requests=n)) for n in (None, 20))
    assert full.num_dropped > cut.num_dropped > 0
    assert cut.num_dropped / cut.num_requests == pytest.approx(full.num_dropped / full.num_requests, rel=0.7)


def test_requests_that_come_at_once_are_counted_as_dropped_only_before_the_cut():
    trace = Trace.build(
        arrived_at_s=np.array([0.0, 1.0, 1.0, 1.0, 1.0]),
        prompt_tokens=np.array([10, 9000, 10, 10, 9000]),
        output_tokens=np.full(5, 5),
    )
    factory = RequestFactory(scenarios.SCENARIO_SLOS, HARDWARE.reference_s, 4096)
    for count, dropped in ((1, 1), (2, 1), (3, 2), (None, 2)):
        load = trace_workload(trace, factory, max_model_len=4096, default_class="chat", max_requests=count)
        assert (load.num_requests, load.num_dropped) == (count or 3, dropped)
