"""Several engines' numbers are one, by one list that servers, clusters and metrics go by."""

import pytest
from prometheus_client import CollectorRegistry

from slos_serve.http.metrics import SloMetrics
from slos_serve.http.status import FIELDS, KEYS, joined

ONE = {**dict.fromkeys(KEYS, 2.0), "effective_mode": "enforce", "reason": ""}
BUSY = {**dict.fromkeys(KEYS, 5.0), "effective_mode": "enforce", "reason": ""}
HELD = {**ONE, "effective_mode": "observe", "reason": "no profile"}


def test_one_engine_is_itself():
    assert joined([ONE]) == ONE


def test_counts_add_up_and_the_last_to_drain_counts():
    whole = joined([ONE, BUSY])
    assert (whole["num_waiting"], whole["steps"], whole["drain_s"], whole["margin_coverage"]) == (7.0, 7.0, 5.0, 2.0)


def test_where_a_router_chooses_the_best_engine_counts():
    assert joined([ONE, BUSY], is_routed=True)["drain_s"] == 2.0


def test_what_nobody_tells_is_unknown_and_headroom_needs_everybody():
    silent = {key: value for key, value in ONE.items() if key not in {"headroom_tokens_per_s", "expired"}}
    whole = joined([silent, ONE])
    assert whole["headroom_tokens_per_s"] is None
    assert whole["expired"] == 2.0
    assert joined([silent])["expired"] is None
    assert joined([])["num_waiting"] is None


@pytest.mark.parametrize(
    ("every", "is_routed", "mode", "reason"),
    [
        ([ONE, HELD], False, "observe", "no profile"),
        ([HELD, ONE], False, "observe", "no profile"),
        ([HELD, ONE], True, "enforce", ""),
        ([HELD, HELD], True, "observe", "no profile"),
        ([ONE, BUSY], False, "enforce", ""),
    ],
)
def test_the_whole_enforces_where_all_do_or_where_a_router_finds_one(every, is_routed, mode, reason):
    whole = joined(every, is_routed=is_routed)
    assert (whole["effective_mode"], whole["reason"]) == (mode, reason)


@pytest.mark.parametrize("is_routed", [False, True])
def test_where_one_engine_is_emulated_the_whole_says_so(is_routed):
    assert "device" not in joined([ONE, BUSY], is_routed=is_routed)
    assert joined([ONE, {**BUSY, "device": {"emulated": "x"}}], is_routed=is_routed)["device"] == {"emulated": "x"}


def test_every_number_with_a_metric_is_shown():
    registry = CollectorRegistry()
    metrics = SloMetrics(registry)
    metrics.show(ONE)
    metrics.count(ONE)
    metrics.count(BUSY)
    for field in FIELDS:
        if field.metric is not None:
            assert registry.get_sample_value(field.metric[0]) == (5.0 if field.counts else 2.0)
