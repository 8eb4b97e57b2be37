"""Output lengths are learnt online, in bounded memory, and never predicted above the client's limit."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core import lengths
from slos_serve.core.lengths import LengthModel

HUGE = 1_000_000

observations = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 100_000), st.integers(1, 20_000)), max_size=60)


def learnt(seen, hints=None):
    model = LengthModel(hints)
    for name, prompt, output in seen:
        model.observe(name, prompt, output)
    return model


@settings(max_examples=200, deadline=None)
@given(
    observations,
    st.sampled_from([None, {"a": 100.0}]),
    st.tuples(st.integers(0, 200_000), st.integers(1, 30_000), st.integers(0, 40_000)),
    st.floats(0.01, 0.99),
)
def test_a_prediction_is_above_what_is_produced_and_never_above_the_limit(seen, hints, tokens, quantile):
    prompt, limit, produced = tokens
    length = learnt(seen, hints).predict("a", prompt, limit, produced, quantile)
    assert length <= limit
    assert length > produced or length == limit
    assert length >= 1


@settings(max_examples=100, deadline=None)
@given(observations, st.sampled_from([None, {"a": 100.0}]), st.lists(st.integers(0, 30_000), min_size=2, max_size=20))
def test_a_prediction_does_not_fall_as_tokens_come_out(seen, hints, produced):
    model = learnt(seen, hints)
    predictions = [model.predict("a", 100, HUGE, count) for count in sorted(produced)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(predictions))


@settings(max_examples=100, deadline=None)
@given(observations, st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(0, 5000))
def test_a_higher_quantile_is_not_shorter(seen, one, other, produced):
    model = learnt(seen, {"a": 100.0})
    low, high = sorted([one, other])
    assert model.predict("a", 50, HUGE, produced, low) <= model.predict("a", 50, HUGE, produced, high) + 1e-6


@pytest.mark.parametrize("hints", [None, {"a": 30.0}, {"a": 3000.0}])
def test_three_hundred_requests_teach_the_upper_quantile_of_a_log_normal(hints):
    truth = math.exp(5.5 + 1.2816 * 0.5)
    close = 0
    for seed in range(20):
        values = np.random.default_rng(seed).lognormal(5.5, 0.5, size=300).round()
        model = learnt([("a", 400, int(value)) for value in values], hints)
        predicted = model.predict("a", 400, HUGE)
        assert predicted == pytest.approx(np.quantile(values, 0.9), rel=0.04)  # what the sample itself says
        close += abs(predicted / truth - 1) < 0.15
    assert close >= 19


def test_the_conditional_quantile_is_that_of_the_longer_ones():
    rng = np.random.default_rng(7)
    values = np.maximum(rng.exponential(300, size=5000).round(), 1)
    model = LengthModel()
    for value in values:
        model.observe("a", 10, int(value))
    recent = values[-lengths.WINDOW :]
    for produced in (50, 200, 600):
        truth = np.quantile(recent[recent > produced], 0.9)
        assert model.predict("a", 10, HUGE, produced) == pytest.approx(truth, rel=0.2)


def test_without_hint_and_data_a_request_runs_to_its_limit():
    assert LengthModel().predict("a", 100, 777) == 777
    assert LengthModel().predict("a", 100, 777, 300) == 777


def test_a_hint_is_the_median_of_a_prior_that_is_wider_than_it():
    model = LengthModel({"a": 200})
    assert model.predict("a", 100, HUGE, quantile=0.5) == pytest.approx(200, rel=0.05)
    assert model.predict("a", 100, HUGE) == pytest.approx(200 * math.exp(1.2816 * lengths.PRIOR_SIGMA), rel=0.05)
    assert model.predict("a", 100, 150) == 150


def test_a_prior_yields_to_evidence_step_by_step():
    model = LengthModel({"a": 1000})
    before = model.predict("a", 100, HUGE)
    predictions = []
    for _ in range(5):
        for _ in range(10):
            model.observe("a", 100, 50)
        predictions.append(model.predict("a", 100, HUGE))
    assert predictions == sorted(predictions, reverse=True)
    assert predictions[0] <= before
    assert predictions[-1] == pytest.approx(50, abs=2)


def test_an_unseen_prompt_length_borrows_from_its_class():
    model = LengthModel()
    for _ in range(200):
        model.observe("a", 100, 80)
    assert model.predict("a", 50_000, HUGE) == pytest.approx(80, abs=4)
    assert model.predict("b", 100, 5000) == 5000


def test_prompt_lengths_are_told_apart_when_there_is_evidence():
    model = LengthModel()
    for _ in range(300):
        model.observe("a", 10, 20)
        model.observe("a", 10_000, 900)
    assert model.predict("a", 10, HUGE, quantile=0.8) == pytest.approx(20, abs=1)
    assert model.predict("a", 10_000, HUGE, quantile=0.5) == pytest.approx(900, rel=0.07)


def test_one_outlier_is_not_expected_to_run_to_its_limit():
    model = LengthModel()
    for _ in range(500):
        model.observe("a", 100, 100)
    assert model.predict("a", 100, HUGE, produced=500) == pytest.approx(500 * lengths.MAX_GROWTH)
    assert model.predict("a", 100, HUGE, produced=50_000) == pytest.approx(50_000 * lengths.MAX_GROWTH)


def test_a_changed_workload_is_followed():
    model = LengthModel()
    for _ in range(3000):
        model.observe("a", 100, 50)
    for _ in range(2 * lengths.WINDOW):
        model.observe("a", 100, 1000)
    assert model.predict("a", 100, HUGE, quantile=0.5) == pytest.approx(1000, rel=0.07)


def test_memory_is_bounded_in_classes_lengths_and_observations():
    model = LengthModel()
    for i in range(3 * lengths.MAX_CLASSES):
        model.observe(f"class-{i}", 4 ** (i % 12), 2 ** (i % 30))
        model.predict(f"class-{i}", 4 ** (i % 12), HUGE)
    assert len(model._counts) <= lengths.MAX_CLASSES + 1
    assert all(counts.shape == (1 + lengths.NUM_PROMPT_BUCKETS, lengths.NUM_BINS) for counts in model._counts.values())
    for i in range(20_000):
        model.predict(f"other-{i}", i, HUGE)
    assert len(model._curves) <= lengths.MAX_CLASSES * lengths.NUM_PROMPT_BUCKETS


def test_classes_beyond_the_bound_learn_together():
    model = LengthModel()
    for i in range(lengths.MAX_CLASSES):
        model.observe(f"class-{i}", 100, 10)
    assert model.predict("late", 100, 4000) == 4000
    for i in range(100):
        model.observe(f"late-{i}", 100, 70)
    assert model.predict("late", 100, 4000) == pytest.approx(70, abs=4)


def test_evidence_is_counted_with_its_fading():
    model = LengthModel()
    assert model.num_observations("a") == 0
    for _ in range(100):
        model.observe("a", 100, 10)
    assert 95 < model.num_observations("a") <= 100
    for _ in range(20_000):
        model.observe("a", 100, 10)
    assert model.num_observations("a") == pytest.approx(lengths.WINDOW, rel=0.01)


def test_outputs_without_a_token_teach_nothing():
    model = LengthModel()
    model.observe("a", 100, 0)
    assert model.num_observations("a") == 0


@settings(max_examples=50, deadline=None)
@given(observations, st.integers(0, 3000))
def test_a_model_survives_being_written_and_read(seen, produced):
    model = learnt(seen, {"a": 60.0})
    again = LengthModel.from_json(json.loads(json.dumps(model.to_json())))
    assert again.to_json() == model.to_json()
    for name in "ab":
        assert again.predict(name, 200, 9000, produced) == model.predict(name, 200, 9000, produced)


@pytest.mark.parametrize("hint", [0, -5, math.nan, math.inf])
def test_an_impossible_hint_is_an_error(hint):
    with pytest.raises(ValueError, match="expected at least 1 token"):
        LengthModel({"a": hint})


@pytest.mark.parametrize("count", [-1.0, math.nan])
def test_impossible_counts_are_an_error(count):
    data = learnt([("a", 10, 10)]).to_json()
    data["classes"]["a"][0] = {"3": count}
    with pytest.raises(ValueError, match="bin 3"):
        LengthModel.from_json(data)
    data["classes"]["a"] = []
    with pytest.raises(ValueError, match="expected 11"):
        LengthModel.from_json(data)


def test_another_schema_is_an_error():
    with pytest.raises(ValueError, match="slos-serve-lengths/1"):
        LengthModel.from_json({"schema": "other"})


def test_every_length_lies_in_the_bin_that_counts_it():
    for length in [*range(1, 3000), 5000, 65_535, 65_536, 1_000_000]:
        index = lengths._bin(length)
        assert lengths._EDGES[index] < length <= lengths._EDGES[index + 1]
    widths = np.diff(lengths._EDGES)
    assert (widths[lengths._UNIT_BINS :] <= lengths._EDGES[lengths._UNIT_BINS + 1 :] / 15).all()
