"""A promise weighs what the work is that is due for it, whatever numbers a client wrote."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from states import MODELS, STEPPED, add_decode, make_limits, make_request, make_state

from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning.demand import (
    DEADLINE,
    DUE,
    GAIN,
    GAP,
    LEAD,
    LEFT,
    NUM_COLUMNS,
    OUTPUT_LEFT,
    TPOT,
    VERIFY,
    needed_s,
    owe_next,
)
from slos_serve.core.types import RequestTable, Status, Tier

YEARS_30 = 30 * 365 * 86_400.0
seconds = st.floats(math.log(1e-6), math.log(YEARS_30)).map(math.exp)
maybe = st.none() | seconds


def beside(*, num_free=4, num_waiting=2, now_s=100.0):
    """Return a table with best-effort work that runs and waits."""
    table = RequestTable()
    for i in range(num_free):
        add_decode(table, f"free{i}", now_s=now_s, tier=Tier.BEST_EFFORT, ttft_s=None, tpot_s=None)
    for i in range(num_waiting):
        table.add(make_request(f"wait{i}", arrival_s=now_s - 1, prompt=300), tier=Tier.BEST_EFFORT)
    return table


def add_asking(table, slo, *, now_s=100.0, age_s=0.1, produced=1, predicted=200.0, limit=8000):
    """Add a promised decode that asks for `slo`, with its first token out just now."""
    index = table.add(
        make_request("asks", arrival_s=now_s - age_s, prompt=20, most=limit, **slo),
        tier=Tier.PROMISED,
        predicted_output_tokens=predicted,
    )
    row = table.rows[index]
    row["status"], row["num_computed_tokens"], row["num_output_tokens"] = Status.RUNNING, 19 + produced, produced
    row["num_kv_blocks"], row["first_token_s"], row["last_token_s"] = 2, now_s, now_s
    return index


def dues(slo, *, now_s=100.0, age_s=0.1, predicted=200):
    """Return when tokens 2, 3, ... of such a decode are due, counted from now."""
    ttft, tpot = slo.get("ttft_s"), slo.get("tpot_s")
    first = now_s if ttft is None else max(now_s, now_s - age_s + ttft)
    numbers = np.arange(1, predicted)
    due = first - now_s + numbers * (math.inf if tpot is None else tpot)
    if slo.get("max_gap_s"):
        due = np.minimum(due, slo["max_gap_s"] * numbers)
    return due


@pytest.mark.parametrize("tpot_s", [1e-6, 1e-3, 0.026])
def test_a_promise_that_is_due_in_years_leaves_best_effort_work_all_the_time(tpot_s):
    table = beside()
    add_asking(table, {"ttft_s": 1e9, "tpot_s": tpot_s}, predicted=8000)
    plan = SloPlanner().plan(make_state(table, now_s=100.0))
    names = set(plan.batch.request_ids)
    assert names == {"asks", "free0", "free1", "free2", "free3", "wait0", "wait1"}
    alone = SloPlanner().plan(make_state(beside(), now_s=100.0))
    assert plan.headroom_tokens_per_s > 0.99 * alone.headroom_tokens_per_s


@settings(deadline=None, max_examples=200)
@given(seconds, seconds, maybe, st.integers(2, 8000), st.sampled_from(sorted(MODELS)), st.floats(0, 1))
def test_a_kept_promise_lowers_the_headroom_by_no_more_than_its_work(ttft, tpot, gap, predicted, model, age):
    slo, age_s = {"ttft_s": ttft, "tpot_s": tpot, "max_gap_s": gap}, min(age * ttft, 3600.0)
    due = dues(slo, age_s=age_s, predicted=predicted)
    each_s = float((due / np.arange(1, predicted)).min())  # tokens this far apart are all in time
    lines = MODELS[model].as_array()
    token = lines[:, 0] + lines[:, 1] + 20 * lines[:, 2] + lines[:, 5]
    assume(each_s > 1.01 * token.max())
    table = beside()
    add_asking(table, slo, age_s=age_s, predicted=float(predicted))
    with_it, without = (
        SloPlanner().plan(make_state(rows, now_s=100.0, model=MODELS[model])).headroom_tokens_per_s
        for rows in (table, beside())
    )
    assert with_it >= without - 1.01 * float((token / lines[:, 0]).max()) / each_s - 1e-6 * without


@settings(deadline=None, max_examples=200)
@given(seconds, seconds, st.integers(2, 8000), st.sampled_from(sorted(MODELS)))
def test_best_effort_work_gets_the_time_that_is_not_needed_for_a_kept_promise(ttft, tpot, predicted, model):
    slo = {"ttft_s": ttft, "tpot_s": tpot}
    each_s = float((dues(slo, predicted=predicted) / np.arange(1, predicted)).min())
    model = MODELS[model]
    together_s = float((model.as_array() @ [7.0 + 600, 7.0, 7.0 * 600, 0.0, 600.0 * 300, 1.0]).max())
    assume(each_s > together_s)  # one batch of everyone is in time
    table = beside()
    add_asking(table, slo, predicted=predicted)
    plan = SloPlanner().plan(make_state(table, now_s=100.0, model=model))
    assert {"free0", "free1", "free2", "free3"} <= set(plan.batch.request_ids)


def demand_of(due, tpot, left, *, deadline=-math.inf, prompt=0.0, gain=1.0, gap=math.inf):
    demand = np.zeros((NUM_COLUMNS, 1))
    demand[LEFT], demand[DEADLINE], demand[DUE], demand[TPOT] = prompt, deadline, due, tpot
    demand[OUTPUT_LEFT], demand[GAIN], demand[VERIFY], demand[GAP] = left, gain, gain, gap
    return demand


@settings(deadline=None, max_examples=300)
@given(seconds, seconds, st.integers(1, 500), st.integers(1, 4), maybe)
def test_batches_as_far_apart_as_needed_are_in_time_for_every_token_but_none_farther(due, tpot, left, gain, gap):
    gap = math.inf if gap is None else gap
    demand = demand_of(due, tpot, float(left), gain=float(gain), gap=gap)
    each = needed_s(demand, 0, 0.0)
    batches = math.ceil(left / gain)
    ends = min(due, each) + each * np.arange(batches)
    at = due + gain * tpot * np.arange(batches)
    assert (ends <= at * (1 + 1e-9)).all()
    assert each <= gap
    if due >= gain * tpot and gap == math.inf:
        assert ends[-1] == pytest.approx(at[-1])


@given(seconds, seconds)
def test_the_schedule_is_not_forgotten_where_a_silence_ends_first(scheduled, latest):
    demand = demand_of(math.inf, 0.1, 5.0)
    owe_next(demand, 0, scheduled, latest)
    assert demand[DUE, 0] == min(scheduled, latest)
    assert demand[DUE, 0] + demand[LEAD, 0] == pytest.approx(scheduled)


def test_a_prompt_needs_no_batch_for_tokens_that_nobody_expects():
    assert needed_s(demand_of(math.inf, 1e-6, 1.0, deadline=5.0, prompt=100.0), 0, 0.0) == math.inf
    assert needed_s(demand_of(math.inf, 0.1, 11.0, deadline=5.0, prompt=100.0), 0, 0.0) == pytest.approx(0.6)
    assert needed_s(demand_of(math.inf, 0.1, 11.0, deadline=math.inf, prompt=100.0), 0, 0.0) == 0.1


def test_who_is_declined_for_numbers_that_no_engine_holds_does_not_crowd_the_others():
    def plan(**slo):
        table = beside(num_free=0, num_waiting=1, now_s=100.5)
        table.rows["num_prompt_tokens"] = 4000
        add_decode(table, "kept", now_s=100.5, tpot_s=1.0)
        add_decode(table, "declined", now_s=100.5, tier=Tier.BEST_EFFORT, **slo)
        batch = SloPlanner().plan(make_state(table, now_s=100.5, limits=make_limits(max_num_batched_tokens=8192))).batch
        return dict(zip(batch.request_ids, batch.num_tokens.tolist(), strict=True)).get("wait0", 0)

    assert plan(tpot_s=1e-6) > 4 * plan(tpot_s=0.05)


def test_a_pace_that_an_idle_engine_cannot_hold_is_declined_at_once_and_costs_no_search():
    table = beside()
    for i in range(50):
        table.add(
            make_request(f"evil{i}", arrival_s=100.0, ttft_s=5.0, tpot_s=1e-6, most=8000), predicted_output_tokens=8000
        )
    plan = SloPlanner().plan(make_state(table, now_s=100.0))
    assert {(v.promised, v.reason) for v in plan.verdicts} == {(False, "compute")}
    assert plan.work < 1000


@settings(deadline=None, max_examples=100)
@given(seconds, st.integers(1, 8000), st.sampled_from([None, 1.0, 5.0]))
def test_a_promise_with_endless_slack_keeps_nobody_else_from_being_promised(tpot, predicted, gap):
    def promised(evil):
        table = RequestTable()
        if evil:
            add_asking(table, {"ttft_s": 1e9, "tpot_s": tpot, "max_gap_s": gap}, predicted=float(predicted))
        for i in range(30):
            add_decode(table, f"old{i}", now_s=100.0, prompt=1000, predicted=300, tpot_s=0.03 if i % 3 else 0.1)
        for i in range(6):
            table.add(
                make_request(f"new{i}", arrival_s=100.0, prompt=1200, ttft_s=0.6 + 0.1 * i, tpot_s=0.05),
                predicted_output_tokens=200,
            )
        plan = SloPlanner().plan(make_state(table, now_s=100.0, model=STEPPED))
        return {entry.request_id for entry in plan.batch.entries if entry.request_id.startswith("new")}, plan

    (fair, _), (beside_it, plan) = promised(evil=False), promised(evil=True)
    assert plan.at_risk == ()
    assert len(beside_it) >= len(fair) - 1
