"""Best-effort work is shared out between tenants, and nobody stands still for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import add_decode, make_limits, make_request, make_state

from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning.ageing import STILL_S, TURN_S, Ageing
from slos_serve.core.types import RequestTable, Tier


def with_tenant(table, index, tenant):
    table.rows["tenant"][index] = tenant
    return index


def add_free(table, name, tenant, *, arrival_s=0.0, prompt=400):
    index = table.add(make_request(name, arrival_s=arrival_s, prompt=prompt), tier=Tier.BEST_EFFORT)
    return with_tenant(table, index, tenant)


def test_the_oldest_of_each_tenant_comes_before_anybodys_next():
    table = RequestTable()
    for i in range(6):
        add_free(table, f"many{i}", 7, arrival_s=float(i))
    add_free(table, "one", 8, arrival_s=9.0)
    add_decode(table, "promised", now_s=10.0, tpot_s=0.1)
    state = make_state(table, now_s=10.0, limits=make_limits(max_num_batched_tokens=900))
    tokens = {entry.request_id: entry.num_tokens for entry in SloPlanner().plan(state).batch.entries}
    assert tokens["many0"] == tokens["one"] == 400
    table.rows["tenant"] = 7
    tokens = {entry.request_id: entry.num_tokens for entry in SloPlanner().plan(state).batch.entries}
    assert tokens["many0"] == tokens["many1"] == 400
    assert "one" not in tokens


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_turns_count_the_older_requests_of_a_tenant(tenants, data):
    from slos_serve.core.planning.step import _turns

    arrival = np.array([float(data.draw(st.integers(0, 5))) for _ in tenants])
    seq = np.arange(len(tenants))
    turns = _turns(np.array(tenants), arrival, seq).tolist()
    key = list(zip(arrival, seq, strict=True))
    older = [
        sum(t == tenants[i] and k < key[i] for t, k in zip(tenants, key, strict=True)) for i in range(len(tenants))
    ]
    assert turns == (older if len(set(tenants)) > 1 else [0] * len(tenants))


@pytest.mark.parametrize("num_tenants", [2, 5])
def test_each_tenant_gets_a_turn_in_bounded_time_beside_endless_requests(num_tenants):
    table, ageing = RequestTable(), Ageing(make_limits())
    for tenant in range(num_tenants):
        for i in range(3):
            add_free(table, f"t{tenant}-{i}", tenant)
    add_decode(table, "promised")
    begun = {}
    for now in np.arange(1.0, STILL_S + (num_tenants + 1) * TURN_S, 1.0):
        ageing.step(table, now)
        if ageing.chosen is not None:
            index = table.index(ageing.chosen)
            begun.setdefault(int(table.rows["tenant"][index]), now)
            table.rows["last_token_s"][index] = now  # served, and it never ends
            assert (table.rows["tier"] == Tier.PROMISED).sum() == 2
    assert sorted(begun) == list(range(num_tenants))
    assert max(begun.values()) <= STILL_S + (num_tenants - 1) * TURN_S + 2


def test_one_tenant_alone_keeps_its_turn_until_the_request_ends():
    table, ageing = RequestTable(), Ageing()
    for i in range(3):
        add_free(table, f"r{i}", 0, arrival_s=float(i))
    add_decode(table, "promised")
    for now in np.arange(40.0, 200.0, 1.0):
        ageing.step(table, now)
        assert ageing.chosen == "r0"
    table.remove("r0")
    ageing.step(table, 201.0)
    assert ageing.chosen == "r1"


def test_what_the_memory_can_never_hold_does_not_take_the_turn():
    table = RequestTable()
    add_free(table, "huge", 0, arrival_s=0.0, prompt=5000)
    add_free(table, "small", 0, arrival_s=1.0)
    add_decode(table, "promised")
    ageing = Ageing(make_limits(num_kv_blocks=100))
    ageing.step(table, 60.0)
    assert ageing.chosen == "small"


def test_states_of_older_records_know_no_tenant():
    table = RequestTable()
    add_free(table, "a", 5)
    document = table.to_json()
    assert RequestTable.from_json(document).rows["tenant"].tolist() == [5]
    del document["columns"]["tenant"]
    assert RequestTable.from_json(document).rows["tenant"].tolist() == [0]
