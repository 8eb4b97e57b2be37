"""The nouns refuse impossible values, and the request table keeps its rows and names together."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.perf import PerfModel
from slos_serve.core.types import (
    REQUEST_DTYPE,
    BatchEntry,
    BatchPlan,
    Limits,
    ReplicaState,
    Request,
    RequestTable,
    Slo,
    Status,
    Tier,
)


def request(name="a", **changes):
    values = {
        "request_id": name,
        "arrival_s": 10.0,
        "num_prompt_tokens": 100,
        "max_output_tokens": 50,
        "slo": Slo(ttft_s=1.0, tpot_s=0.1),
        "slo_class": "chat",
    }
    return Request(**(values | changes))


def limits(**changes):
    values = {
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "max_model_len": 4096,
        "block_size": 16,
        "num_kv_blocks": 1000,
    }
    return Limits(**(values | changes))


MODEL = PerfModel.from_terms([{"per_token_s": 1e-4, "fixed_s": 0.01}])


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "thinking_tpot_s", "e2e_s", "max_gap_s"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_promise_that_is_no_positive_time_is_an_error_that_names_it(name, bad):
    with pytest.raises(ValueError, match=name):
        Slo(**{name: bad})


def test_an_slo_without_promises_is_empty():
    assert Slo().is_empty
    assert not Slo(e2e_s=1.0).is_empty


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("arrival_s", math.nan),
        ("arrival_s", math.inf),
        ("num_prompt_tokens", 0),
        ("max_output_tokens", 0),
        ("weight", 0.0),
        ("weight", math.nan),
        ("weight", math.inf),
    ],
)
def test_an_impossible_request_is_an_error_that_names_the_field(name, bad):
    with pytest.raises(ValueError, match=name):
        request(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", 0),
        ("max_model_len", 0),
        ("block_size", 0),
        ("num_kv_blocks", 0),
        ("work_limit", 0),
        ("max_draft_length", -1),
        ("guard_s", -0.1),
        ("guard_s", math.nan),
        ("guard_s", math.inf),
    ],
)
def test_impossible_limits_are_an_error_that_names_the_field(name, bad):
    with pytest.raises(ValueError, match=name):
        limits(**{name: bad})


def test_a_new_row_holds_deadlines_in_the_clock_of_the_host():
    table = RequestTable()
    index = table.add(request(slo=Slo(ttft_s=1.0, e2e_s=9.0), thinks=True), predicted_output_tokens=1000.0)
    row = table.rows[index]
    assert row["ttft_deadline_s"] == 11.0
    assert row["e2e_deadline_s"] == 19.0
    assert math.isinf(row["tpot_s"])
    assert math.isinf(row["first_token_s"])
    assert row["is_thinking"] == 1
    assert row["predicted_output_tokens"] == 50  # never above what the client allows
    assert (row["status"], row["tier"]) == (Status.WAITING, Tier.PENDING)


def test_a_request_without_promises_is_best_effort_from_the_start():
    table = RequestTable()
    table.add(request(slo=Slo()), tier=Tier.PENDING)
    assert table.rows["tier"][0] == Tier.BEST_EFFORT


def test_a_live_id_cannot_be_added_again():
    table = RequestTable()
    table.add(request())
    with pytest.raises(ValueError, match="already live"):
        table.add(request())
    table.remove("a")
    table.add(request())
    assert len(table) == 1


def test_an_unknown_id_is_a_key_error():
    table = RequestTable()
    with pytest.raises(KeyError):
        table.remove("a")
    with pytest.raises(KeyError):
        table.index("a")


def test_a_slot_that_was_used_before_starts_clean():
    table = RequestTable()
    table.add(request("a"))
    fresh = table.rows.copy()
    for name in REQUEST_DTYPE.names:
        table.rows[name] = 7
    table.remove("a")
    table.add(request("a"))
    again = table.rows.copy()
    again["seq"] = fresh["seq"]
    assert again.tolist() == fresh.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200)), max_size=300))
def test_rows_and_names_stay_together_through_adding_and_removing(steps):
    table, live, seqs = RequestTable(), {}, []
    for add, number in steps:
        name = f"r{number}"
        if add and name not in live:
            index = table.add(request(name, num_prompt_tokens=number + 1, slo_class=f"c{number % 3}"))
            live[name] = number
            seqs.append(int(table.rows["seq"][index]))
        elif not add and name in live:
            table.remove(name)
            del live[name]
        assert len(table) == len(live)
    assert seqs == sorted(set(seqs))
    for name, number in live.items():
        assert name in table
        row = table.rows[table.index(name)]
        assert row["num_prompt_tokens"] == number + 1
        assert table.classes[row["class_index"]] == f"c{number % 3}"
        assert table.request_ids[table.index(name)] == name


def test_a_table_grows_and_keeps_what_it_held():
    table = RequestTable()
    for i in range(1000):
        table.add(request(f"r{i}", num_prompt_tokens=i + 1))
    assert table.rows["num_prompt_tokens"].tolist() == list(range(1, 1001))


def a_state(count=70):
    table = RequestTable(["chat", "coding"])
    for i in range(count):
        slo = Slo(ttft_s=0.1 * (i + 1)) if i % 2 else Slo(tpot_s=0.05, e2e_s=3.0)
        table.add(request(f"r{i}", slo=slo, slo_class=("chat", "coding")[i % 2]), predicted_output_tokens=i / 3)
    table.remove("r3")
    table.rows["first_token_s"][:5] = 12.345678901234567
    return ReplicaState(
        now_s=12.5,
        requests=table,
        num_free_kv_blocks=77,
        limits=limits(max_draft_length=3, guard_s=0.002),
        perf_model=MODEL,
        acceptance={"chat": 0.7},
        draft_lengths={"coding": 2},
    )


def test_a_state_survives_being_written_and_read():
    state = a_state()
    text = json.dumps(state.to_json(), allow_nan=False)
    for again in (ReplicaState.from_json(text), ReplicaState.from_json(json.loads(text))):
        assert again.to_json() == state.to_json()
        assert np.array_equal(again.requests.rows, state.requests.rows)
        assert again.requests.request_ids == state.requests.request_ids
        assert (again.limits, again.perf_model) == (state.limits, state.perf_model)
        assert again.requests.index("r9") == state.requests.index("r9")


def test_an_empty_table_survives_being_written_and_read():
    again = RequestTable.from_json(RequestTable(["chat"]).to_json())
    assert len(again) == 0
    assert again.classes == ["chat"]


def test_a_copy_is_independent_and_goes_on_counting():
    table = a_state().requests
    copy = table.copy()
    copy.rows["num_output_tokens"] = 9
    index = copy.add(request("new"))
    assert table.rows["num_output_tokens"].max() == 0
    assert copy.rows["seq"][index] > table.rows["seq"].max()
    assert "new" not in table


def test_a_state_of_another_schema_or_with_other_columns_is_an_error():
    data = a_state(5).to_json()
    with pytest.raises(ValueError, match="slos-serve-state/1"):
        ReplicaState.from_json(data | {"schema": "slos-serve-state/0"})
    del data["requests"]["columns"]["weight"]
    with pytest.raises(ValueError, match="weight"):
        ReplicaState.from_json(data)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_needs_a_time(bad):
    with pytest.raises(ValueError, match="now_s"):
        ReplicaState(now_s=bad, requests=RequestTable(), num_free_kv_blocks=1, limits=limits(), perf_model=MODEL)


def test_a_batch_can_be_read_as_one_entry_per_request():
    plan = BatchPlan(
        request_ids=["a", "b"], num_tokens=np.array([512, 1]), draft_lengths=np.array([0, 3]), preempted=["c"]
    )
    assert plan.entries == [
        BatchEntry(request_id="a", num_tokens=512),
        BatchEntry(request_id="b", num_tokens=1, draft_length=3),
    ]
