"""What a plan foretells is what would have been planned step by step, and every promise holds in it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from states import CONTEXT, MODELS, STEPPED, add_decode, make_limits, make_request, make_state

from slos_serve.core.perf import batch_seconds
from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning.steady import foretell
from slos_serve.core.slo.next_due import next_due_s
from slos_serve.core.types import RequestTable, Status, Tier

PLANNER = SloPlanner()


@st.composite
def decoding(draw):
    """Draw a table of decodes, some without a promise, with slack or without."""
    table = RequestTable()
    now_s = draw(st.floats(10.0, 20.0))
    for i in range(draw(st.integers(1, 24))):
        promised = draw(st.booleans())
        slo = {"tpot_s": draw(st.sampled_from((0.02, 0.05, 0.1))), "ahead_s": draw(st.floats(0.0, 0.4))}
        tier = Tier.PROMISED if promised else Tier.BEST_EFFORT
        prompt, produced = draw(st.integers(1, 4000)), draw(st.integers(1, 300))
        predicted = produced + draw(st.integers(1, 300))
        add_decode(table, f"r{i}", now_s=now_s, prompt=prompt, produced=produced, predicted=predicted, tier=tier, **slo)
    if draw(st.booleans()):
        table.add(make_request("new", arrival_s=now_s, prompt=300, ttft_s=draw(st.floats(0.1, 3.0)), tpot_s=0.1))
    model = draw(st.sampled_from(list(MODELS.values())))
    margins = {"margin_decode": draw(st.floats(1.0, 1.3)), "margin_prefill": 1.3}
    spare = draw(st.sampled_from((0, 3, 10_000)))
    held = int(table.rows["num_kv_blocks"].sum())
    seats = int(table.rows["status"].sum()) + draw(st.integers(0, 1))
    limits = make_limits(num_kv_blocks=held + spare + 1, max_num_seqs=seats)
    return make_state(table, now_s=now_s, model=replace(model, **margins), limits=limits)


def planned(state):
    """Return the plan, its verdicts written into the table, and what it foretells."""
    plan = PLANNER.plan(state)
    for verdict in plan.verdicts:
        tier = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
        state.requests.rows["tier"][state.requests.index(verdict.request_id)] = tier
    return plan, foretell(state, plan, 12)


def moved(state, order, num_tokens, start_s):
    """Return the state after so many tokens for each of `order`, the last of which are out at `start_s`."""
    table = state.requests.copy()
    rows = table.rows
    index = table.find(order)
    rows["status"][index] = Status.RUNNING
    rows["num_computed_tokens"][index] += num_tokens
    rows["num_output_tokens"][index] += 1
    rows["first_token_s"][index] = np.minimum(rows["first_token_s"][index], start_s)
    rows["last_token_s"][index] = start_s
    rows["num_kv_blocks"][index] = -(-rows["num_computed_tokens"][index] // state.limits.block_size)
    free = state.limits.num_kv_blocks - int(rows["num_kv_blocks"].sum())
    return replace(state, requests=table, now_s=start_s, num_free_kv_blocks=free)


@settings(max_examples=100, deadline=None)
@given(state=decoding())
def test_a_step_that_was_foretold_is_what_a_plan_at_its_latest_start_would_be(state) -> None:
    plan, told = planned(state)
    if told is None:
        return
    names, num_tokens = set(plan.batch.request_ids), plan.batch.num_tokens
    for start_s, blocks in zip(told.starts_s[1:], told.blocks[1:], strict=True):
        state = moved(state, plan.batch.request_ids, num_tokens, start_s)
        again, num_tokens = PLANNER.plan(state), 1
        assert state.num_free_kv_blocks >= blocks
        assert set(again.batch.request_ids) == names
        assert set(again.batch.num_tokens.tolist()) == {1}
        assert not again.at_risk
        assert not again.batch.preempted


@settings(max_examples=100, deadline=None)
@given(state=decoding())
def test_foretold_decodes_leave_no_promise_less_slack_than_it_had(state) -> None:
    plan, told = planned(state)
    if told is None:
        return
    promised, num_tokens = state.requests.rows["tier"] == Tier.PROMISED, plan.batch.num_tokens
    before = (next_due_s(state.requests.rows) - state.now_s)[promised]
    for start_s in told.starts_s[1:]:
        state, before_it = moved(state, plan.batch.request_ids, num_tokens, start_s), state
        assert (next_due_s(before_it.requests.rows)[promised] >= start_s - 1e-6).all()
        slack = (next_due_s(state.requests.rows) - start_s)[promised]
        assert (slack >= before - 1e-6).all() or max(num_tokens) > 1  # a prompt may take some, within its deadline
        before, num_tokens = slack, [1]


def test_a_plan_that_ends_a_prompt_goes_on_with_its_decodes() -> None:
    table = RequestTable()
    for i in range(8):
        add_decode(table, f"r{i}", now_s=10.0, produced=10 + i, ahead_s=0.2)
    table.add(make_request("new", arrival_s=10.0, prompt=300, ttft_s=1.0, tpot_s=0.1))
    state = make_state(table, now_s=10.0, model=CONTEXT)
    plan, told = planned(state)
    assert dict(zip(plan.batch.request_ids, plan.batch.num_tokens.tolist(), strict=True))["new"] == 300
    assert told is not None
    assert len(told.starts_s) == 12
    assert told.blocks[0] >= -(-300 // 16)


def test_most_steps_of_decodes_with_slack_are_foretold() -> None:
    table = RequestTable()
    for i in range(8):
        add_decode(table, f"r{i}", now_s=10.0, produced=10 + i, ahead_s=0.05)
    state = make_state(table, now_s=10.0)
    told = foretell(state, PLANNER.plan(state), 32)
    assert told is not None
    assert len(told.starts_s) == 32
    assert told.is_alone
    step_s = batch_seconds(STEPPED.as_array(), 8.0, 8.0, 0.0, 0.0, 0.0)
    assert math.isclose(told.starts_s[1] - told.starts_s[0], step_s)


def test_nothing_is_foretold_where_somebody_waits_for_a_verdict() -> None:
    table = RequestTable()
    add_decode(table, "r", now_s=10.0, ahead_s=0.05)
    table.add(make_request("new", arrival_s=10.0, prompt=4000, ttft_s=0.05))
    state = make_state(table, now_s=10.0)
    plan = PLANNER.plan(state)
    assert foretell(state, plan, 32) is None


def with_ends(*lefts):
    table = RequestTable()
    for i, left in enumerate(lefts):
        index = add_decode(table, f"r{i}", now_s=10.2, produced=20, ahead_s=0.05)
        table.rows["max_output_tokens"][index] = 20 + left
    return table


def test_what_is_foretold_ends_with_the_first_who_may_say_no_more_where_somebody_waits() -> None:
    table = with_ends(5, 40)
    table.add(make_request("waits", arrival_s=10.0, prompt=7000))
    state = make_state(table, now_s=10.2, model=CONTEXT, limits=make_limits(max_num_seqs=2))
    told = foretell(state, PLANNER.plan(state), 32)
    assert told is not None
    assert len(told.starts_s) == 5


def test_where_nobody_waits_an_end_cuts_nothing_short_and_who_has_ended_is_nobody() -> None:
    state = make_state(with_ends(5, 40, 0), now_s=10.2, model=CONTEXT)
    told = foretell(state, PLANNER.plan(state), 32)
    assert told is not None
    assert told.is_alone
    assert len(told.starts_s) == 32


def test_a_request_whose_last_token_is_in_flight_is_not_planned_and_keeps_its_seat() -> None:
    table = RequestTable()
    for i in range(3):
        add_decode(table, f"r{i}", now_s=10.0, produced=20, ahead_s=0.05)
    table.rows["max_output_tokens"][1] = 20
    table.add(make_request("new", arrival_s=9.9, prompt=100, ttft_s=1.0, tpot_s=0.1))
    state = make_state(table, now_s=10.0, limits=make_limits(max_num_seqs=3))
    plan = PLANNER.plan(state)
    assert "r1" not in plan.batch.request_ids
    assert "new" not in plan.batch.request_ids
    assert plan.batch.preempted == []
    assert np.array_equal(sorted(plan.batch.request_ids), ["r0", "r2"])
