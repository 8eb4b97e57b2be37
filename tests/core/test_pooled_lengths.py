"""Output lengths of many requests together: drawn evenly, planned as a sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import add_decode, make_limits, make_request, make_state

from slos_serve.core.lengths import LengthModel, length_quantile
from slos_serve.core.planning.columns import Columns, planned_rests
from slos_serve.core.planning.demand import OUTPUT_LEFT
from slos_serve.core.types import RequestTable, Tier


def test_turns_fill_the_range_evenly_over_requests_and_over_draws():
    for turns in (
        [length_quantile(seq, 0) for seq in range(200)],
        [length_quantile(7, produced) for produced in range(200)],
    ):
        counts, _ = np.histogram(turns, bins=10, range=(0, 1))
        assert counts.min() >= 15
        assert counts.max() <= 25


def test_lengths_drawn_for_many_add_up_to_what_many_outputs_take():
    model, rng = LengthModel(), np.random.default_rng(5)
    for value in rng.lognormal(5.5, 0.6, size=2000):
        model.observe("a", 100, int(value))
    drawn = sum(model.predict("a", 100, 10_000, quantile=length_quantile(seq, 0)) for seq in range(300))
    totals = rng.lognormal(5.5, 0.6, size=(200, 300)).sum(axis=1)
    assert np.quantile(totals, 0.01) < drawn < np.quantile(totals, 0.99)


def table_of(num, *, predicted=1000.0, drawn=400.0, produced=20, tier=Tier.PROMISED):
    table = RequestTable()
    for i in range(num):
        add_decode(table, f"r{i}", predicted=predicted, produced=produced, tier=tier)
    table.rows["drawn_output_tokens"] = drawn
    return table


def test_one_request_alone_is_planned_with_its_high_quantile():
    assert planned_rests(table_of(1).rows) == pytest.approx([980.0])


@pytest.mark.parametrize("num", [4, 100])
def test_the_excess_of_many_shrinks_with_the_root_of_their_number(num):
    assert planned_rests(table_of(num).rows) == pytest.approx(np.full(num, 380.0 + 600.0 / num**0.5))


def test_best_effort_work_that_runs_changes_nothing_for_what_is_promised():
    table = table_of(4)
    alone = planned_rests(table.rows)
    for i in range(30):
        add_decode(table, f"b{i}", predicted=1000.0, ttft_s=None, tpot_s=None, tier=Tier.BEST_EFFORT)
    assert planned_rests(table.rows)[:4] == pytest.approx(alone)


def test_who_is_not_promised_and_holds_nothing_is_planned_with_its_high_quantile():
    table = table_of(4)
    table.add(make_request("new"), predicted_output_tokens=200.0)
    table.rows["drawn_output_tokens"][4] = 1.0
    rests = planned_rests(table.rows)
    assert rests[4] == table.rows["predicted_output_tokens"][4]
    assert (rests[:4] < 980.0).all()


@given(
    st.lists(
        st.tuples(st.floats(1, 4000), st.floats(1, 4000), st.integers(1, 4000), st.sampled_from(list(Tier))),
        min_size=1,
        max_size=12,
    )
)
def test_a_planned_rest_lies_between_what_is_drawn_and_predicted_and_is_a_token_at_least(requests):
    table = RequestTable()
    for i, (predicted, drawn, produced, tier) in enumerate(requests):
        add_decode(table, f"r{i}", produced=produced, tier=tier)
        table.rows["predicted_output_tokens"][i], table.rows["drawn_output_tokens"][i] = predicted, drawn
    rests, rows = planned_rests(table.rows), table.rows
    low = np.minimum(rows["predicted_output_tokens"], rows["drawn_output_tokens"]) - rows["num_output_tokens"]
    high = np.maximum(rows["predicted_output_tokens"], rows["drawn_output_tokens"]) - rows["num_output_tokens"]
    assert (rests >= 1).all()
    assert (rests >= low - 1e-9).all()
    assert (rests <= np.maximum(high, 1.0) + (1.0 - np.minimum(low, 1.0)) + 1e-9).all()


def test_a_plan_counts_memory_with_these_rests():
    table = table_of(9)
    columns = Columns(make_state(table, limits=make_limits()), 8.0)
    assert columns.table[OUTPUT_LEFT] == pytest.approx(planned_rests(table.rows))
