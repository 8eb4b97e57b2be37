"""Write the Grafana dashboard from the table of its panels: `python deploy/grafana/make.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("slos-serve.json")
SOURCE = {"type": "prometheus", "uid": "${source}"}
CHOSEN = 'job=~"$job",instance=~"$instance"'
CLASSED = CHOSEN + ',class=~"$class"'
WIDTH, HEIGHT = 24, 7  # of Grafana's grid; of a panel


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: what it shows as (query, legend), `unit` as Grafana names it, `kind` its type."""

    title: str
    queries: tuple[tuple[str, str], ...]
    text: str
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    least: float | None = 0
    most: float | None = None


def share(metric: str, part: str, whole: str, by: str) -> str:
    """Return the query for the share of `part` in `whole` (label matchers), by labels."""
    rates = [f"sum by ({by}) (rate({metric}{{{CLASSED}{labels}}}[$__rate_interval]))" for labels in ("," + part, whole)]
    return " / ".join(rates)


def rate(metric: str, by: str, labels: str = CLASSED) -> str:
    """Return the query for how often something happens a second, by labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: str = "", labels: str = CHOSEN) -> str:
    """Return the query for a quantile of a histogram, by labels."""
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({grouped}) (rate({histogram}_bucket{{{labels}}}[$__rate_interval])))"


def each(metric: str, labels: str = CHOSEN) -> str:
    """Return the query for a gauge of every server."""
    return f"{metric}{{{labels}}}"


REQUESTS, PROMISES, STAGES = "slos_serve_requests_total", "slos_serve_promises_total", "slos_serve_stage_slo_total"
COUNTED = ',outcome!~"cancelled|none"'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Are promises kept?": (
        Panel(
            title="Attainment by class",
            queries=((share(REQUESTS, 'outcome="met"', COUNTED, "class"), "{{class}}"),),
            text="Share of the requests with an SLO that met it, promised or not.",
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Promises kept by class",
            queries=((share(PROMISES, 'result="kept"', "", "class"), "{{class}}"),),
            text="Share of the promises that were kept. The alert's objective is 99 %; under 95 % steering stops.",
            unit="percentunit",
            most=1,
        ),
        Panel(
            title="Attainment by class and stage",
            queries=((share(STAGES, 'outcome="met"', "", "class, stage"), "{{class}} {{stage}}"),),
            text="Share of the stages (prefill, thinking, answer) whose tokens were in time.",
            unit="percentunit",
            most=1,
        ),
    ),
    "What is asked and answered?": (
        Panel(
            title="Requests by outcome",
            queries=((rate(REQUESTS, "outcome"), "{{outcome}}"),),
            text="Requests that ended, a second.",
            unit="reqps",
        ),
        Panel(
            title="Verdicts and why",
            queries=((rate("slos_serve_verdicts_total", "verdict, reason"), "{{verdict}} {{reason}}"),),
            text="Verdicts given, a second.",
            unit="reqps",
        ),
        Panel(
            title="Would-be verdicts",
            queries=((rate("slos_serve_would_be_total", "class, verdict"), "{{class}} {{verdict}}"),),
            text="What plans would have said while they are not carried out.",
            unit="reqps",
        ),
        Panel(
            title="Slack of promises (median, 5 %)",
            queries=tuple(
                (
                    quantile(q, "slos_serve_slack_seconds", "class, stage", CLASSED),
                    f"{{{{class}}}} {{{{stage}}}} {name}",
                )
                for q, name in ((0.5, "median"), (0.05, "5 %"))
            ),
            text="Time to spare at the first token, and at the tightest later one; below 0 a promise was broken.",
            unit="s",
            least=None,
        ),
        Panel(
            title="Live requests",
            queries=(
                (each("slos_serve_promised_requests"), "{{instance}} promised"),
                (each("slos_serve_best_effort_requests"), "{{instance}} best-effort"),
                (each("slos_serve_pending_requests"), "{{instance}} without a verdict"),
            ),
            text="Requests in the engine by what they hold.",
        ),
        Panel(
            title="Prefill rate not yet promised away",
            queries=((each("slos_serve_prefill_headroom_tokens_per_second"), "{{instance}}"),),
            text="Tokens a second for which promises could still be given; no line where it is not known.",
        ),
    ),
    "Can the plans be trusted?": (
        Panel(
            title="Mode",
            queries=((each("slos_serve_mode"), "{{instance}}"), (each("slos_serve_class_mode"), "{{class}}")),
            text="0: vLLM's own order. 1: observing. 2: enforcing.",
            width=6,
            most=2,
        ),
        Panel(
            title="Margin coverage",
            queries=((each("slos_serve_margin_coverage"), "{{instance}}"),),
            text="Share of steps within the predicted time; under 90 % steering stops.",
            unit="percentunit",
            width=6,
            least=None,
            most=1,
        ),
        Panel(
            title="Predicted against measured step time",
            queries=tuple(
                (quantile(q, "slos_serve_step_error_seconds"), name) for q, name in ((0.5, "median"), (0.99, "99 %"))
            ),
            text="Absolute difference.",
            unit="s",
            width=6,
        ),
        Panel(
            title="The plan's clock against the wall clock",
            queries=((each("slos_serve_clock_error_seconds"), "{{instance}}"),),
            text="When batches were expected to start minus when they did, the median; 0.25 s stops steering.",
            unit="s",
            width=6,
            least=None,
        ),
        Panel(
            title="Time to plan a step",
            queries=tuple(
                (quantile(q, "slos_serve_plan_seconds"), name) for q, name in ((0.5, "median"), (0.99, "99 %"))
            ),
            text="Time to plan one step.",
            unit="s",
            width=6,
        ),
        Panel(
            title="The device waits for the scheduler",
            queries=((each("slos_serve_device_wait_ratio"), "{{instance}}"),),
            text="Share of the device's time; 5 % stops steering.",
            unit="percentunit",
            width=6,
        ),
        Panel(
            title="Faults and step-downs",
            queries=(
                (
                    f"sum by (kind) (increase(slos_serve_planner_faults_total{{{CHOSEN}}}[$__rate_interval])) > 0",
                    "fault: {{kind}}",
                ),
                (
                    f"sum by (instance) (increase(slos_serve_step_downs_total{{{CHOSEN}}}[$__rate_interval]))",
                    "{{instance}} stepped down",
                ),
            ),
            text="Steps that were not planned, and times that steering stopped by itself.",
            width=6,
        ),
        Panel(
            title="Draft tokens per step",
            queries=((each("slos_serve_draft_length", CLASSED), "{{instance}} {{class}}"),),
            text="Speculative decoding: how many draft tokens each class gets.",
            width=6,
        ),
    ),
    "Best-effort work and routing": (
        Panel(
            title="Best-effort preemptions",
            queries=((rate("slos_serve_best_effort_preemptions_total", "instance", CHOSEN), "{{instance}}"),),
            text="Best-effort requests that had to give way, a second.",
            width=6,
        ),
        Panel(
            title="Hops by what the replica did",
            queries=((rate("slos_serve_router_hops_total", "outcome", CHOSEN), "{{outcome}}"),),
            text="On a cluster: requests sent to a replica, a second.",
            unit="reqps",
            width=6,
        ),
        Panel(
            title="Emulated device",
            queries=((each("slos_serve_emulated_device"), "{{instance}}"),),
            text="1 where no model runs and answers are made up.",
            kind="stat",
            width=6,
        ),
        Panel(
            title="Since the engine was heard",
            queries=(("time() - " + each("slos_serve_engine_heard_timestamp_seconds"), "{{instance}}"),),
            text="A few seconds at most; after 15 it is taken for silent.",
            unit="s",
            width=6,
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "uid": "slos-serve",
        "title": "slos-serve",
        "description": "Promises of latency: kept, given, and whether the plans behind them can be trusted.",
        "tags": ["slos-serve", "vllm"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "templating": {"list": [_source(), *map(_variable, ("job", "instance", "class"))]},
        "panels": list(_panels()),
    }


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str) -> dict[str, Any]:
    query = f"label_values({REQUESTS if label == 'class' else 'slos_serve_mode'}, {label})"
    choice = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": label, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, **choice}


def _panels() -> Iterator[dict[str, Any]]:
    top, number = 0, 0
    for heading, panels in ROWS.items():
        number += 1
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        top, left = top + 1, 0
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left = top + HEIGHT, 0
            number += 1
            yield _panel(panel, number, {"x": left, "y": top, "w": panel.width, "h": HEIGHT})
            left += panel.width
        top += HEIGHT


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    bounds = {name: value for name, value in (("min", panel.least), ("max", panel.most)) if value is not None}
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, **bounds}, "overrides": []},
        "targets": targets,
    }


def text() -> str:
    """Return the dashboard's file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text(), encoding="utf-8")
