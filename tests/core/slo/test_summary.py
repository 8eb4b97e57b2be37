"""A summary counts every outcome once and says nothing it does not know."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.slo.summary import OUTCOMES, GradedRequest, drain_seconds, summarize

KEYS = {"system", "scenario", "by_class", "rate_rps", "num_requests", *OUTCOMES, "promised", "kept", "attainment"}
KEYS |= {"attainment_mean_tpot", "attainment_window", "goodput_rps", "ttft_s", "tpot_s", "drain_s"}


def graded(outcome, **more):
    return GradedRequest(slo_class=more.pop("slo_class", "chat"), outcome=outcome, **more)


def test_a_summary_has_the_documented_keys_for_all_and_for_each_class():
    entry = summarize([graded("met")], system="vllm", scenario="chatbot", duration_s=10.0)
    assert set(entry) >= KEYS
    assert set(entry["by_class"]["chat"]) >= KEYS - {"system", "scenario", "by_class"}
    assert json.loads(json.dumps(entry)) == entry


def test_cancelled_requests_are_outside_the_denominator():
    runs = [graded("met"), graded("missed"), graded("cancelled", promised=True)]
    entry = summarize(runs, system="s", scenario="x", duration_s=1.0)
    assert entry["attainment"] == 0.5
    assert entry["promised"] == 0


def test_a_declined_request_is_a_miss_under_every_rule_even_if_it_was_in_time():
    runs = [graded("declined", met_mean_tpot=True, met_window=True), graded("met", met_mean_tpot=True)]
    entry = summarize(runs, system="s", scenario="x", duration_s=1.0)
    assert entry["attainment"] == 0.5
    assert entry["attainment_mean_tpot"] == 0.5
    assert entry["attainment_window"] == 0.0


def test_requests_without_an_slo_have_their_own_column():
    entry = summarize([graded("none", slo_class="best-effort")], system="s", scenario="x", duration_s=2.0)
    assert entry["num_requests"] == 0
    assert entry["no_slo"] == 1
    assert entry["attainment"] is None


def test_kept_promises_are_those_met():
    runs = [graded("met", promised=True), graded("missed", promised=True), graded("met")]
    entry = summarize(runs, system="s", scenario="x", duration_s=1.0)
    assert (entry["promised"], entry["kept"]) == (2, 1)


def test_drain_is_how_late_the_last_promised_request_ends():
    runs = [
        graded("met", promised=True, finish_s=10.0, last_due_s=12.0),
        graded("missed", promised=True, finish_s=30.0, last_due_s=14.0),
        graded("declined", finish_s=90.0, last_due_s=20.0),
    ]
    assert drain_seconds(runs) == 16.0
    assert drain_seconds(runs[2:]) == 70.0
    assert drain_seconds([]) == 0.0


def test_unknown_latencies_are_left_out_of_percentiles():
    entry = summarize([graded("failed"), graded("met", ttft_s=0.2)], system="s", scenario="x", duration_s=1.0)
    assert entry["ttft_s"] == {"p50": 0.2, "p90": 0.2, "p99": 0.2}
    assert entry["tpot_s"] == {"p50": None, "p90": None, "p99": None}


@given(st.lists(st.sampled_from([*OUTCOMES, "none"])))
def test_the_six_outcomes_add_up_to_the_number_of_requests(outcomes):
    entry = summarize([graded(outcome) for outcome in outcomes], system="s", scenario="x", duration_s=1.0)
    assert sum(entry[name] for name in OUTCOMES) == entry["num_requests"]
    assert entry["num_requests"] + entry["no_slo"] == len(outcomes)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="outcome"):
        graded("lost")
    with pytest.raises(ValueError, match="duration_s"):
        summarize([], system="s", scenario="x", duration_s=0.0)
