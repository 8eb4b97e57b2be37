import math

import pytest
from parts import replica_state, stats
from prometheus_client import CollectorRegistry

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.ray_serve.reports import KEY, Reporter, parse_report


@pytest.fixture
def hub():
    return Hub(SloMetrics(CollectorRegistry()))


@pytest.fixture
def reporter(hub, clocks):
    return Reporter(hub, "digest", clock=clocks.wall)


def heard(hub, clocks, **more):
    hub.feed({"snapshot": {"steps": 1, "num_running": 1, "replica": replica_state(clocks.now), **more}})


def test_what_a_replica_reports_can_be_read_by_a_router(hub, reporter, clocks):
    heard(hub, clocks)
    report = parse_report({KEY: reporter.report()}, "a", clocks.now)
    assert report.digest == "digest"
    assert report.status["num_running"] == 1
    assert report.snapshot.replica_id == "a"


def test_a_replica_on_an_emulated_device_says_so(hub, reporter, clocks):
    heard(hub, clocks, device={"emulated": "x"})
    assert parse_report({KEY: reporter.report()}, "a", clocks.now).status["device"] == {"emulated": "x"}


def test_an_engine_never_heard_of_is_reported_as_such(reporter, clocks):
    report = parse_report({KEY: reporter.report()}, "a", clocks.now)
    assert report.silent_s == math.inf
    assert report.snapshot is None


def test_an_engine_that_makes_no_step_although_it_has_requests_is_stalled(hub, reporter, clocks):
    heard(hub, clocks)
    reporter.report()
    clocks.now += 7.0
    heard(hub, clocks)
    assert reporter.report()["stalled_s"] == 7.0
    heard(hub, clocks, steps=2)
    assert reporter.report()["stalled_s"] == 0.0


@pytest.mark.parametrize("kind", ["new", "all"])
def test_an_engine_in_pause_is_never_stalled_and_says_that_it_is_paused(hub, reporter, clocks, kind):
    heard(hub, clocks)
    reporter.report()
    heard(hub, clocks, paused=kind)
    clocks.now += 3600.0
    report = reporter.report()
    assert (report["stalled_s"], report["status"]["paused"]) == (0.0, kind)
    heard(hub, clocks, paused="")
    assert reporter.report()["stalled_s"] == 0.0
    clocks.now += 7.0
    assert reporter.report()["stalled_s"] == 7.0  # it was resumed, and makes no step


def test_an_idle_engine_is_never_stalled_and_its_state_never_old(hub, reporter, clocks):
    heard(hub, clocks, num_running=0)
    reporter.report()
    clocks.now += 100.0
    report = reporter.report()
    assert report["stalled_s"] == 0.0
    assert report["replica"]["time_s"] == pytest.approx(clocks.now, abs=1.0)


def test_a_clock_that_is_ahead_counts_as_now(clocks):
    report = parse_report(stats(clocks.now, replica=replica_state(clocks.now + 50)), "a", clocks.now)
    assert report.snapshot.time_s == clocks.now


@pytest.mark.parametrize(
    "data", [{}, {KEY: None}, {KEY: {"version": 0}}, {KEY: {"version": 1}}, {KEY: {"version": 1, "made_s": "x"}}]
)
def test_what_is_no_report_of_this_version_is_none(data, clocks):
    assert parse_report(data, "a", clocks.now) is None


def test_steps_are_reported_as_sums_that_only_grow(hub, reporter, clocks):
    heard(hub, clocks)
    hub.feed({"steps": [(0.02, 0.021, 0.024, 500, 400, 10, 40)]})
    first = parse_report({KEY: reporter.report()}, "a", clocks.now).status["step_sums"]
    hub.feed({"steps": [(0.02, 0.021, 0.024, 500, 400, 10, 40)]})
    second = parse_report({KEY: reporter.report()}, "a", clocks.now).status["step_sums"]
    assert second == {key: pytest.approx(2 * value) for key, value in first.items()}
    assert first["prompt_tokens"] == 400
