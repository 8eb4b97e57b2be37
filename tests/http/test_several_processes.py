"""Several API servers of one engine share one /metrics: counters add up, gauges are one, nothing old is left behind."""

import json
import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

SERVER = """
import json, sys, warnings
warnings.simplefilter("error")
from prometheus_client import CollectorRegistry
from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics

client = int(sys.argv[1])
hub = Hub(SloMetrics(CollectorRegistry()))
hub.configure(client=client)
for message in json.load(sys.stdin):
    hub.feed(message)
"""


def ended(name, outcome, client, slo_class="chat"):
    more = {"outcome": outcome, "promised": True, "stages": {"prefill": outcome}, "client": client}
    more |= {"least_slack_ms": {"prefill": 50.0, "answer": -1.0}}
    return {"slo_id": name, "request_id": name, "slo_class": slo_class, "tenant": "", **more}


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Return a function that lets two API servers hear the same messages, and what /metrics shows then."""

    def run(messages):
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        for client in ("0", "1"):
            command = [sys.executable, "-c", SERVER, client]
            subprocess.run(command, input=json.dumps(messages), env=environment, text=True, check=True, timeout=300)
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry

    return run


def test_each_server_counts_its_own_requests_once_and_they_add_up(shown):
    ends = [ended("a", "met", 0), ended("b", "missed", 1), ended("c", "met", 1)]
    state = {"effective_mode": "enforce", "steps": 5, "num_promised": 3, "step_downs": 2}
    registry = shown([{"finished": ends, "snapshot": state, "plan_s": [0.001]}])

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value("slos_serve_promises_total", **{"class": "chat", "result": "kept"}) == 2
    assert value("slos_serve_promises_total", **{"class": "chat", "result": "broken"}) == 1
    assert value("slos_serve_promises_total", **{"class": "coding", "result": "broken"}) == 0
    assert value("slos_serve_step_downs_total") == 2
    assert value("slos_serve_plan_seconds_count") == 1
    slack = {"class": "chat", "stage": "answer"}
    assert (
        value("slos_serve_slack_seconds_count", **slack)
        == value("slos_serve_slack_seconds_bucket", **slack, le="0.0")
        == 3
    )
    assert value("slos_serve_promised_requests") == 3
    assert value("slos_serve_mode") == 2


def test_a_class_that_no_longer_differs_is_not_left_behind(shown):
    states = [{"effective_mode": "enforce", "class_modes": modes} for modes in ({"chat": "observe"}, {})]
    registry = shown([{"snapshot": state} for state in states])
    assert registry.get_sample_value("slos_serve_class_mode", {"class": "chat"}) == 2
