"""The performance model is recovered from noisy steps, and kept right while the engine drifts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core import fit
from slos_serve.core.fit import OnlineCorrection, StepSample, fit_perf_model, from_records, predicted_s
from slos_serve.core.perf import PerfModel
from slos_serve.core.roofline import fit_lines, nonnegative_least_squares

ONE_LINE = PerfModel.from_terms(
    [
        {
            "per_token_s": 31e-6,
            "per_request_s": 2e-4,
            "per_context_token_s": 4.8e-7,
            "per_draft_step_s": 2e-3,
            "per_pair_s": 1.3e-8,
            "fixed_s": 3e-3,
        }
    ]
)
PUBLISHED = PerfModel.from_terms(
    [{"per_token_s": 6.878e-5, "fixed_s": 2.480e-2}, {"per_token_s": 7.523e-5, "fixed_s": 3.03e-3}]
)
BENT = PerfModel.from_terms(
    [
        {"per_token_s": 2e-5, "per_context_token_s": 4e-7, "fixed_s": 2e-2},
        {"per_token_s": 1.1e-4, "per_context_token_s": 4e-7, "fixed_s": 3e-3},
    ]
)


def step_of(rng, max_chunk=2048, max_drafts=0):
    """Draw the terms of one step: decodes, or decodes and one prefill chunk."""
    decodes = int(rng.integers(1, 64))
    context = int(decodes * rng.integers(16, 2048))
    drafts = int(rng.integers(0, max_drafts + 1))
    tokens = decodes * (1 + drafts)
    if rng.random() < 0.5:
        return tokens, decodes, context, drafts, 0.0, 0
    chunk, start = int(rng.integers(16, max_chunk)), int(rng.choice([0, 0, 1024]))
    return tokens + chunk, decodes + 1, context, drafts, chunk * (start + chunk / 2), 1


def seconds_of(model, step):
    tokens, requests, context, drafts, pairs, _ = step
    return model.seconds(tokens, requests, context_tokens=context, draft_steps=drafts, attention_pairs=pairs)


def steps_of(model, count, rng, *, noise=0.05, stalls=0.0, max_chunk=2048, max_drafts=0):
    samples = []
    for _ in range(count):
        step = step_of(rng, max_chunk, max_drafts)
        seconds = seconds_of(model, step) * rng.lognormal(0.0, noise)
        if rng.random() < stalls:
            seconds += rng.uniform(0.4, 0.9)
        samples.append(StepSample(*step, seconds))
    return samples


def worst_error(fitted, truth, rng, **kwargs):
    steps = [step_of(rng, **kwargs) for _ in range(300)]
    return max(abs(seconds_of(fitted, step) / seconds_of(truth, step) - 1) for step in steps)


def test_known_coefficients_are_recovered_under_noise():
    rng = np.random.default_rng(1)
    report = fit_perf_model(steps_of(ONE_LINE, 4000, rng, max_drafts=3), rng=rng)
    assert len(report.model.lines) == 1
    assert report.model.lines[0] == pytest.approx(ONE_LINE.lines[0], rel=0.1)
    assert worst_error(report.model, ONE_LINE, rng, max_drafts=3) < 0.03
    assert report.mape_heldout == pytest.approx(0.04, abs=0.01)  # the mean size of 5 % noise
    assert report.r2 > 0.98
    assert 0.92 < report.margin_coverage < 0.98
    assert report.model.margin_decode == pytest.approx(math.exp(0.05 * 1.645), abs=0.02)
    assert set(report.terms) == set(ONE_LINE.to_json()["lines"][0])
    assert report.num_heldout == pytest.approx(0.25 * report.num_steps, rel=0.1)


def test_the_published_two_lines_are_recovered_where_steps_reach_both():
    rng = np.random.default_rng(2)
    samples = []
    for tokens in rng.integers(1, 16_384, size=6000):
        seconds = PUBLISHED.seconds(int(tokens)) * rng.lognormal(0.0, 0.05)
        samples.append(StepSample(int(tokens), 1, 0, 0, 0, 1, seconds))
    report = fit_perf_model(samples, rng=rng)
    for tokens in (1, 100, 1000, 3375, 8192, 16_000):
        assert report.model.seconds(tokens) == pytest.approx(PUBLISHED.seconds(tokens), rel=0.02)


def test_the_published_lines_are_told_apart_where_there_is_no_noise():
    rng = np.random.default_rng(3)
    sizes = np.geomspace(1, 65_536, 400).round()
    samples = [StepSample(int(n), 1, 0, 0, 0, 1, PUBLISHED.seconds(int(n))) for n in sizes]
    report = fit_perf_model(samples, rng=rng)
    assert len(report.model.lines) == 2
    slopes = sorted(line[0] for line in report.model.lines)
    assert slopes == pytest.approx([6.878e-5, 7.523e-5], rel=0.01)
    assert report.mape_heldout < 0.002


@pytest.mark.parametrize("seed", range(3))
def test_two_lines_are_chosen_where_the_cost_bends_and_one_where_it_does_not(seed):
    rng = np.random.default_rng(seed)
    bent = fit_perf_model(steps_of(BENT, 1500, rng), rng=rng)
    assert len(bent.model.lines) == 2
    assert worst_error(bent.model, BENT, rng) < 0.06
    straight = fit_perf_model(steps_of(ONE_LINE, 1500, rng), rng=rng)
    assert len(straight.model.lines) == 1
    capped = fit_perf_model(steps_of(BENT, 1500, rng), num_lines=1, rng=rng)
    assert len(capped.model.lines) == 1
    assert capped.mape_heldout > bent.mape_heldout


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_stalls_do_not_move_the_model_but_are_counted(share):
    rng = np.random.default_rng(4)
    report = fit_perf_model(steps_of(ONE_LINE, 2000, rng, stalls=share), rng=rng)
    assert worst_error(report.model, ONE_LINE, rng) < 0.04
    assert report.num_stalls == pytest.approx(share * 2000, rel=0.4)
    assert report.r2 > 0.97
    assert report.margin_coverage > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_a_host_that_is_late_for_some_outputs_moves_the_model_little(seed):
    """A late output makes a long step and a short one; what they take together is right."""
    rng = np.random.default_rng(seed)
    samples, late = [], 0.0
    for _ in range(3000):
        step = step_of(rng)
        before, late = late, float(rng.exponential(0.01)) if rng.random() < 0.4 else 0.0
        seconds = max(seconds_of(BENT, step) + late - before, 2e-4)
        samples.append(StepSample(*step, seconds))
    report = fit_perf_model(samples, rng=rng)
    assert len(report.model.lines) == 2
    assert worst_error(report.model, BENT, rng) < 0.1


def test_the_first_step_of_a_repeated_shape_is_left_out():
    rng = np.random.default_rng(5)
    samples = []
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        for repeat in range(6):
            slow = 3.4 if repeat == 0 else 1.0
            samples.append(StepSample(size, 1, 0, 0, 0, 1, ONE_LINE.seconds(size) * slow))
    report = fit_perf_model(samples, rng=rng)
    assert report.num_first_sight == 10
    assert report.num_steps == 50
    assert report.mape_heldout < 0.01
    for size in (1, 100, 512):
        assert report.model.seconds(size) == pytest.approx(ONE_LINE.seconds(size), rel=0.01)


def test_shapes_that_come_once_are_kept():
    rng = np.random.default_rng(6)
    samples = [StepSample(n, 1, 0, 0, 0, 1, ONE_LINE.seconds(n)) for n in (1, 3, 9, 27, 81, 243, 729, 2187)]
    report = fit_perf_model(samples, rng=rng)
    assert report.num_first_sight == 0
    assert report.num_steps == 8


def test_rare_prefills_count_beside_a_flood_of_decodes():
    rng = np.random.default_rng(7)
    truth = PerfModel.from_terms([{"per_token_s": 5e-5, "per_request_s": 3e-4, "fixed_s": 5e-3}])
    samples = [StepSample(8, 8, 4000, 0, 0, 0, truth.seconds(8, 8) * rng.lognormal(0, 0.05)) for _ in range(5000)]
    for _ in range(60):
        n = int(rng.integers(100, 2000))
        samples.append(StepSample(n, 1, 0, 0, n * n / 2, 1, truth.seconds(n, 1) * rng.lognormal(0, 0.05)))
    report = fit_perf_model(samples, rng=rng)
    assert report.model.seconds(1500, 1, attention_pairs=1500 * 750) == pytest.approx(truth.seconds(1500, 1), rel=0.05)
    assert report.model.seconds(8, 8, context_tokens=4000) == pytest.approx(truth.seconds(8, 8), rel=0.02)


def test_the_held_out_steps_are_of_shapes_not_trained_on():
    rng = np.random.default_rng(8)
    group = np.repeat(np.arange(40), 25)
    heldout = fit._pick_groups(group, 0.25, rng)
    assert not set(group[heldout]) & set(group[~heldout])
    assert heldout.mean() == pytest.approx(0.25, abs=0.05)
    few = fit._pick_groups(np.zeros(100, dtype=np.int64), 0.25, rng)
    assert 0.2 < few.mean() < 0.3


def test_the_same_steps_and_generator_give_the_same_fit():
    samples = steps_of(ONE_LINE, 300, np.random.default_rng(9))
    one, other = (fit_perf_model(samples, rng=np.random.default_rng(1)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("field", StepSample._fields)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_unusable_steps_are_ignored_and_counted(field, bad):
    rng = np.random.default_rng(10)
    samples = steps_of(ONE_LINE, 40, rng)
    spoilt = [samples[0]._replace(**{field: bad}), samples[1]._replace(seconds=0.0)]
    report = fit_perf_model(samples + spoilt, rng=np.random.default_rng(1))
    clean = fit_perf_model(samples, rng=np.random.default_rng(1))
    assert report.num_bad == 2
    assert report.model == clean.model


def test_too_few_steps_are_an_error_that_says_how_many_are_needed():
    rng = np.random.default_rng(11)
    with pytest.raises(ValueError, match="0 usable steps: expected at least 8"):
        fit_perf_model([], rng=rng)
    with pytest.raises(ValueError, match="expected at least 8"):
        fit_perf_model(steps_of(ONE_LINE, 5, rng), rng=rng)
    fit_perf_model(steps_of(ONE_LINE, 12, rng), rng=rng)


def test_impossible_options_are_errors():
    samples = steps_of(ONE_LINE, 50, np.random.default_rng(12))
    with pytest.raises(ValueError, match="holdout"):
        fit_perf_model(samples, holdout=1.0, rng=np.random.default_rng())
    with pytest.raises(ValueError, match="num_lines"):
        fit_perf_model(samples, num_lines=3, rng=np.random.default_rng())


def test_identical_steps_give_their_own_time():
    report = fit_perf_model([StepSample(4, 4, 100, 0, 0, 0, 0.02)] * 20, rng=np.random.default_rng(13))
    assert report.model.seconds(4, 4, context_tokens=100) == pytest.approx(0.02)
    assert math.isnan(report.r2)


def test_step_records_are_read_as_samples():
    record = {
        "step": 3,
        "t": 1.5,
        "num_tokens": 10,
        "num_requests": 2,
        "context_tokens": 300,
        "draft_steps": 1,
        "attention_pairs": 12.5,
        "has_prefill": 1,
        "seconds": 0.02,
        "planned_s": None,
        "predicted_s": None,
    }
    assert from_records([record]) == [StepSample(10, 2, 300, 1, 12.5, 1, 0.02)]
    sparse = from_records([{"num_tokens": 4, "num_requests": 1, "seconds": 0.1}])[0]
    assert sparse == StepSample(4, 1, 0, 0, 0, 0, 0.1)
    broken = from_records([{"num_tokens": "x", "num_requests": 1, "seconds": None}])[0]
    assert math.isnan(broken.num_tokens)
    assert math.isnan(broken.seconds)


def test_many_predictions_equal_single_ones():
    rng = np.random.default_rng(14)
    steps = [step_of(rng) for _ in range(20)]
    terms = np.array([[*step[:5], 1.0] for step in steps])
    assert predicted_s(BENT, terms) == pytest.approx([seconds_of(BENT, step) for step in steps])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 30))
def test_least_squares_with_nonnegative_coefficients_meets_its_optimality_conditions(seed, columns, rows):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-4, 4, size=columns)
    target = rng.normal(size=rows)
    x = nonnegative_least_squares(matrix, target)
    assert (x >= 0).all()
    slope = matrix.T @ (matrix @ x - target)
    scale = np.linalg.norm(matrix, axis=0) * np.linalg.norm(target)
    assert (slope >= -1e-6 * scale).all()  # no coefficient at 0 would help by growing
    assert (np.abs(slope[x > 0]) <= 1e-6 * scale[x > 0]).all()  # none above 0 would help by moving


def test_columns_that_never_vary_from_zero_get_no_coefficient():
    terms = np.array([[float(n), 0.0, 1.0] for n in range(1, 40)])
    lines = fit_lines(terms, terms @ np.array([1e-3, 5.0, 0.1]), np.ones(39), 2)
    assert lines.shape[1] == 3
    assert (lines[:, 1] == 0).all()


def drive(correction, samples):
    for sample in samples:
        correction.observe(sample)
    return correction


def test_margins_start_wide_and_shrink_with_evidence_of_their_own_kind():
    rng = np.random.default_rng(20)
    correction = OnlineCorrection(ONE_LINE)
    assert correction.model.margin_decode == correction.model.margin_prefill == 1.3
    assert correction.coverage is None
    decodes = [sample for sample in steps_of(ONE_LINE, 3000, rng) if not sample.has_prefill]
    previous = 1.3
    for end in (50, 200, 1000):
        drive(correction, decodes[:end])
        assert correction.model.margin_decode < previous
        previous = correction.model.margin_decode
    assert correction.model.margin_decode == pytest.approx(math.exp(0.05 * 1.645), abs=0.03)
    assert correction.model.margin_prefill == pytest.approx(1.3, abs=0.02)


def test_most_steps_end_within_the_margin_from_the_start_and_later():
    rng = np.random.default_rng(21)
    correction = drive(OnlineCorrection(ONE_LINE), steps_of(ONE_LINE, 200, rng))
    assert correction.coverage > 0.97
    drive(correction, steps_of(ONE_LINE, 5000, rng))
    assert correction.coverage == pytest.approx(0.95, abs=0.03)
    assert not correction.drift


@pytest.mark.parametrize("seed", [30, 31, 32])
def test_the_margin_covers_its_share_of_steps_on_a_machine_that_drifts(seed):
    rng = np.random.default_rng(seed)
    drifting, drift = [], 0.0
    for step in steps_of(ONE_LINE, 6000, rng):
        drift = 0.998 * drift + rng.normal(0, 0.01)  # a window's own 95 % covers 91 % of these
        drifting.append(step._replace(seconds=step.seconds * math.exp(drift)))
    correction, covered = OnlineCorrection(ONE_LINE), 0
    for step in drifting:
        model = correction.model
        margin = model.margin_prefill if step.has_prefill else model.margin_decode
        covered += step.seconds <= margin * seconds_of(model, step[:6])
        correction.observe(step)
    assert covered / len(drifting) >= 0.95


def test_a_slower_engine_is_followed_without_touching_the_profile():
    rng = np.random.default_rng(22)
    slower = PerfModel(lines=tuple(tuple(value * 1.4 for value in line) for line in ONE_LINE.lines))
    correction = drive(OnlineCorrection(ONE_LINE), steps_of(slower, 6000, rng))
    assert correction.base == ONE_LINE
    assert correction.factor == pytest.approx(1.4, rel=0.03)
    assert correction.model.seconds(500, 3) == pytest.approx(slower.seconds(500, 3), rel=0.03)
    assert correction.coverage > 0.9
    assert correction.drift


def test_before_the_factor_has_moved_the_margin_covers_a_slower_engine():
    rng = np.random.default_rng(23)
    slower = PerfModel(lines=tuple(tuple(value * 1.5 for value in line) for line in ONE_LINE.lines))
    correction = drive(OnlineCorrection(ONE_LINE), steps_of(slower, 100, rng))
    planned = correction.model.seconds(40, 40) * correction.model.margin_decode
    assert planned > slower.seconds(40, 40)


def test_stalls_do_not_move_the_factor():
    rng = np.random.default_rng(24)
    correction = drive(OnlineCorrection(ONE_LINE), steps_of(ONE_LINE, 4000, rng, stalls=0.02))
    assert correction.factor == pytest.approx(1.0, abs=0.02)
    assert correction.model.margin_decode < 1.2
    assert not correction.drift


def test_margins_and_factor_stay_within_bounds_whatever_comes():
    wild = [StepSample(1, 1, 0, 0, 0, i % 2, 1e6 if i % 3 else 1e-9) for i in range(5000)]
    model = drive(OnlineCorrection(ONE_LINE), wild).model
    assert model.margin_decode <= fit.MAX_MARGIN
    assert model.margin_prefill <= fit.MAX_MARGIN
    slow = drive(OnlineCorrection(ONE_LINE), [sample._replace(seconds=1e6) for sample in wild])
    assert slow.factor <= fit.MAX_CORRECTION * 1.1
    assert slow.drift


def test_the_margin_of_the_profile_is_where_it_starts_if_that_is_wider():
    base = PerfModel(lines=ONE_LINE.lines, margin_prefill=1.8, margin_decode=1.1)
    model = OnlineCorrection(base).model
    assert (model.margin_prefill, model.margin_decode) == (1.8, 1.3)


@pytest.mark.parametrize("field", StepSample._fields)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_unusable_steps_are_ignored_and_counted_online(field, bad):
    correction = OnlineCorrection(ONE_LINE)
    sample = StepSample(4.0, 4.0, 100.0, 0.0, 10.0, 0.0, 0.01)
    correction.observe(sample)
    before = correction.to_json()
    for spoilt in (sample._replace(**{field: bad}), sample._replace(seconds=0.0)):
        correction.observe(spoilt)
    assert correction.num_bad == 2
    assert correction.to_json() == before | {"num_bad": 2}


def test_memory_is_bounded():
    correction = drive(OnlineCorrection(ONE_LINE), [StepSample(4, 4, 100, 0, 0, i % 2, 0.01) for i in range(3000)])
    data = correction.to_json()
    assert {len(ratios) for ratios in data["ratios"].values()} == {fit.MARGIN_WINDOW}
    assert len(data["within"]) == fit.WINDOW
    assert correction.num_steps == 3000


def test_a_correction_survives_being_written_and_read():
    rng = np.random.default_rng(25)
    correction = drive(OnlineCorrection(ONE_LINE), steps_of(ONE_LINE, 64, rng))
    again = OnlineCorrection.from_json(json.loads(json.dumps(correction.to_json())))
    assert again.to_json() == correction.to_json()
    assert again.coverage == correction.coverage
    more = steps_of(ONE_LINE, 400, rng)
    drive(correction, more)
    drive(again, more)
    assert again.factor == correction.factor
    assert again.model.seconds(10) == pytest.approx(correction.model.seconds(10), rel=0.01)


def test_an_unusable_correction_is_an_error():
    data = OnlineCorrection(ONE_LINE).to_json()
    with pytest.raises(ValueError, match="slos-serve-correction/1"):
        OnlineCorrection.from_json(data | {"schema": "x"})
    with pytest.raises(ValueError, match="quantiles"):
        OnlineCorrection.from_json(data | {"quantiles": [0.2, 0.95]})
    with pytest.raises(ValueError, match="positive finite"):
        OnlineCorrection.from_json(data | {"ratios": {"decode": [math.nan], "prefill": []}})
