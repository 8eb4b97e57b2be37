"""What every plan must be, whatever the state: executable, deterministic, and fair to what was promised."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from referee import batch_shape, check_plan
from states import (
    CONTEXT,
    MODELS,
    STEPPED,
    TPOTS,
    add_decode,
    by_name,
    make_limits,
    make_request,
    make_state,
    random_state,
    shuffled,
    states,
)

from slos_serve.core.perf import PerfModel
from slos_serve.core.planner import SloPlanner
from slos_serve.core.slo.next_due import next_due_s
from slos_serve.core.types import REASONS, ReplicaState, RequestTable, Status, Tier

PLANNERS = {"dp": SloPlanner(), "greedy": SloPlanner(admission_name="greedy")}
planners = st.sampled_from(sorted(PLANNERS)).map(PLANNERS.get)
examples = settings(max_examples=80, deadline=None)


def queue(count, *, seed=0, longest_ttft_s=5.0, now_s=0.0):
    """Return a table of candidates alone."""
    rng = np.random.default_rng(seed)
    table = RequestTable()
    for i in range(count):
        table.add(
            make_request(
                f"r{i}",
                arrival_s=now_s,
                prompt=int(rng.integers(1, 3000)),
                ttft_s=float(rng.uniform(0.1, longest_ttft_s)),
                tpot_s=float(rng.choice(TPOTS)),
                weight=float(rng.choice([1.0, 2.0])),
            )
        )
    return table


@examples
@given(states(), planners)
def test_an_engine_can_run_every_plan(state, planner):
    check_plan(state, planner.plan(state))


@examples
@given(states(), planners)
def test_the_same_state_gives_the_same_plan_and_is_left_alone(state, planner):
    before = json.dumps(state.to_json())
    first = by_name(planner.plan(state))
    assert json.dumps(state.to_json()) == before
    assert by_name(planner.plan(state)) == first
    assert by_name(planner.plan(ReplicaState.from_json(before))) == first


@examples
@given(states(), planners, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(state, planner, random):
    order = list(range(len(state.requests)))
    random.shuffle(order)
    document = state.to_json() | {"requests": shuffled(state.requests, order).to_json()}
    other = planner.plan(ReplicaState.from_json(document))
    plan = planner.plan(state)
    assert by_name(other) == by_name(plan)
    assert list(other.batch.request_ids) == list(plan.batch.request_ids)


@examples
@given(states(), planners)
def test_the_predicted_time_is_that_of_the_batch(state, planner):
    batch = planner.plan(state).batch
    shape = batch_shape(state, batch)
    expected = 0.0
    if len(batch.request_ids):
        expected = state.perf_model.seconds(
            shape["num_tokens"],
            shape["num_requests"],
            context_tokens=shape["context_tokens"],
            draft_steps=shape["draft_steps"],
            attention_pairs=shape["attention_pairs"],
        )
    assert batch.predicted_s == pytest.approx(expected, rel=1e-9, abs=1e-12)


@examples
@given(states(seqs=64), planners, st.integers(1, 30), st.integers(0, 10**6))
def test_best_effort_load_changes_no_verdict_and_no_promised_work(state, planner, count, seed):
    document = state.to_json()
    crowded = ReplicaState.from_json(document)
    table, rng = crowded.requests, np.random.default_rng(seed)
    free = crowded.num_free_kv_blocks
    seats = crowded.limits.max_num_seqs - int((table.rows["status"] == Status.RUNNING).sum())
    for i in range(count):
        prompt = int(rng.integers(1, 2000))
        need = -(-prompt // 16) + 1
        if rng.random() < 0.5 and need < free and seats > 0:
            add_decode(
                table, f"b{i}", prompt=prompt, produced=8, ttft_s=None, tpot_s=None, tier=Tier.BEST_EFFORT,
                now_s=state.now_s,
            )  # fmt: skip
            free -= int(table.rows["num_kv_blocks"][-1])
            seats -= 1
        else:
            table.add(make_request(f"b{i}", arrival_s=state.now_s, prompt=prompt))
    crowded = ReplicaState.from_json(crowded.to_json() | {"num_free_kv_blocks": free})
    alone, beside = planner.plan(state), planner.plan(crowded)
    check_plan(crowded, beside)
    assert by_name(beside)["verdicts"] == by_name(alone)["verdicts"]
    assert beside.at_risk == alone.at_risk
    rows, ids = state.requests.rows, state.requests.request_ids
    # a TTFT alone is kept with the first token: nothing is owed after it
    owed = (rows["tier"] == Tier.PROMISED) & (rows["missed"] == 0) & np.isfinite(next_due_s(rows))
    promised = {ids[i] for i in np.flatnonzero(owed)} - set(alone.at_risk)
    promised |= {v.request_id for v in alone.verdicts if v.promised}
    share = {name: tokens for name, tokens in by_name(alone)["batch"].items() if name in promised}
    assert {name: tokens for name, tokens in by_name(beside)["batch"].items() if name in promised} == share


@pytest.mark.parametrize("name", sorted(PLANNERS))
@pytest.mark.parametrize("longest_ttft_s", [0.5, 5.0, 60.0])
def test_thousands_of_candidates_are_decided_within_the_work_limit(name, longest_ttft_s):
    state = make_state(queue(3000, longest_ttft_s=longest_ttft_s), limits=make_limits(max_num_seqs=256))
    plan = PLANNERS[name].plan(state)
    check_plan(state, plan)
    assert any(verdict.promised for verdict in plan.verdicts)
    assert plan.work <= 1.5 * state.limits.work_limit


@pytest.mark.parametrize("work_limit", [1, 100, 10_000])
def test_a_plan_without_time_to_search_is_still_a_plan(work_limit):
    table = queue(50)
    for i in range(20):
        add_decode(table, f"d{i}")
    state = make_state(table, limits=make_limits(work_limit=work_limit))
    plan = SloPlanner().plan(state)
    check_plan(state, plan)
    assert plan.at_risk == ()
    assert len(plan.batch.request_ids) > 0
    # one round over everyone is always granted
    assert plan.work <= 2 * work_limit + 50 * len(table)


def test_an_idle_engine_has_nothing_to_do_and_all_its_headroom():
    plan = SloPlanner().plan(make_state(RequestTable()))
    assert (list(plan.batch.request_ids), plan.verdicts, plan.at_risk) == ([], (), ())
    assert plan.batch.predicted_s == 0.0
    assert plan.headroom_tokens_per_s == pytest.approx(2048 / STEPPED.seconds(2048), rel=0.01)


def test_headroom_falls_with_every_promised_decode():
    rates = []
    for count in (0, 1, 20, 60):
        table = RequestTable()
        for i in range(count):
            add_decode(table, f"r{i}")
        rates.append(SloPlanner().plan(make_state(table)).headroom_tokens_per_s)
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4


@pytest.mark.parametrize(
    "bad",
    [{"admission_name": "best"}, {"batch_fixed_multiple": 0}, {"reserve": 0.5}, {"beam_width": 0}],
)
def test_an_impossible_option_is_an_error(bad):
    with pytest.raises(ValueError, match="expected"):
        SloPlanner(**bad)


# -- strange input ----------------------------------------------------------------------------------


@examples
@given(states())
def test_what_a_plan_says_is_made_of_numbers(state):
    plan = SloPlanner().plan(state)
    assert math.isfinite(plan.batch.predicted_s)
    assert math.isfinite(plan.headroom_tokens_per_s)
    assert plan.headroom_tokens_per_s >= 0
    for verdict in plan.verdicts:
        assert math.isfinite(verdict.slack_s)
        assert verdict.predicted_ttft_s > 0
        assert math.isfinite(verdict.predicted_ttft_s) == verdict.promised
        assert verdict.reason in REASONS


def test_a_prompt_without_tokens_never_reaches_the_planner():
    with pytest.raises(ValueError, match="num_prompt_tokens"):
        make_request("empty", prompt=0)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, float("inf")])
def test_a_time_that_is_no_time_never_reaches_the_planner(bad):
    with pytest.raises(ValueError, match="tpot_s"):
        make_request("a", ttft_s=1.0, tpot_s=bad)
    if bad not in (-1.0, 0.0):
        with pytest.raises(ValueError, match="now_s"):
            make_state(RequestTable(), now_s=bad)


def test_a_cost_that_falls_with_size_is_refused():
    with pytest.raises(ValueError, match="finite coefficients >= 0"):
        PerfModel.from_terms([{"per_token_s": -1e-5, "fixed_s": 0.01}])


def test_a_deadline_in_the_past_is_declined_and_served_all_the_same():
    table = RequestTable()
    table.add(make_request("late", arrival_s=0.0, ttft_s=0.5, tpot_s=0.1))
    plan = SloPlanner().plan(make_state(table, now_s=3.0))
    assert [(v.promised, v.reason) for v in plan.verdicts] == [(False, "deadline-passed")]
    assert list(plan.batch.request_ids) == ["late"]


def test_a_prompt_that_no_engine_could_prefill_in_time_is_declined_at_once():
    table = RequestTable()
    table.add(make_request("long", prompt=6000, ttft_s=0.1, tpot_s=0.1))
    plan = SloPlanner().plan(make_state(table))
    assert [(v.promised, v.reason) for v in plan.verdicts] == [(False, "compute")]


def test_a_request_larger_than_the_memory_is_declined_for_memory_and_stops_nobody():
    table = RequestTable()
    table.add(make_request("big", prompt=5000, ttft_s=5.0, tpot_s=0.1))
    table.add(make_request("small", prompt=100, ttft_s=1.0, tpot_s=0.1))
    plan = SloPlanner().plan(make_state(table, limits=make_limits(num_kv_blocks=100)))
    assert {v.request_id: (v.promised, v.reason) for v in plan.verdicts} == {
        "big": (False, "memory"),
        "small": (True, ""),
    }
    assert list(plan.batch.request_ids) == ["small"]


@pytest.mark.parametrize(("left", "beside", "expected"), [(5, True, 4), (1, True, None), (5, False, 5), (1, False, 1)])
def test_beside_promised_work_a_prompt_ends_only_with_a_promise(left, beside, expected):
    table = RequestTable()
    if beside:
        add_decode(table, "promised", ahead_s=5.0)
    index = table.add(make_request("waits", prompt=100, ttft_s=0.5, tpot_s=0.025))
    row = table.rows[index]
    row["status"], row["num_computed_tokens"], row["num_kv_blocks"] = Status.RUNNING, 100 - left, 7
    unsure = replace(STEPPED, margin_prefill=1.2, margin_decode=1.2)  # no step is surely that fast
    plan = SloPlanner().plan(make_state(table, model=unsure))
    assert not plan.verdicts
    assert {entry.request_id: entry.num_tokens for entry in plan.batch.entries}.get("waits") == expected


@pytest.mark.parametrize(
    ("declined", "now_s", "longest"), [(False, 0.5, math.inf), (True, 0.5, 1.5), (True, 7.05, math.inf)]
)
def test_where_promises_are_declined_best_effort_work_mostly_lengthens_only_brief_steps(declined, now_s, longest):
    table = RequestTable()
    add_decode(table, "promised", now_s=now_s, ahead_s=2.0)
    table.add(make_request("bulk", prompt=3000))
    if declined:
        add_decode(table, "declined", now_s=now_s, tier=Tier.BEST_EFFORT)
    plan = SloPlanner().plan(make_state(table, now_s=now_s))
    tokens = {entry.request_id: entry.num_tokens for entry in plan.batch.entries}
    one_s = STEPPED.seconds(1.0)
    assert tokens["promised"] == 1
    assert tokens["bulk"] >= 100
    assert plan.batch.predicted_s * STEPPED.margin_prefill <= longest * one_s + 1e-9
    assert math.isfinite(longest) or plan.batch.predicted_s > 2 * one_s


def test_a_promise_whose_first_token_is_late_holds_no_other_back_and_comes_before_best_effort_work():
    table = RequestTable()
    late = table.add(make_request("late", arrival_s=0.0, prompt=3000, ttft_s=1.0, tpot_s=0.1), tier=Tier.PROMISED)
    add_decode(table, "declined", now_s=2.5, tier=Tier.BEST_EFFORT)
    add_decode(table, "promised", now_s=2.5, ahead_s=2.0)
    table.add(make_request("bulk", arrival_s=-9.0, prompt=3000))
    table.add(make_request("new", arrival_s=2.5, prompt=50, ttft_s=0.5, tpot_s=0.1))
    assert table.rows["missed"][late] == 0  # no token has said so
    plan = SloPlanner().plan(make_state(table, now_s=2.5))
    assert {v.request_id: v.promised for v in plan.verdicts} == {"new": True}
    assert plan.at_risk == ()
    tokens = {entry.request_id: entry.num_tokens for entry in plan.batch.entries}
    assert tokens["late"] > 100
    assert "bulk" not in tokens


def test_a_broken_promise_gives_up_its_blocks_after_best_effort_work():
    table = RequestTable()
    add_decode(table, "bulk", prompt=1600, ttft_s=None, tpot_s=None, tier=Tier.BEST_EFFORT)
    broken = add_decode(table, "broken", prompt=1600)  # newer
    table.rows["missed"][broken] = 1
    held = int(table.rows["num_kv_blocks"].sum())
    table.add(make_request("new", prompt=1000, ttft_s=1.0, tpot_s=0.1))
    plan = SloPlanner().plan(make_state(table, limits=make_limits(num_kv_blocks=held + 10)))
    assert plan.batch.preempted == ["bulk"]


def test_a_prompt_of_one_token_is_served_like_any_other():
    table = RequestTable()
    table.add(make_request("tiny", prompt=1, most=1, ttft_s=0.5, tpot_s=0.1))
    plan = SloPlanner().plan(make_state(table))
    assert [v.promised for v in plan.verdicts] == [True]
    assert plan.batch.num_tokens.tolist() == [1]


def test_a_prompt_that_is_all_in_the_cache_still_computes_its_last_token():
    table = RequestTable()
    index = table.add(make_request("hit", prompt=512, ttft_s=0.5, tpot_s=0.1))
    table.rows["num_cached_tokens"][index] = 511
    plan = SloPlanner().plan(make_state(table))
    assert plan.batch.num_tokens.tolist() == [1]


def test_tiers_a_microsecond_apart_are_planned_like_one():
    table = RequestTable()
    for i in range(60):
        table.add(make_request(f"r{i}", prompt=40, ttft_s=2.0, tpot_s=0.1 + 1e-6 * i))
    state = make_state(table)
    plan = SloPlanner().plan(state)
    check_plan(state, plan)
    assert sum(v.promised for v in plan.verdicts) == 60


def test_paces_slower_than_any_request_lasts_and_faster_than_any_step_are_both_answered():
    table = RequestTable()
    table.add(make_request("glacial", ttft_s=1.0, tpot_s=1e6))
    table.add(make_request("instant", ttft_s=1.0, tpot_s=1e-6))
    state = make_state(table)
    plan = SloPlanner().plan(state)
    check_plan(state, plan)
    verdicts = {v.request_id: v.promised for v in plan.verdicts}
    assert verdicts["glacial"] is True
    assert verdicts.get("instant", False) is False


# -- promises that wait, and brief batches ------------------------------------------------------------


def promised_by(plan):
    return {v.request_id for v in plan.verdicts if v.promised}


def test_a_promise_is_given_at_once_where_prompts_could_take_twice_as_long():
    table = RequestTable()
    table.add(make_request("easy", prompt=1000, ttft_s=1.0, tpot_s=0.1))
    state = make_state(table)
    assert STEPPED.prefill_seconds(1000, 2048) < 0.3
    assert promised_by(SloPlanner().plan(state)) == {"easy"}


def test_a_costly_request_without_reserve_gives_way_to_cheaper_newcomers():
    alone_s = STEPPED.prefill_seconds(6000, 512)
    limits = make_limits(max_num_batched_tokens=512, max_model_len=8192)
    table = RequestTable()
    table.add(make_request("costly", prompt=6000, ttft_s=1.2 * alone_s, tpot_s=0.1))
    first = SloPlanner().plan(make_state(table, limits=limits))
    assert "costly" in first.batch.request_ids
    assert not first.verdicts
    assert promised_by(SloPlanner(reserve=1.0).plan(make_state(table, limits=limits))) == {"costly"}
    for i in range(8):
        table.add(make_request(f"cheap{i}", prompt=400, ttft_s=0.5 * alone_s, tpot_s=0.1))
    crowded = SloPlanner().plan(make_state(table, limits=limits))
    assert "costly" not in promised_by(crowded)
    assert any(name.startswith("cheap") for name in crowded.batch.request_ids)


def test_a_request_without_reserve_is_promised_with_the_batch_that_ends_its_prompt():
    table = RequestTable()
    table.add(make_request("last", prompt=500, ttft_s=1.2 * STEPPED.seconds(500), tpot_s=0.1))
    assert promised_by(SloPlanner().plan(make_state(table))) == {"last"}


def test_prompts_go_in_brief_batches_where_deadlines_hold_with_them():
    fixed_s = STEPPED.seconds(1)
    limits = make_limits(max_num_batched_tokens=8192)
    batch_s = {}
    for ttft_s in (10.0, 1.2 * STEPPED.prefill_seconds(3000, 8192)):
        table = RequestTable()
        table.add(make_request("long", prompt=3000, ttft_s=ttft_s, tpot_s=1.0))
        batch_s[ttft_s] = SloPlanner().plan(make_state(table, limits=limits)).batch.predicted_s
    at_leisure_s, hurried_s = batch_s.values()
    assert at_leisure_s <= 4 * fixed_s + 1e-9
    assert hurried_s > at_leisure_s


# -- one source, two ways to run it -----------------------------------------------------------------

RECORDED = [
    {"seed": 1, "num_requests": 12},
    {"seed": 2, "num_requests": 30, "model": "attention", "blocks": 600},
    {"seed": 3, "num_requests": 40, "model": "context", "seqs": 16, "budget": 256},
]

PLAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from states import by_name, random_state
from slos_serve.core.jit import HAS_NUMBA
from slos_serve.core.perf import batch_seconds
from slos_serve.core.planner import SloPlanner
assert not hasattr(batch_seconds, "py_func")
for options in json.loads(sys.argv[2]):
    print(json.dumps(by_name(SloPlanner().plan(random_state(**options))), default=str))
"""


def test_compiled_and_plain_python_make_the_same_plans():
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PLAIN, str(Path(__file__).parent), json.dumps(RECORDED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for options, line in zip(RECORDED, done.stdout.splitlines(), strict=True):
        compiled = json.loads(json.dumps(by_name(SloPlanner().plan(random_state(**options))), default=str))
        plain = json.loads(line)
        for key in ("batch", "preempted", "at_risk", "work"):
            assert plain[key] == compiled[key]
        assert sorted(plain["verdicts"]) == sorted(compiled["verdicts"])
        assert plain["predicted_s"] == pytest.approx(compiled["predicted_s"], rel=1e-12)


def test_the_states_drawn_here_hold_every_kind_of_request():
    rows = np.concatenate([random_state(seed, model=name).requests.rows for seed in range(10) for name in MODELS])
    assert set(rows["tier"]) == {int(tier) for tier in Tier}
    assert set(rows["status"]) == {int(status) for status in Status}
    assert rows["missed"].any()
    assert CONTEXT.lines != STEPPED.lines
