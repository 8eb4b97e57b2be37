from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from slos_serve.bench import staged
from slos_serve.bench.compare import save_run
from slos_serve.bench.grade import grade_run
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.staged_report import counted, holds_until, ratio, run_counts, summary
from slos_serve.core.perf import PerfModel
from slos_serve.records.profile import Profile

CPU = PerfModel.from_terms([{"per_token_s": 5e-4, "per_request_s": 1e-3, "per_pair_s": 1e-7, "fixed_s": 0.02}])


def workload(name):
    profile = Profile(perf_model=CPU, max_num_batched_tokens=512, document={})
    return Scaled(profile=profile, mix={name: 1.0}, lengths={name: staged.LENGTHS[name]})


@pytest.fixture
def reasoning():
    return staged.sessions_of(workload("reasoning"), rate_rps=2.0, duration_s=10, seed=1)


@pytest.fixture
def tools():
    return staged.sessions_of(workload("tool"), rate_rps=4.0, duration_s=10, seed=1)


def test_the_same_seed_gives_the_same_sessions(reasoning):
    again = staged.sessions_of(workload("reasoning"), rate_rps=2.0, duration_s=10, seed=1)
    assert (again, len(again)) == (reasoning, 20)


def test_the_end_token_that_the_engine_forces_is_the_last_of_the_thinking_span(reasoning):
    for ((_, request),) in reasoning:
        assert request.prompt_token_ids[-1] == staged.THINK_START[1]
        assert request.extra["thinking_token_budget"] + 1 == request.thinking_tokens < request.output_tokens
        assert request.slo.thinking_tpot_s == pytest.approx(request.slo.tpot_s / 2)


def test_a_round_has_the_prompt_before_it_and_more_and_the_last_has_more_time(tools):
    for session in tools:
        rounds = [request for _, request in session]
        for before, after in pairwise(rounds):
            assert after.prompt_token_ids[: len(before.prompt_token_ids)] == before.prompt_token_ids
            assert len(after.prompt_token_ids) > len(before.prompt_token_ids)
        assert [request.extra["slo"]["stage"] for request in rounds] == ["loop"] * (len(rounds) - 1) + ["final"]
        assert rounds[-1].slo.tpot_s == pytest.approx(2 * rounds[0].slo.tpot_s)


def test_what_is_asked_for_without_stages_is_never_what_is_graded(reasoning):
    scaled = workload("reasoning")
    ((_, request),) = reasoning[0]
    asked = staged.without_stages(scaled)(request)
    assert asked.slo == request.slo
    assert asked.extra["slo"]["class"] == "chat"
    assert asked.extra["slo"]["tpot_ms"] == pytest.approx(scaled.tightest_tpot_s * 1e3)
    assert "thinking_tpot_ms" not in asked.extra["slo"]


async def test_rounds_come_one_after_the_other_and_those_after_a_failure_count_as_failed(engine, serve, tools):
    session = next(session for session in tools if len(session) >= 3)
    short = [(0.05 if i else 0.0, replace(request, offset_s=0.0)) for i, (_, request) in enumerate(session)]
    async with serve(engine) as url:
        results = await staged.offer_sessions(url, [short])
        ends = [(result.sent_s, result.finished_s) for result in results]
        assert all(after[0] >= before[1] + 0.05 for before, after in pairwise(ends))
        engine.status = 500
        results = await staged.offer_sessions(url, [short])
    grades = grade_run([request for _, request in short], results)
    assert {grade.graded.outcome for grade in grades} == {"failed"}
    assert [result.error for result in results][1:] == ["never sent"] * (len(short) - 1)


@pytest.mark.parametrize(
    ("points", "rate"),
    [([(1.0, 1.0), (2.0, 0.8)], 1.5), ([(1.0, 0.8), (2.0, 0.7)], None), ([(1.0, 1.0), (2.0, 0.95)], None)],
)
def test_capacity_is_interpolated_between_rates_that_bracket_it_and_never_extrapolated(points, rate):
    assert holds_until(points) == (None if rate is None else pytest.approx(rate))


def run(setting, seed, outcomes, *, waited=0.0, discarded=0):
    rows = [
        {"request_id": name, "outcome": outcome, "stages": {"prefill": outcome, "thinking": "", "answer": ""}}
        for name, outcome in outcomes.items()
    ]
    met = sum(outcome == "met" for outcome in outcomes.values())
    zeros = dict.fromkeys(("missed", "declined", "rejected", "failed", "promised", "kept"), 0)
    entry = {"num_requests": len(rows), "met": met, "attainment": met / len(rows), **zeros}
    return {
        "schema": "slos-serve-run/1",
        "setting": setting,
        "rate_rps": 1.0,
        "seed": seed,
        "entry": entry,
        "requests": rows,
        "waited": waited,
        "num_discarded": discarded,
        "is_disturbed": waited > 0.1,
    }


def test_disturbed_runs_of_any_system_are_left_out_and_counted(tmp_path):
    met = {"s300-0-0": "met"}
    for one in (
        run("slos-serve", 300, met),
        run("slos-serve", 301, met, waited=0.4, discarded=3),
        run("vllm-192", 300, met, waited=0.4, discarded=3),
        run("vllm-192", 301, met, discarded=1),
        run("vllm-192", staged.SELECTION_SEED, met),
    ):
        save_run(one, tmp_path / "runs")
    assert [(one["setting"], one["seed"]) for one in counted(tmp_path)] == [("slos-serve", 300), ("vllm-192", 301)]
    saved = [run("slos-serve", 300, met), run("slos-serve", 301, met, waited=0.4, discarded=3)]
    assert run_counts(saved) == {"slos-serve": {"runs": 2, "left_out": 1, "discarded": 3}}


def test_a_session_is_met_where_all_its_rounds_are_and_its_last_round_is_the_final_one():
    outcomes = {"s300-0-0": "met", "s300-0-1": "missed", "s300-0-2": "met", "s300-1-0": "met", "s300-1-1": "met"}
    found = summary([run("slos-serve", 300, outcomes)])
    assert found["sessions_met"] == 0.5
    assert found["rounds"] == {"loop rounds": pytest.approx(2 / 3), "final rounds": 1.0}


def test_the_ratio_of_capacities_is_to_the_better_stock_setting_and_paired_by_seed():
    def points(*shares):
        return list(zip((1.0, 2.0, 3.0), shares, strict=True))

    systems = {
        "slos-serve": {"300": points(1.0, 1.0, 0.8), "301": points(1.0, 1.0, 0.8)},
        "vllm-192": {"300": points(1.0, 0.8, 0.5), "301": points(1.0, 0.8, 0.5)},
        "vllm-192-drafts": {"300": points(0.95, 0.7, 0.5), "301": points(0.95, 0.7, 0.5)},
    }
    found = ratio(systems)
    assert (found["value"], found["interval"]) == (pytest.approx(2.5 / 1.5), pytest.approx([2.5 / 1.5] * 2))
    assert (found["num_seeds"], found["is_bracketed"]) == (2, True)
    held = {**systems, "slos-serve": {seed: points(1.0, 1.0, 1.0) for seed in ("300", "301")}}
    assert (ratio(held)["value"], ratio(held)["is_bracketed"]) == (pytest.approx(3.0 / 1.5), False)
    assert ratio({"slos-serve": systems["slos-serve"]}) is None
