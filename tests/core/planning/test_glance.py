"""What one look plans is what the planner plans with all of its questions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MODELS, add_decode, make_limits, make_request, make_state, random_state

from slos_serve.core.planner import MAX_CANDIDATES, SloPlanner, _Planning
from slos_serve.core.planning.glance import glance
from slos_serve.core.types import RequestTable, Tier


def at_a_glance(state, planner):
    share = planner.brief_fixed_multiple / planner.batch_fixed_multiple
    multiple = planner.batch_fixed_multiple
    return glance(state, batch_fixed_multiple=multiple, brief_share=share, reserve=planner.reserve, most=MAX_CANDIDATES)


@st.composite
def states(draw):
    """Draw promised decodes with more or less slack, newcomers that fit or do not, and some whose last token comes."""
    table, now_s = RequestTable(), 10.0
    for i in range(draw(st.integers(0, 12))):
        tpot_s, ahead_s = draw(st.sampled_from((0.03, 0.05, 0.1))), draw(st.floats(-0.02, 0.5))
        produced, rest = draw(st.integers(1, 300)), draw(st.integers(1, 300))
        prompt = draw(st.integers(1, 3000))
        index = add_decode(
            table, f"r{i}", now_s=now_s, prompt=prompt, produced=produced, predicted=produced + rest,
            ahead_s=ahead_s, tpot_s=tpot_s,
        )  # fmt: skip
        if draw(st.integers(0, 5)) == 0:
            table.rows["max_output_tokens"][index] = produced
    for i in range(draw(st.integers(0, 4))):
        slo = {"ttft_s": draw(st.floats(0.05, 3.0)), "tpot_s": draw(st.sampled_from((0.03, 0.1)))}
        arrival_s = now_s - draw(st.floats(0.0, 0.5))
        tier = draw(st.sampled_from((Tier.PENDING, Tier.PENDING, Tier.PROMISED, Tier.BEST_EFFORT)))
        table.add(make_request(f"n{i}", arrival_s=arrival_s, prompt=draw(st.integers(1, 3000)), **slo), tier=tier)
    held = int(table.rows["num_kv_blocks"].sum())
    spare = draw(st.sampled_from((1, 50, 20_000)))
    limits = make_limits(num_kv_blocks=held + spare, max_num_seqs=draw(st.sampled_from((8, 64))))
    return make_state(table, now_s=now_s, model=draw(st.sampled_from(list(MODELS.values()))), limits=limits)


@settings(max_examples=300, deadline=None)
@given(state=states(), reserve=st.sampled_from((1.0, 2.0)), brief=st.sampled_from((4.0, 8.0)))
def test_what_one_look_plans_is_what_all_questions_lead_to(state, reserve, brief) -> None:
    planner = SloPlanner(reserve=reserve, brief_fixed_multiple=brief)
    plan = at_a_glance(state, planner)
    if plan is not None:
        assert plan.to_json() == _Planning(planner, state).run().to_json()


@pytest.mark.parametrize("seed", range(12))
def test_a_state_in_the_middle_of_things_is_planned_alike(seed) -> None:
    planner = SloPlanner()
    state = random_state(seed, tight=False)
    plan = at_a_glance(state, planner)
    assert plan is None or plan.to_json() == _Planning(planner, state).run().to_json()


def easy():
    table = RequestTable()
    for i in range(8):
        add_decode(table, f"r{i}", now_s=10.0, ahead_s=0.3)
    table.add(make_request("new", arrival_s=10.0, prompt=200, ttft_s=1.0, tpot_s=0.1))
    return make_state(table, now_s=10.0)


def test_promised_decodes_and_a_newcomer_that_fits_are_planned_at_a_glance() -> None:
    plan = at_a_glance(easy(), SloPlanner())
    assert plan is not None
    assert {verdict.request_id: verdict.promised for verdict in plan.verdicts} == {"new": True}
    assert len(plan.batch.request_ids) == 9


def test_work_without_a_promise_a_late_promise_and_drafts_need_more_than_a_glance() -> None:
    state = easy()
    state.requests.rows["missed"][0] = 1
    assert at_a_glance(state, SloPlanner()) is None
    state = easy()
    state.requests.add(make_request("work", arrival_s=9.0))
    assert at_a_glance(state, SloPlanner()) is None
    state = easy()
    assert at_a_glance(replace(state, limits=make_limits(max_draft_length=3)), SloPlanner()) is None
