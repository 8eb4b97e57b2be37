"""A real Prometheus scrapes a hub that is fed as an engine feeds it: what it stores, what fires, what panels show.

Debian's package `prometheus` brings it (`apt-get install prometheus`); without it these tests are skipped.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import MAX_TENANTS, SloMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
WAIT_S = 60.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """A running one, which scrapes and evaluates every second."""

    def __init__(self, path, folder, target):
        self.url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DEPLOY / "prometheus" / "rules.yaml")],
            "scrape_configs": [{"job_name": "slos-serve", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [path, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    def ask(self, page, **parameters):
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{page}?{query}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expr):
        return self.ask("query", query=expr)["result"]

    def value(self, expr):
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else None

    def firing(self):
        alerts = self.ask("alerts")["alerts"]
        return {(one["labels"]["alertname"], one["labels"].get("class")) for one in alerts if one["state"] == "firing"}

    def wait(self, is_so):
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            try:
                if is_so():
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.25)
        pytest.fail(f"not within {WAIT_S} s; firing: {self.firing()}")

    def wait_for_scrape(self):
        """Wait until what is true now has been stored."""
        before = self.value("timestamp(up)") or 0
        self.wait(lambda: (self.value("timestamp(up)") or 0) > before + 0.5)


@pytest.fixture(scope="module")
def registry():
    return CollectorRegistry()


@pytest.fixture(scope="module")
def hub(registry):
    hub = Hub(SloMetrics(registry))
    hub.configure()
    return hub


@pytest.fixture(scope="module")
def prometheus(hub, registry, tmp_path_factory):
    path = shutil.which("prometheus") or pytest.skip("prometheus is not installed (apt-get install prometheus)")
    port = free_port()
    hub.server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    prometheus = Prometheus(path, tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{port}")
    feed(hub)
    try:
        prometheus.wait(lambda: prometheus.value("up") == 1)
        prometheus.wait_for_scrape()
        yield prometheus
    finally:
        prometheus.process.terminate()
        prometheus.process.wait(30)
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def feed(hub, outcome="", count=0, slo_class="chat", tenant="", **snapshot):
    """Say as an engine does that promised requests ended, and how it is."""
    names = {"slo_class": slo_class, "tenant": tenant}
    ids = [f"{slo_class}-{tenant}-{outcome}-{i}" for i in range(count)]
    ends = [
        {
            "slo_id": i,
            "request_id": i,
            "outcome": outcome,
            "promised": True,
            "stages": {"prefill": outcome},
            "least_slack_ms": {"prefill": 12.5},
            **names,
        }
        for i in ids
    ]
    said = [{"slo_id": i, "request_id": i, "verdict": "promised", "reason": "", **names} for i in ids]
    state = {"effective_mode": "enforce", "steps": 1, "margin_coverage": 0.99, **snapshot}
    times = {"plan_s": [0.001] * count, "step_error_s": [0.001] * count}
    hub.feed({"verdicts": said, "finished": ends, "snapshot": state, **times})


def test_the_first_broken_promises_fire_the_alert_of_their_class_alone(prometheus, hub):
    feed(hub, "met", 40, "chat")
    feed(hub, "missed", 20, "chat")
    feed(hub, "met", 60, "coding")
    prometheus.wait(lambda: ("SlosServePromisesBurningFast", "chat") in prometheus.firing())
    assert not [name for name, slo_class in prometheus.firing() if slo_class == "coding"]
    assert prometheus.value('slos_serve_promises_total{class="chat",result="broken"}') == 20


def test_step_downs_and_faults_fire(prometheus, hub):
    feed(hub, step_downs=1, planner_faults={"plan": 2})
    wanted = {("SlosServeSteppedDown", None), ("SlosServePlannerFaults", None)}
    prometheus.wait(lambda: wanted <= prometheus.firing())


def test_every_panel_of_the_dashboard_is_answered_and_shows_what_happened(prometheus, hub):
    feed(
        hub,
        "met",
        5,
        "chat",
        class_modes={"chat": "observe"},
        draft_lengths={"chat": 2},
        device_wait_ratio=0.01,
        clock_error_s={"p50": 0.001},
    )
    prometheus.wait_for_scrape()
    dashboard = json.loads((DEPLOY / "grafana" / "slos-serve.json").read_text(encoding="utf-8"))
    chosen = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*", "$class": ".*"}
    empty = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in chosen.items():
                expr = expr.replace(name, value)
            if not prometheus.query(expr):
                empty.add(panel["title"])
    assert empty <= {"Hops by what the replica did"}  # counted by a cluster's ingress alone


def test_a_thousand_tenants_are_a_hundred_labels_and_one_for_the_others(prometheus, hub):
    for number in range(1000):
        feed(hub, "met", 1, "summarization", tenant=f"tenant-{number}")
    prometheus.wait_for_scrape()
    of_class = 'slos_serve_requests_total{class="summarization",outcome="met"}'
    assert prometheus.value(f"sum({of_class})") == 1000
    assert prometheus.value(f"count({of_class} > 0)") == MAX_TENANTS + 1
    assert prometheus.value('scrape_samples_scraped{job="slos-serve"}') < 5000


def test_an_engine_that_falls_silent_fires_although_its_server_answers(prometheus, hub, monkeypatch):
    assert ("SlosServeEngineSilent", None) not in prometheus.firing()
    hub.metrics.heard.set(time.time() - 30)
    prometheus.wait(lambda: ("SlosServeEngineSilent", None) in prometheus.firing())
    assert prometheus.value("up") == 1
    feed(hub)
    prometheus.wait(lambda: ("SlosServeEngineSilent", None) not in prometheus.firing())


def test_a_server_that_is_down_leaves_no_number_behind(prometheus, hub):
    hub.server.shutdown()
    hub.server.server_close()
    prometheus.wait(lambda: prometheus.value("up") == 0)
    assert prometheus.query("slos_serve_promised_requests") == []
