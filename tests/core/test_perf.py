"""The performance model: times, the exact inverse, and what it refuses."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core import perf
from slos_serve.core.jit import HAS_NUMBA
from slos_serve.core.perf import TERMS, PerfModel, batch_seconds, max_chunk_tokens

coefficient = st.just(0.0) | st.floats(1e-9, 1e-2)
lines = st.lists(st.tuples(*[coefficient] * 5, st.floats(1e-4, 0.1)), min_size=1, max_size=3).map(np.array)
size = st.integers(0, 5000).map(float)
batches = st.tuples(size, size, size, size, size)  # tokens, requests, context, draft steps, pairs
starts = st.integers(0, 20_000).map(float)


def plain(function):
    """Return the source a compiled function was made from."""
    return getattr(function, "py_func", function)


@settings(max_examples=300, deadline=None)
@given(lines, batches, starts, st.floats(1e-6, 10.0))
def test_the_largest_chunk_that_fits_ends_exactly_at_the_limit(array, batch, start, room):
    n, q, context, drafts, pairs = batch
    limit = batch_seconds(array, n, q, context, drafts, pairs) + room
    x = max_chunk_tokens(array, limit, n, q, context, drafts, pairs, start)
    assert x > 0
    if x < 1e12:
        end = batch_seconds(array, n + x, q, context, drafts, pairs + x * (start + x / 2))
        assert end == pytest.approx(limit, rel=1e-6)
    else:
        assert not (array[:, [0, 4]] > 0).any()


@settings(max_examples=200, deadline=None)
@given(lines, batches, starts, st.floats(-1.0, 1.0))
def test_compiled_and_plain_functions_agree(array, batch, start, room):
    limit = plain(batch_seconds)(array, *batch)
    assert batch_seconds(array, *batch) == pytest.approx(limit, rel=1e-12)
    compiled = max_chunk_tokens(array, limit + room, *batch, start)
    # a room of less than one rounding error of the limit may fall to either side
    if abs(room) > 1e-9 * limit:
        assert compiled == pytest.approx(plain(max_chunk_tokens)(array, limit + room, *batch, start), rel=1e-6)


@pytest.mark.skipif(not HAS_NUMBA, reason="Numba is not installed: there is one path only")
def test_the_loops_are_compiled_where_numba_is_installed():
    assert plain(batch_seconds) is not batch_seconds
    assert plain(perf.max_chunk_tokens) is not max_chunk_tokens


@settings(max_examples=100, deadline=None)
@given(lines, batches, st.integers(0, 4), st.integers(1, 1000))
def test_a_batch_never_gets_faster_by_growing(array, batch, which, more):
    larger = list(batch)
    larger[which] += more
    assert batch_seconds(array, *larger) >= batch_seconds(array, *batch)


@settings(max_examples=100, deadline=None)
@given(lines, size, size, st.floats(0.0, 1.0))
def test_nothing_fits_where_the_batch_alone_ends_too_late(array, n, q, short):
    alone = batch_seconds(array, n, q, 0.0, 0.0, 0.0)
    assert max_chunk_tokens(array, alone * (1 - short), n, q, 0.0, 0.0, 0.0, 0.0) <= 0


def test_chunks_cost_nothing_more_where_no_term_counts_them():
    array = PerfModel.from_terms([{"fixed_s": 0.01}]).as_array()
    assert max_chunk_tokens(array, 0.02, 5.0, 1.0, 0.0, 0.0, 0.0, 0.0) >= 1e18


def test_the_time_of_a_batch_is_that_of_its_highest_line():
    model = PerfModel.from_terms(
        [{"per_token_s": 6.878e-5, "fixed_s": 2.48e-2}, {"per_token_s": 7.523e-5, "fixed_s": 3.03e-3}]
    )
    assert model.seconds(100) == pytest.approx(6.878e-5 * 100 + 2.48e-2)
    assert model.seconds(8192) == pytest.approx(7.523e-5 * 8192 + 3.03e-3)


def test_every_term_counts():
    model = PerfModel.from_terms([dict(zip(TERMS, (1.0, 10.0, 100.0, 1000.0, 1e4, 1e5), strict=True))])
    assert model.seconds(2, 3, context_tokens=4, draft_steps=5, attention_pairs=6) == 2 + 30 + 400 + 5000 + 6e4 + 1e5


def test_a_prompt_is_prefilled_in_chunks_of_the_token_budget():
    model = PerfModel.from_terms([{"per_token_s": 1e-4, "per_pair_s": 1e-8, "fixed_s": 0.01}])
    whole = model.prefill_seconds(1000, 8192)
    assert whole == pytest.approx(0.1 + 0.01 + 1e-8 * 1000 * 500)
    assert model.prefill_seconds(1000, 300) == pytest.approx(whole + 3 * 0.01)
    assert model.prefill_seconds(0, 300) == 0.0


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
@pytest.mark.parametrize("term", TERMS)
def test_a_coefficient_that_is_negative_or_no_number_is_an_error(term, bad):
    with pytest.raises(ValueError, match="finite coefficients >= 0"):
        PerfModel.from_terms([{"fixed_s": 1.0} | {term: bad}])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["margin_prefill", "margin_decode"])
def test_a_margin_that_is_no_positive_number_is_an_error(name, bad):
    with pytest.raises(ValueError, match=name):
        PerfModel(lines=((0.0, 0.0, 0.0, 0.0, 0.0, 1.0),), **{name: bad})


@pytest.mark.parametrize("shape", [(), ((1.0, 2.0),), ((0.0,) * 6,)])
def test_a_model_without_cost_is_an_error(shape):
    with pytest.raises(ValueError, match="PerfModel"):
        PerfModel(lines=shape)


def test_an_unknown_term_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="per_tokn_s"):
        PerfModel.from_terms([{"per_tokn_s": 1.0}])


@settings(max_examples=50, deadline=None)
@given(lines, st.floats(0.5, 4.0), st.floats(0.5, 4.0))
def test_a_model_survives_being_written_and_read(array, prefill, decode):
    model = PerfModel(lines=tuple(map(tuple, array.tolist())), margin_prefill=prefill, margin_decode=decode)
    assert PerfModel.from_json(model.to_json()) == model


def test_doubt_counts_in_plans_alone_and_survives_a_file():
    model = PerfModel(lines=((1e-5, 0, 1e-8, 0, 0, 0.01),), doubt=(0, 0, 1e-8, 0, 0, 0))
    assert model.seconds(1, context_tokens=1e6) == pytest.approx(0.02, rel=1e-3)
    assert (model.planned() @ [1, 1, 1e6, 0, 0, 1]).max() == pytest.approx(0.03, rel=1e-3)
    assert PerfModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert "doubt" not in PerfModel(lines=model.lines).to_json()


def test_an_engine_that_is_slower_is_so_in_its_doubt_too():
    model = PerfModel(lines=((1e-5, 0, 1e-8, 0, 0, 0.01),), doubt=(0, 0, 1e-8, 0, 0, 0), margin_decode=1.2)
    slower = model.times(2.0)
    assert slower.lines == ((2e-5, 0, 2e-8, 0, 0, 0.02),)
    assert slower.doubt == (0, 0, 2e-8, 0, 0, 0)
    assert slower.margin_decode == 1.2


@pytest.mark.parametrize("doubt", [(1.0,), (0, 0, -1.0, 0, 0, 0), (0, 0, math.nan, 0, 0, 0)])
def test_a_doubt_that_is_no_row_of_costs_is_refused(doubt):
    with pytest.raises(ValueError, match="PerfModel line"):
        PerfModel(lines=((0, 0, 0, 0, 0, 0.01),), doubt=doubt)
