"""The dashboard is what its table of panels makes, fits Grafana's grid, and asks Prometheus what it understands."""

import itertools
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "slos-serve.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries():
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_dashboard_is_up_to_date():
    made = runpy.run_path(str(GRAFANA / "make.py"))["text"]()
    assert (GRAFANA / "slos-serve.json").read_text(encoding="utf-8") == made, "run python deploy/grafana/make.py"


def test_no_two_panels_share_a_place_or_a_number():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        cell
        for at in places
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]
    assert len(cells) == len(set(cells))
    assert all(at["x"] + at["w"] <= 24 for at in places)


def test_every_variable_of_a_query_is_one_of_the_dashboard():
    known = {"$" + variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\w+", " ".join(queries()))) <= known | {"$__rate_interval"}


def test_prometheus_understands_every_query(tmp_path):
    path = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    exprs = [re.sub(r"\$__rate_interval", "5m", query) for query in queries()]
    rules = [{"record": f"panel:{i}", "expr": expr} for i, expr in enumerate(exprs)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run([path, "check", "rules", str(file)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
