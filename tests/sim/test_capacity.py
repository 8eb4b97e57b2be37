"""The search finds a known capacity, shares its runs, and compares systems over the same seeds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.sim.capacity import HIGHEST_RPS, LOWEST_RPS, Measured, find_capacity, ratio_interval
from slos_serve.sim.cmd_capacity import as_text, scenario_entry

TARGETS = (0.90, 0.95, 0.99)


class Known:
    """A system whose capacity at each target is known; counts its runs."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.rates = []

    def __call__(self, rate):
        self.rates.append(rate)
        return {target: rate <= self.capacity[target] for target in self.capacity}


@given(st.floats(0.05, 100.0), st.floats(0.05, 100.0))
def test_the_search_ends_within_its_tolerance_from_any_guess(capacity, guess):
    system = Known({0.9: capacity})
    found = find_capacity(system, (0.9,), guess_rps=guess, tolerance=0.03)[0.9]
    assert found <= capacity <= found * 1.031
    assert len(set(system.rates)) == len(system.rates)


@given(st.floats(0.5, 20.0), st.floats(0.3, 1.0), st.floats(0.3, 1.0))
def test_all_targets_are_found_and_share_runs(capacity, share_95, share_99):
    known = {0.9: capacity, 0.95: capacity * share_95, 0.99: capacity * share_95 * share_99}
    system = Known(known)
    found = find_capacity(system, TARGETS, guess_rps=1.0, tolerance=0.03)
    for target in TARGETS:
        assert found[target] <= known[target] <= found[target] * 1.031
    assert len(set(system.rates)) == len(system.rates)


def test_a_system_that_never_passes_has_no_capacity():
    assert find_capacity(Known({0.9: 0.0}), (0.9,), guess_rps=1.0, tolerance=0.1) == {0.9: 0.0}


def test_a_system_that_always_passes_stops_at_the_highest_rate():
    found = find_capacity(Known({0.9: math.inf}), (0.9,), guess_rps=1.0, tolerance=0.1)[0.9]
    assert HIGHEST_RPS / 2 < found <= HIGHEST_RPS
    assert found > LOWEST_RPS


def test_a_ratio_of_equal_systems_is_one_and_needs_three_seeds():
    assert ratio_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (1.0, 1.0)
    assert ratio_interval([1.0, 2.0], [1.0, 2.0]) is None
    low, high = ratio_interval([2.0, 4.0, 6.5], [1.0, 2.0, 3.0])
    assert low == pytest.approx(2.0)
    assert 2.0 < high < 2.2


def test_an_entry_compares_with_the_best_baseline_with_and_without_drafts():
    capacity = {"slos-serve": 6.0, "slos-serve-ar": 4.0, "vllm": 2.0, "sarathi-serve": 2.5, "vllm-spec": 3.0}
    measured = {
        name: Measured(system=name, settings={}, by_target={target: [rps] * 3 for target in TARGETS})
        for name, rps in capacity.items()
    }
    entry = scenario_entry(measured)
    assert (entry["best_baseline"], entry["best_baseline_spec"]) == ("sarathi-serve", "vllm-spec")
    assert (entry["ratio"], entry["ratio_spec"], entry["ratio_ar"]) == (2.4, 2.0, 1.6)
    assert entry["ratio_interval"] == pytest.approx((2.4, 2.4))
    assert entry["spread"]["vllm"] == [2.0, 2.0]
    keys = {"capacity_rps", "capacity_95_rps", "capacity_99_rps", "settings", "clairvoyant_rps", "share_of_clairvoyant"}
    assert keys <= set(entry)
    geomean = {"ratio": 2.4, "ratio_spec": 2.0, "ratio_ar": None}
    text = as_text({"hardware": {"toy": {"scenarios": {"chatbot": entry}, "geomean": geomean}}})
    assert "| chatbot | 6.00 | 4.00 | 2.00 | 2.50 | 3.00 | 2.40 | 2.00 | 1.60 |" in text
