"""The last hour in buckets: what is counted, that it stays bounded, and that buckets add up to what happened."""

import json

from hypothesis import given
from hypothesis import strategies as st

from slos_serve.http.history import History

ENDS = st.fixed_dictionaries(
    {
        "outcome": st.sampled_from(["met", "missed", "declined", "rejected", "failed", "cancelled", "none"]),
        "promised": st.booleans(),
        "stages": st.fixed_dictionaries({"prefill": st.sampled_from(["met", "missed", ""])}),
    }
)


@given(st.lists(st.tuples(st.floats(0, 5000), st.sampled_from(["chat", "code"]), ENDS), max_size=60))
def test_counts_of_all_buckets_are_those_since_the_start_and_none_is_lost(ends):
    history = History(num_buckets=1000)
    for at_s, name, end in ends:
        history.take_end(at_s, name, end)
    sums = {}
    for bucket in history.since():
        for name, counts in bucket["classes"].items():
            for key, value in counts.items():
                sums[name, key] = sums.get((name, key), 0) + value
    totals = {(name, key): value for name, counts in history.totals().items() for key, value in counts.items()}
    assert sums == totals
    with_slo = [end for _, _, end in ends if end["outcome"] not in ("none", "cancelled")]
    assert sum(value for (_, key), value in totals.items() if key == "counted") == len(with_slo)


def test_what_another_history_has_grown_by_adds_up_to_its_steps():
    replica, front = History(), History()
    for number in range(4):
        before = replica.step_sums()
        replica.take_steps(10.0 * number, [(0.02, 0.021, 0.019, 50, 40, 0, 3), (0.01, None, None, 5, 0, 1, 3)])
        front.take_step_sums(10.0 * number, {key: n - before.get(key, 0) for key, n in replica.step_sums().items()})
    assert [one["steps"] for one in front.since()] == [one["steps"] for one in replica.since()]


def test_an_hour_is_kept_and_no_more():
    history = History()
    for second in range(0, 3 * 3600, 5):
        history.take_load(float(second), {"num_promised": second, "effective_mode": "enforce"})
    buckets = history.since()
    assert len(buckets) == 360
    assert buckets[0]["t"] == 2 * 3600
    assert len(json.dumps(buckets)) < 50_000


def test_of_live_requests_the_most_at_once_is_kept_and_what_changed_lately_is_told_alone():
    history = History()
    for at_s, promised in ((1.0, 3), (2.0, 9), (9.0, 4), (12.0, 1)):
        history.take_load(at_s, {"num_promised": promised, "num_kv_blocks": 100, "free_kv_blocks": 75})
    first, second = history.since()
    assert first["load"] == {"num_promised": 9, "kv_used": 0.25}
    assert history.since(10.5) == [second]


def test_steps_add_up_to_what_batches_held_and_how_well_they_were_foretold():
    history = History()
    history.take_steps(
        3.0, [[0.02, 0.019, 0.022, 130, 100, 10, 21], [0.03, None, None, 5, 0, 0, 5], [0.03, 0.02, 0.025, 5, 0, 0, 5]]
    )
    (bucket,) = history.since()
    steps = bucket["steps"]
    assert (steps["n"], steps["foretold"], steps["late"]) == (3, 2, 1)
    assert (steps["prompt_tokens"], steps["decode_tokens"], steps["draft_tokens"]) == (100, 30, 10)
    assert steps["error_s"] == 0.011
    assert (steps["foretold_s"], steps["predicted_s"]) == (0.05, 0.039)


def test_time_to_spare_is_what_was_asked_minus_what_came():
    history = History()
    for came in (300.0, 410.0):
        history.take_end(0.0, "chat", {"outcome": "met", "asked": {"ttft_ms": 400.0}, "ttft_ms": came})
    assert history.totals()["chat"] == {
        "met": 2,
        "counted": 2,
        "slack_n": 2,
        "slack_ms": 90.0,
        "least_slack_ms": -10.0,
    }
