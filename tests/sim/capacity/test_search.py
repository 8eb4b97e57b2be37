"""The search finds a known capacity under noise, shares its runs, and compares systems on the same windows."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.sim.capacity.search import (
    BEYOND,
    HIGHEST,
    LOWEST,
    LOWEST_RPS,
    STEP,
    Curve,
    RunOutcome,
    SearchEffort,
    crossing,
    index_of,
    interval,
    never_rising,
    rate_at,
    ratio_draws,
    search,
    tune,
)

SMALL = SearchEffort(num_windows=4, coarse_windows=2, max_rates=6)
ONE = ("{}",)


class World:
    """A system whose attainment by rate is known; `noise` moves each window's at each rate; counts its runs."""

    def __init__(self, capacity, *, slope=0.5, noise=0.0, offered=1000, classes=("chat",)):
        self.capacity, self.slope, self.noise, self.offered, self.classes = capacity, slope, noise, offered, classes
        self.asked = []

    def attainment(self, point):
        capacity = self.capacity(point.settings) if callable(self.capacity) else self.capacity
        share = 0.9 - self.slope * np.log(rate_at(point.rate_index) / capacity)
        chance = np.random.default_rng([point.rate_index + 1000, point.window]).normal(0.0, 1.0)
        return float(np.clip(share + self.noise * chance, 0.0, 1.0))

    def answer(self, points):
        self.asked += points
        return {point: self._outcome(point) for point in points}

    def _outcome(self, point):
        met = round(self.attainment(point) * self.offered)
        return RunOutcome(by_class=dict.fromkeys(self.classes, (met, self.offered, met, met)))


def carry(question, world):
    """Answer a search's questions to its end."""
    try:
        points = next(question)
        while True:
            points = question.send(world.answer(points))
    except StopIteration as stop:
        return stop.value


def found(world, effort=SMALL, guess=1.0):
    return carry(search(ONE, lambda: guess, effort), world).curve


@settings(deadline=None)
@given(st.floats(0.05, 100.0), st.floats(0.05, 100.0))
def test_a_capacity_without_noise_is_found_to_a_percent_from_any_guess(capacity, guess):
    curve = found(World(capacity, slope=1.0), guess=guess)
    assert curve.capacity(0.9) == pytest.approx(capacity, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 20.0), st.floats(0.2, 20.0))
def test_noise_that_fools_the_coarse_bracket_is_found_out_on_all_windows(capacity, guess):
    world = World(capacity, slope=0.5, noise=0.03, offered=400)
    curve = found(world, SearchEffort(num_windows=10, coarse_windows=1, max_rates=9), guess)
    assert curve.capacity(0.9) == pytest.approx(capacity, rel=0.10)
    low, high = interval(curve.draws(0.9))
    assert low <= curve.capacity(0.9) <= high
    assert rate_at(curve.indices[0]) < curve.capacity(0.9) < rate_at(curve.indices[-1])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth, covered = 3.0, 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        curve = Curve()
        hardness = rng.normal(0.0, 0.05, 10)  # what makes a window harder holds at every rate
        for index in range(index_of(2.0), index_of(4.5)):
            shares = np.clip(0.9 - 0.5 * np.log(rate_at(index) / truth) + hardness, 0, 1)
            rows = [RunOutcome(by_class={"chat": (round(500 * share), 500, 0, 0)}) for share in shares]
            curve.add(index, rows)
        low, high = interval(curve.draws(0.9))
        covered += low <= truth <= high
    assert covered >= 50


def test_no_run_is_asked_for_twice_but_a_stopped_one_in_full():
    world = World(2.0)
    found(world)
    assert len(world.asked) == len(set(world.asked))


def test_higher_targets_have_lower_capacities_of_the_same_curve():
    curve = found(World(4.0, slope=0.2))
    assert curve.capacity(0.95) == pytest.approx(4.0 * np.exp(-0.05 / 0.2), rel=0.05)
    assert curve.capacity(0.99) == pytest.approx(4.0 * np.exp(-0.09 / 0.2), rel=0.05)


def test_a_system_that_cannot_hold_the_lowest_rate_has_no_capacity():
    curve = found(World(LOWEST_RPS / 100))
    assert curve.indices == [LOWEST]
    assert curve.capacity(0.9) == 0.0


def test_a_system_that_always_passes_stops_at_the_highest_rate():
    curve = found(World(1e9))
    assert curve.capacity(0.9) == pytest.approx(rate_at(HIGHEST))


def test_the_class_that_has_least_decides():
    curve = Curve()
    for index, met in enumerate((95, 85)):
        curve.add(index, [RunOutcome(by_class={"chat": (100, 100, 0, 0), "coding": (met, 100, 0, 0)})])
    assert curve.attainment(0) == {"chat": 1.0, "coding": 0.95}
    assert curve.capacity(0.9) == pytest.approx(STEP**0.5)


def test_a_window_that_does_not_drain_is_met_by_nobody():
    curve = Curve()
    good = RunOutcome(by_class={"chat": (100, 100, 0, 0)})
    late = RunOutcome(by_class={"chat": (100, 100, 0, 0)}, drain_s=25.0)
    curve.add(0, [good, late])
    assert curve.worst(0) == 0.5


def test_settings_race_on_the_tuning_windows_and_the_best_is_measured_on_the_others():
    capacities = {256: 1.0, 512: 3.0, 1024: 2.0}
    grid = [json.dumps({"token_budget": budget}) for budget in capacities]
    world = World(lambda chosen: capacities[json.loads(chosen)["token_budget"]], slope=1.0)
    answer = carry(search(grid, lambda: 1.0, SMALL), world)
    assert json.loads(answer.settings) == {"token_budget": 512}
    assert answer.curve.capacity(0.9) == pytest.approx(3.0, rel=0.01)
    assert {point.settings for point in world.asked if point.part == "report"} == {answer.settings}
    losing = [point for point in world.asked if point.settings == grid[2]]
    assert {point.rate_index for point in losing} == {min(point.rate_index for point in losing)}


def test_tuning_keeps_the_first_settings_where_none_passes():
    settings_, index = carry(tune(["first", "second"], 0, SMALL), World(LOWEST_RPS / 100))
    assert settings_ == "first"
    assert index == LOWEST - 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_fitted_curve_never_rises_and_keeps_the_mean(shares):
    fitted = never_rising(np.array([shares]))[0]
    assert (np.diff(fitted) <= 1e-12).all()
    assert fitted.mean() == pytest.approx(np.mean(shares))
    if (np.diff(shares) <= 0).all():
        assert fitted == pytest.approx(shares)


def test_a_draw_beyond_the_rates_that_were_run_follows_the_slope_and_no_further_than_its_limit():
    log_rates = np.log([1.0, 2.0])
    rows = np.array([[1.0, 0.92], [0.89, 0.79], [0.99, 0.99]])
    above, below, flat = crossing(rows, log_rates, 0.9)
    assert above == pytest.approx(2 * 2 ** (0.02 / 0.08))
    assert below == pytest.approx(2 ** (-0.01 / 0.1))
    assert flat == pytest.approx(2 * BEYOND)


def test_a_ratio_is_of_the_same_windows_on_both_sides():
    ours, theirs = Curve(), Curve()
    rng = np.random.default_rng(3)
    hardness = rng.normal(0.0, 0.05, 10)
    for curve, capacity in ((ours, 4.0), (theirs, 2.0)):
        for index in range(index_of(capacity / 2), index_of(capacity * 2)):
            shares = np.clip(0.9 - 0.5 * np.log(rate_at(index) / capacity) + hardness, 0, 1)
            curve.add(index, [RunOutcome(by_class={"chat": (round(800 * s), 800, 0, 0)}) for s in shares])
    low, high = interval(ratio_draws(ours, theirs, 0.9))
    assert low <= 2.0 <= high
    assert high - low < 0.06  # unpaired it would be ten times as wide
    assert np.ptp(np.percentile(ours.draws(0.9), [2.5, 97.5])) > 0.2
