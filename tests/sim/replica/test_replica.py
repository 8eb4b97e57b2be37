"""The simulated engine against cases worked out by hand, and against rules that hold in every run."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.worlds import MODEL, hardware, sim, workload

from slos_serve.core.baselines import EdfPlanner, PriorityPlanner, SarathiPlanner, VllmPlanner, WholePromptPlanner
from slos_serve.core.lengths import length_quantile
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import BatchPlan, Plan, Status, Verdict
from slos_serve.sim.cluster.cluster import ClusterOptions
from slos_serve.sim.replica import replica
from slos_serve.sim.replica.invariants import InvariantError
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import run_workload


def run(load, planner=None, *, hw=None, **more):
    return run_workload(load, planner or VllmPlanner(), hw or hardware(), **more)


def by_class(result):
    return {grade.slo_class: grade for grade in result.graded}


class Scripted:
    """Answer with the batches of a script, then like vLLM."""

    def __init__(self, *script, verdicts=()):
        self.script = list(script)
        self.verdicts = list(verdicts)
        self.makes_promises = bool(verdicts)
        self.seen = []

    def plan(self, state):
        self.seen.append((state.now_s, state.requests.to_json()))
        verdicts = tuple(self.verdicts.pop(0)) if self.verdicts else ()
        if not self.script:
            return dataclasses.replace(VllmPlanner().plan(state), verdicts=verdicts, repeats=False)
        entries, preempted = self.script.pop(0)
        batch = BatchPlan(
            request_ids=[entry[0] for entry in entries],
            num_tokens=np.array([entry[1] for entry in entries], np.int64),
            draft_lengths=np.array([entry[2] if len(entry) > 2 else 0 for entry in entries], np.int64),
            preempted=preempted,
        )
        return Plan(batch=batch, verdicts=verdicts)


def test_one_request_alone_takes_exactly_the_time_of_the_performance_model():
    grade = run(workload(sim("a", 100, 5))).graded[0]
    assert grade.ttft_s == pytest.approx(MODEL.seconds(100), abs=1e-12)
    decodes = [MODEL.seconds(1, context_tokens=100 + i) for i in range(4)]
    assert grade.finish_s == pytest.approx(MODEL.seconds(100) + sum(decodes), abs=1e-12)
    assert grade.tpot_s == pytest.approx(sum(decodes) / 4, abs=1e-12)
    assert grade.outcome == "met"


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    result = run(workload(sim("a", 100, 1)), VllmPlanner(token_budget=40))
    assert result.replica.num_steps == 3
    assert result.graded[0].ttft_s == pytest.approx(2 * MODEL.seconds(40) + MODEL.seconds(20), abs=1e-12)


def test_a_request_that_arrives_in_the_middle_of_a_step_waits_for_its_end():
    load = workload(sim("a", 100, 2, slo_class="first"), sim("b", 50, 1, at_s=0.05, slo_class="second"))
    grades = by_class(run(load))
    end_of_first_step = MODEL.seconds(100)
    second_step = MODEL.seconds(51, 2, context_tokens=100)
    assert grades["second"].ttft_s == pytest.approx(end_of_first_step + second_step - 0.05, abs=1e-12)
    assert grades["first"].finish_s == pytest.approx(end_of_first_step + second_step, abs=1e-12)


def test_a_request_that_arrives_exactly_at_the_end_of_a_step_joins_the_next_one():
    end = MODEL.seconds(100)
    load = workload(sim("a", 100, 2, slo_class="first"), sim("b", 50, 1, at_s=end, slo_class="second"))
    assert by_class(run(load))["second"].ttft_s == pytest.approx(MODEL.seconds(51, 2, context_tokens=100), abs=1e-12)


def test_a_late_first_token_is_a_miss():
    assert run(workload(sim("a", 100, 5, ttft_s=0.1))).graded[0].outcome == "missed"


def test_running_out_of_blocks_preempts_the_younger_request_and_recomputes_its_output_too():
    hw = hardware(kv_tokens=96, max_model_len=96)
    load = workload(sim("old", 30, 40, slo_class="old"), sim("new", 30, 20, slo_class="new"))
    result = run(load, hw=hw)
    assert result.replica.engine.num_preemptions == 1
    grades = by_class(result)
    assert grades["new"].num_output_tokens == 20
    assert grades["new"].finish_s > grades["old"].finish_s
    # 48 tokens each fill the room; the younger one then starts again from nothing
    assert result.replica.tokens_computed > 30 + 39 + 30 + 19


def test_a_planned_preemption_drops_blocks_and_keeps_tokens():
    script = Scripted(([("a", 20)], ()), ([("a", 1)], ()), ([], ["a"]))
    result = run(workload(sim("a", 20, 4)), script)
    state = script.seen[3][1]["columns"]
    assert state["status"] == [Status.WAITING]
    assert (state["num_computed_tokens"], state["num_output_tokens"], state["num_kv_blocks"]) == ([0], [2], [0])
    assert result.graded[0].num_output_tokens == 4


def test_a_held_request_keeps_its_blocks_and_its_place():
    script = Scripted(([("a", 20)], ()), ([("b", 20)], ()))
    run(workload(sim("a", 20, 3), sim("b", 20, 3)), script)
    columns = script.seen[2][1]["columns"]
    assert columns["num_kv_blocks"] == [2, 2]
    assert columns["num_output_tokens"] == [1, 1]


def test_a_plan_for_more_than_is_needed_is_cut():
    script = Scripted(([("a", 500)], ()))
    result = run(workload(sim("a", 20, 1)), script)
    assert result.graded[0].ttft_s == pytest.approx(MODEL.seconds(20), abs=1e-12)


def test_a_plan_over_the_token_budget_is_cut_in_its_order():
    hw = hardware(max_num_batched_tokens=32)
    script = Scripted(([("b", 20), ("a", 20)], ()))
    result = run(workload(sim("a", 20, 1, slo_class="a"), sim("b", 20, 1, slo_class="b")), script, hw=hw)
    grades = by_class(result)
    assert grades["b"].ttft_s == pytest.approx(MODEL.seconds(32, 2), abs=1e-12)
    assert grades["a"].ttft_s > grades["b"].ttft_s
    assert result.replica.engine.num_cut_plans == 1


def test_full_acceptance_emits_every_draft_and_none_emits_one_token():
    script = [([("a", 20)], ()), ([("a", 1, 4)], ())]
    for acceptance, tokens in ((1.0 - 1e-12, 6), (0.0, 2)):
        planner = Scripted(*script)
        run(workload(sim("a", 20, 50)), planner, options=ReplicaOptions(acceptance={"": acceptance}))
        columns = planner.seen[2][1]["columns"]
        assert columns["num_output_tokens"] == [tokens]
        assert columns["num_computed_tokens"] == [20 + tokens - 1]


def test_drafts_cost_their_tokens_and_their_drafter_steps():
    planner = Scripted(([("a", 20)], ()), ([("a", 1, 4)], ()))
    result = run(workload(sim("a", 20, 2)), planner, options=ReplicaOptions(drafter_step_s=1e-3))
    seconds = MODEL.seconds(20) + MODEL.seconds(5, context_tokens=20, draft_steps=4) + 4e-3
    assert result.graded[0].finish_s == pytest.approx(seconds, abs=1e-12)


def test_accepted_drafts_follow_the_acceptance_rate_and_the_host_measures_it():
    load = workload(*[sim(f"r{i}", 20, 400) for i in range(20)])
    options = ReplicaOptions(acceptance={"": 0.7})
    result = run(load, VllmPlanner(draft_length=3), options=options)
    expected = 1 + 0.7 + 0.7**2 + 0.7**3
    assert 400 / result.replica.num_steps == pytest.approx(expected, rel=0.08)
    assert result.replica.outputs.measured_acceptance()["chat"] == pytest.approx(0.7, abs=0.02)


def test_a_thinking_request_tells_when_it_thinks_and_is_graded_by_span():
    planner = Scripted()
    request = sim("a", 20, 10, thinks=True, num_thinking_tokens=4, thinking_tpot_s=0.05, tpot_s=0.1)
    result = run(workload(request), planner)
    thinking = [columns["is_thinking"][0] for _, document in planner.seen if (columns := document["columns"])["seq"]]
    assert thinking == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert result.graded[0].outcome == "met"


def test_a_prefix_hit_shortens_the_prefill():
    result = run(workload(sim("a", 100, 1, num_cached_tokens=64)))
    assert result.graded[0].ttft_s == pytest.approx(MODEL.seconds(36), abs=1e-12)


def test_the_next_round_of_a_session_arrives_after_the_tool_and_finds_its_prefix():
    second = sim("s-1", 148, 1, num_cached_tokens=110, session_id="s", slo_class="second")
    load = workload(sim("s-0", 100, 11, session_id="s", slo_class="first"), following={"s-0": (0.5, second)})
    grades = by_class(run(load))
    assert grades["second"].arrival_s == pytest.approx(grades["first"].finish_s + 0.5)
    # 110 tokens were computed, of which 6 full blocks of 16 can be found again
    assert grades["second"].ttft_s == pytest.approx(MODEL.seconds(148 - 96), abs=1e-12)


def test_a_cached_prefix_is_lost_when_its_blocks_are_needed():
    second = sim("s-1", 148, 1, num_cached_tokens=110, session_id="s", slo_class="second")
    load = workload(
        sim("s-0", 100, 11, session_id="s", slo_class="first"),
        sim("other", 140, 2, at_s=0.4, slo_class="other"),
        following={"s-0": (0.5, second)},
    )
    grades = by_class(run(load, hw=hardware(kv_tokens=160, max_model_len=160)))
    assert grades["second"].ttft_s == pytest.approx(MODEL.seconds(148), abs=1e-12)


def test_verdicts_decide_between_met_missed_and_declined():
    names = ("promised", "declined", "promoted", "too-late")
    load = workload(*[sim(name, 20, 3, slo_class=name) for name in names])
    yes = lambda name: Verdict(request_id=name, promised=True)  # noqa: E731
    no = lambda name: Verdict(request_id=name, promised=False, reason="compute")  # noqa: E731
    held = [("promised", 20), ("declined", 20), ("too-late", 20)]
    planner = Scripted(
        (held, ()),
        verdicts=[
            [yes("promised"), no("declined"), no("promoted"), no("too-late")],
            [yes("promoted"), yes("too-late")],
        ],
    )
    grades = by_class(run(load, planner))
    assert {name: grade.outcome for name, grade in grades.items()} == {
        "promised": "met",
        "declined": "declined",
        "promoted": "met",
        "too-late": "declined",
    }
    assert grades["promised"].promise_lead_s == pytest.approx(1.0)
    assert not grades["too-late"].promised


def test_a_promise_that_is_broken_is_a_miss():
    planner = Scripted(verdicts=[[Verdict(request_id="a", promised=True)]])
    grade = run(workload(sim("a", 500, 3, ttft_s=0.1)), planner).graded[0]
    assert (grade.outcome, grade.promised) == ("missed", True)


def test_the_planner_never_sees_a_true_length():
    planner = Scripted()
    request = sim("a", 20, 30, max_output_tokens=500)
    run(workload(request), planner)
    first = planner.seen[0][1]["columns"]
    assert first["predicted_output_tokens"] == [500.0]
    assert "num_output_tokens" not in request.request.__slots__
    known = Scripted()
    run(workload(request), known, options=ReplicaOptions(known_lengths=True))
    assert known.seen[0][1]["columns"]["predicted_output_tokens"] == [30.0]


def test_predictions_stay_ahead_of_what_was_produced():
    planner = Scripted()
    load = workload(sim("a", 20, 200), history=[("chat", 20, 10)] * 50)
    run(load, planner)
    for _, document in planner.seen:
        columns = document["columns"]
        if columns["seq"]:
            assert columns["predicted_output_tokens"][0] > columns["num_output_tokens"][0]


def test_lengths_are_drawn_for_what_is_out_when_a_step_with_drafts_ends():
    """As the plug-in draws them, which sees a request between two steps only."""
    names = "abcdef"
    planner = Scripted(([(name, 20) for name in names], ()), *[([(name, 1, 4) for name in names], ())] * 30)
    load = workload(*[sim(name, 20, 300) for name in names], history=[("chat", 20, 5 * i) for i in range(1, 60)])
    run(load, planner, options=ReplicaOptions(acceptance={"chat": 0.8}))
    model, drawn = load.length_model(), [-1.0] * len(names)
    num_draws = 0
    for _, document in planner.seen[:30]:
        columns = document["columns"]
        for i, (seq, produced) in enumerate(zip(columns["seq"], columns["num_output_tokens"], strict=True)):
            if columns["drawn_output_tokens"][i] != drawn[i]:
                drawn[i] = columns["drawn_output_tokens"][i]
                assert drawn[i] == model.predict(
                    "chat", 20, 1000, produced=produced, quantile=length_quantile(seq, produced)
                )
                num_draws += 1
    assert num_draws > len(names)


def test_a_planner_that_never_runs_anything_is_found_out():
    class Idle:
        def plan(self, state):
            empty = np.zeros(0, np.int64)
            return Plan(batch=BatchPlan(request_ids=[], num_tokens=empty, draft_lengths=empty))

    with pytest.raises(InvariantError, match="nothing ran"):
        run(workload(sim("a", 20, 3)), Idle())


def test_a_request_that_exceeds_the_context_fails():
    assert run(workload(sim("a", 100, 3)), hw=hardware(max_model_len=64)).graded[0].outcome == "failed"


def test_noise_changes_times_but_not_their_mean():
    load = workload(sim("a", 10, 900))
    exact = run(load).simulated_s
    noisy = run(load, options=ReplicaOptions(noise_sigma=0.2)).simulated_s
    assert noisy != exact
    assert noisy == pytest.approx(exact, rel=0.03)


def test_a_wrong_planner_model_does_not_change_true_times():
    load = workload(sim("a", 100, 5))
    wrong = hardware().slower(0.5).perf_model
    assert run(load, plan_model=wrong).graded[0].finish_s == run(load).graded[0].finish_s


def test_under_async_scheduling_an_arrival_is_seen_one_step_later():
    load = workload(sim("a", 100, 30, slo_class="first"), sim("b", 50, 1, at_s=0.05, slo_class="second"))
    options = ReplicaOptions(async_lag=True)
    lagged, exact = by_class(run(load, options=options)), by_class(run(load))
    assert lagged["second"].ttft_s == pytest.approx(
        MODEL.seconds(100) + MODEL.seconds(1, context_tokens=100) + MODEL.seconds(51, 2, context_tokens=101) - 0.05
    )
    assert lagged["first"].num_output_tokens == exact["first"].num_output_tokens == 30


def test_a_spent_miss_budget_stops_the_run_and_the_rest_counts_as_missed():
    load = workload(*[sim(f"r{i}", 500, 20, at_s=0.01 * i, ttft_s=0.05) for i in range(30)])
    result = run(load, miss_budget={"chat": 3})
    assert result.stopped
    assert [grade.outcome for grade in result.graded].count("missed") == 30
    assert not run(load, miss_budget={"chat": 30}).stopped


def test_steps_are_recorded_with_the_terms_of_the_performance_model():
    steps = []
    load = workload(sim("a", 100, 3), sim("b", 40, 2))
    run(load, VllmPlanner(token_budget=120), on_step=steps.append)
    assert [step["num_tokens"] for step in steps] == [120, 21, 2]
    assert steps[0]["attention_pairs"] == 100 * 50 + 20 * 10
    assert steps[1]["attention_pairs"] == 20 * (20 + 10)
    assert [step["context_tokens"] for step in steps] == [0, 100, 101 + 40]
    for step in steps:
        assert step["seconds"] == pytest.approx(
            MODEL.seconds(
                step["num_tokens"],
                step["num_requests"],
                context_tokens=step["context_tokens"],
                attention_pairs=step["attention_pairs"],
            )
        )


PLANNERS = [
    VllmPlanner(token_budget=128),
    VllmPlanner(token_budget=256, draft_length=3),
    VllmPlanner(token_budget=128, chunk_limit=64, max_num_seqs=4),
    PriorityPlanner(token_budget=128),
    WholePromptPlanner(),
    SarathiPlanner(),
    EdfPlanner(token_budget=128),
]

requests = st.builds(
    lambda prompt, output, at_s, ttft_s, tpot_s, slo_class, cached, thinking: {
        "prompt": prompt,
        "output": output,
        "at_s": at_s,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "slo_class": slo_class,
        "num_cached_tokens": min(cached, prompt),
        "thinks": thinking > 0,
        "num_thinking_tokens": min(thinking, output),
        "max_output_tokens": 120,
    },
    prompt=st.integers(1, 150),
    output=st.integers(1, 100),
    at_s=st.floats(0, 3),
    ttft_s=st.one_of(st.none(), st.floats(0.05, 3)),
    tpot_s=st.one_of(st.none(), st.floats(0.01, 0.2)),
    slo_class=st.sampled_from(["a", "b", "c"]),
    cached=st.sampled_from([0, 0, 16, 100]),
    thinking=st.sampled_from([0, 0, 0, 10]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(requests, min_size=1, max_size=14),
    planner=st.sampled_from(PLANNERS),
    kv_blocks=st.integers(16, 40),
    options=st.builds(
        ReplicaOptions,
        acceptance=st.sampled_from([{}, {"": 0.7}, {"a": 0.9, "": 0.2}]),
        async_lag=st.booleans(),
        noise_sigma=st.sampled_from([0.0, 0.3]),
        known_lengths=st.booleans(),
    ),
)
def test_any_workload_ends_with_one_outcome_each_all_tokens_out_and_all_blocks_free(rows, planner, kv_blocks, options):
    hw = hardware(kv_tokens=16 * kv_blocks, max_model_len=16 * kv_blocks, max_num_batched_tokens=512)
    load = workload(
        *[sim(f"r{i}", row.pop("prompt"), row.pop("output"), **row) for i, row in enumerate(map(dict, rows))]
    )
    result = run(load, planner, hw=hw, options=options)
    assert len(result.graded) == len(rows)
    assert result.replica.engine.pool.num_free == kv_blocks
    tokens = sum(grade.num_output_tokens for grade in result.graded if grade.outcome != "failed")
    fitting = [
        request
        for request in load.arrivals
        if request.request.num_prompt_tokens + request.num_output_tokens <= 16 * kv_blocks
    ]
    assert tokens == sum(request.num_output_tokens for request in fitting)
    for grade in result.graded:
        assert grade.outcome in ("met", "missed", "failed", "none")
        assert grade.finish_s is None or math.isfinite(grade.finish_s)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(requests, min_size=1, max_size=14),
    planner=st.sampled_from(PLANNERS),
    kv_blocks=st.integers(16, 40),
    known_lengths=st.booleans(),
)
def test_a_plan_that_repeats_gives_what_every_step_planned_anew_gives(rows, planner, kv_blocks, known_lengths):
    def document(**more):
        load = workload(
            *[sim(f"r{i}", row.pop("prompt"), row.pop("output"), **row) for i, row in enumerate(map(dict, rows))],
            following={"r0": (0.3, sim("next", 40, 30, slo_class="a"))},
        )
        options = ReplicaOptions(known_lengths=known_lengths, acceptance={"": 0.6})
        hw = hardware(kv_tokens=16 * kv_blocks, max_model_len=16 * kv_blocks, max_num_batched_tokens=256)
        result = run(load, planner, hw=hw, options=options, plan_clock=lambda: 0.0, **more)
        replica = result.replica
        counts = (
            replica.num_steps,
            replica.tokens_computed,
            replica.engine.num_preemptions,
            replica.engine.num_cut_plans,
        )
        model = None if planner.ignores_times else replica.plan_model
        return result.graded, result.simulated_s, counts, model, replica.engine.pool.lowest_free, len(replica.plan_s)

    # a run whose steps are recorded plans every one of them
    *fast, few = document()
    *stepped, many = document(on_step=lambda _: None)
    assert fast == stepped
    assert few <= many


def test_steps_that_only_decode_are_not_planned_one_by_one():
    result = run(workload(sim("a", 20, 300), sim("b", 20, 200, at_s=2.0)), plan_clock=lambda: 0.0)
    assert result.replica.num_steps > 300
    assert len(result.replica.plan_s) < 12


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_noise():
    load = workload(*[sim(f"r{i}", 30 + i, 20, at_s=0.02 * i) for i in range(40)])
    options = ReplicaOptions(acceptance={"": 0.7}, noise_sigma=0.1)

    def document(seed):
        entry = run(load, VllmPlanner(draft_length=2), seed=seed, options=options).entry(system="vllm", wall_s=0.0)
        return json.dumps(entry)

    assert document(1) == document(1)
    assert document(1) != document(2)


def test_hints_and_history_are_what_lengths_are_first_predicted_from():
    assert workload(sim("a", 20, 5), hints={"chat": 40.0}).length_model().predict("chat", 20, 1000) < 120
    assert workload(sim("a", 20, 5)).length_model().predict("chat", 20, 1000) == 1000


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(requests, min_size=1, max_size=14),
    kv_blocks=st.integers(16, 60),
    num_replicas=st.sampled_from([1, 1, 3]),
    error=st.sampled_from([0.9, 1.0, 1.2]),
)
def test_steps_that_a_planner_foretells_are_those_it_plans_one_by_one(rows, kv_blocks, num_replicas, error):
    def document(**more):
        load = workload(
            *[sim(f"r{i}", row.pop("prompt"), row.pop("output"), **row) for i, row in enumerate(map(dict, rows))]
        )
        hw = hardware(kv_tokens=16 * kv_blocks, max_model_len=16 * kv_blocks, max_num_batched_tokens=256)
        result = run(
            load, SloPlanner(), hw=hw.slower(error), plan_model=hw.perf_model, plan_clock=lambda: 0.0,
            cluster=ClusterOptions(num_replicas=num_replicas, router="slo"), **more,
        )  # fmt: skip
        replicas = result.cluster.replicas
        counts = [(one.num_steps, one.tokens_computed, one.engine.num_preemptions, one.plan_model) for one in replicas]
        return (
            result.graded,
            result.simulated_s,
            result.cluster.num_hops,
            counts,
            sum(len(one.plan_s) for one in replicas),
        )

    *fast, few = document()
    *stepped, many = document(on_step=lambda _: None)
    assert fast == stepped
    assert few <= many


def test_a_prompt_of_one_token_is_no_decode_to_foretell(monkeypatch):
    """Beside decodes it, too, computes one token; but it starts in that step."""
    monkeypatch.setattr(replica, "CHECK_EVERY_STEPS", 1)
    load = workload(sim("a", 40, 60), sim("b", 1, 30, at_s=0.5), sim("c", 17, 40, at_s=0.9))
    result = run(load, SloPlanner(), plan_clock=lambda: 0.0)
    assert [one.outcome for one in result.graded] == ["met"] * 3


def test_a_planner_that_foretells_its_steps_is_asked_less_often():
    load = workload(*[sim(f"r{i}", 50, 100, at_s=0.05 * i) for i in range(4)])
    result = run(load, SloPlanner(), plan_clock=lambda: 0.0)
    assert len(result.replica.plan_s) < 0.5 * result.replica.num_steps
