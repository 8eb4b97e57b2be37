"""What a plan does where its host cannot pay for a search, and where a search ends before it has an answer."""

from dataclasses import replace

from hypothesis import given, settings
from tests.core.referee import check_plan
from tests.core.states import add_decode, make_limits, make_request, make_state, states

from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import RequestTable, Tier


def looking(state, looks):
    return replace(state, limits=replace(state.limits, looks_at_new=looks))


@given(states())
@settings(deadline=None)
def test_a_plan_that_searches_for_no_new_promise_gives_none_and_keeps_those_there_are(state):
    plan = SloPlanner().plan(looking(state, False))
    check_plan(looking(state, False), plan)
    assert not any(verdict.promised for verdict in plan.verdicts)
    assert set(plan.at_risk) <= set(SloPlanner().plan(state).at_risk)


@given(states())
@settings(deadline=None)
def test_where_nobody_waits_for_a_promise_it_is_all_the_same(state):
    rows = state.requests.rows
    waits = (rows["num_output_tokens"] == 0) & (rows["tier"] != Tier.PROMISED)
    for name in [state.requests.request_ids[i] for i in waits.nonzero()[0].tolist()]:
        state.requests.remove(name)
    plans = [SloPlanner().plan(looking(state, looks)) for looks in (True, False)]
    assert plans[0].batch.request_ids == plans[1].batch.request_ids
    assert (plans[0].batch.num_tokens == plans[1].batch.num_tokens).all()
    assert plans[0].at_risk == plans[1].at_risk


def test_who_waits_for_a_promise_is_served_undecided_beside_a_plan_that_does_not_look():
    table = RequestTable()
    add_decode(table, "promised", ahead_s=2.0)
    table.add(make_request("new", prompt=300, ttft_s=5.0, tpot_s=0.1))
    plan = SloPlanner().plan(looking(make_state(table), False))
    tokens = dict(zip(plan.batch.request_ids, plan.batch.num_tokens.tolist(), strict=True))
    assert plan.verdicts == ()
    assert 0 < tokens["new"] < 300  # but for its last token, after which nothing could be promised


def test_best_effort_work_takes_no_time_of_promises_that_nobody_has_tried_to_the_end():
    table = RequestTable()
    for i in range(40):
        add_decode(table, f"d{i}", ahead_s=0.3, predicted=4000)
    table.add(make_request("free", prompt=6000))
    plans = {}
    for limit in (200_000, 40):
        state = make_state(table, limits=make_limits(work_limit=limit))
        plans[limit] = SloPlanner().plan(state)
        check_plan(state, plans[limit])
    assert "free" in plans[200_000].batch.request_ids
    assert plans[40].batch.predicted_s < 0.5 * plans[200_000].batch.predicted_s
