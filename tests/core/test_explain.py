"""Why a request is promised or not: what binds, by how much, and what would have helped."""

import pytest
from tests.core.states import STEPPED, add_decode, make_limits, make_request, make_state

from slos_serve.core.explain import explain
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import RequestTable, Tier


def waiting(*requests):
    table = RequestTable()
    for request in requests:
        table.add(request)
    return table


def ask(state, name):
    return explain(state, name, SloPlanner(reserve=1.0))


def test_a_request_with_room_is_promised_with_its_slack():
    found = ask(make_state(waiting(make_request("a", ttft_s=1.0, tpot_s=0.1))), "a")
    assert found.is_promised
    assert found.binding == ""
    assert 0 < found.slack_s < 1
    assert found.predicted_ttft_s == pytest.approx(1.0 - found.slack_s, abs=1e-6)
    assert found.alone_s == pytest.approx(STEPPED.seconds(500, attention_pairs=125_000))


def test_a_promise_given_before_keeps_its_slack():
    state = make_state(waiting(make_request("a", ttft_s=1.0, tpot_s=0.1)))
    state.requests.rows["tier"] = Tier.PROMISED
    found = ask(state, "a")
    assert (found.tier, found.is_promised) == ("promised", True)
    assert 0 < found.slack_s < 1


def test_a_prompt_too_long_for_its_deadline_is_bound_by_compute_even_alone():
    state = make_state(waiting(make_request("a", prompt=4000, ttft_s=0.1, tpot_s=0.1)))
    found = ask(state, "a")
    assert (found.is_promised, found.binding) == (False, "compute")
    assert found.alone_s > 0.1
    assert found.later_s == pytest.approx(found.alone_s - 0.1, abs=0.15)
    assert found.slack_s == -found.later_s
    assert found.without == ()


def test_the_delay_that_is_named_is_enough_and_little_less_is_not():
    state = make_state(waiting(make_request("a", prompt=4000, ttft_s=0.1, tpot_s=0.1)))
    later = ask(state, "a").later_s
    for extra, promised in ((later, True), (later - 0.002, False)):
        moved = make_state(waiting(make_request("a", prompt=4000, ttft_s=0.1 + extra, tpot_s=0.1)))
        assert ask(moved, "a").is_promised is promised


def crowded(**limits):
    table = waiting()
    for i in range(4):
        add_decode(table, f"d{i}", now_s=0.0, ahead_s=0.05, weight=2.0)
    table.add(make_request("a", prompt=500, ttft_s=2.0, tpot_s=0.1))
    return make_state(table, limits=make_limits(**limits))


def test_missing_blocks_are_named_with_whose_blocks_they_are():
    found = ask(crowded(num_kv_blocks=190, max_model_len=1024), "a")
    assert (found.is_promised, found.binding) == (False, "memory")
    assert set(found.without) == {"d0", "d1", "d2", "d3"}


def test_missing_seats_are_named():
    found = ask(crowded(max_num_seqs=4), "a")
    assert (found.is_promised, found.binding) == (False, "seats")
    assert set(found.without) <= {f"d{i}" for i in range(4)}
    assert found.without


def test_a_deadline_that_has_passed_is_named_before_anything_else():
    state = make_state(waiting(make_request("a", ttft_s=0.5, tpot_s=0.1)), now_s=1.0)
    found = ask(state, "a")
    assert (found.is_promised, found.binding) == (False, "deadline-passed")
    assert found.slack_s == pytest.approx(-0.5)
    assert found.later_s > 0.5


def test_a_request_that_asks_for_nothing_says_so():
    found = ask(make_state(waiting(make_request("a"))), "a")
    assert (found.is_promised, found.binding, found.later_s) == (False, "requested", None)


def test_a_stream_that_was_late_says_so():
    table = waiting()
    add_decode(table, "d", ahead_s=-1.0)
    table.rows["missed"] = 1
    found = ask(make_state(table), "d")
    assert found.is_late


def test_explaining_leaves_the_state_as_it_was():
    state = crowded(num_kv_blocks=150, max_model_len=1024)
    before = state.to_json()
    ask(state, "a")
    assert state.to_json() == before


def test_an_unknown_request_is_a_key_error():
    with pytest.raises(KeyError):
        ask(make_state(waiting()), "nobody")
