"""Rules, dashboards and pages name metrics that exist, and every alert fires when it should and only then."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from slos_serve.config import SloConfig
from slos_serve.http.metrics import SloMetrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
NAMED = [RULES, *sorted((ROOT / "deploy").rglob("*.json")), *sorted((ROOT / "docs").rglob("*.md"))]
A_METRIC = re.compile(r"(?<![\w:])slos_serve_[a-z_]*[a-z]\b(?!:)")  # what a rule records has colons in its name


@pytest.fixture(scope="module")
def registry():
    registry = CollectorRegistry()
    metrics = SloMetrics(registry)
    metrics.know(SloConfig())
    metrics.know_hops()
    for outcome, verdict in (("met", "promised"), ("missed", "best-effort")):
        metrics.count_outcome("chat", "", outcome)
        metrics.count_verdict("chat", verdict, "")
    metrics.observe(metrics.plan, [0.001])
    metrics.show({"draft_lengths": {"chat": 2}, "class_modes": {"chat": "observe"}})
    return registry


@pytest.fixture(scope="module")
def families(registry):
    return {
        family.name + ("_total" if family.type == "counter" else ""): {
            family.name,
            *(sample.name for sample in family.samples if not sample.name.endswith("_created")),
        }
        for family in registry.collect()
    }


def promtool(*arguments, data=None):
    path = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run([path, *arguments], input=data, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def alerts():
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_metric_that_a_rule_a_dashboard_or_a_page_names_exists(path, families):
    named = set(A_METRIC.findall(path.read_text(encoding="utf-8")))
    assert not named - set().union(*families.values())


def test_every_metric_is_documented(families):
    text = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert not [name for name in families if name not in text]


def test_every_metric_has_a_panel(families):
    shown = (ROOT / "deploy" / "grafana" / "slos-serve.json").read_text(encoding="utf-8")
    assert not [name for name in families if name not in shown]


def test_every_alert_has_a_paragraph_of_its_own_and_no_paragraph_is_left_over():
    text = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    names = [rule["alert"] for rule in alerts()]
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == names
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"


def test_every_alert_is_provoked_in_the_test_of_the_rules():
    tests = yaml.safe_load((Path(__file__).parent / "rules_test.yaml").read_text(encoding="utf-8"))["tests"]
    provoked = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert provoked == {rule["alert"] for rule in alerts()}


def test_every_alert_fires_where_it_must_and_is_silent_where_not():
    assert "SUCCESS" in promtool("test", "rules", str(Path(__file__).parent / "rules_test.yaml"))


def test_promtool_finds_nothing_wrong_with_the_rules():
    assert "SUCCESS" in promtool("check", "rules", str(RULES))


def test_promtool_finds_nothing_wrong_with_the_metrics(registry):
    assert promtool("check", "metrics", data=generate_latest(registry).decode()) == ""
