"""Manifests are parsed, name files and probes that exist, and ask for no more rights than a server needs."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.rglob("*.yaml"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))


class Strict(yaml.SafeLoader):
    """YAML in which no key is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is given twice"
        return super().construct_mapping(node, deep)


def documents(path):
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=Strict))


def kubernetes():
    return {one["kind"]: one for one in documents(DEPLOY / "kubernetes" / "slos-serve.yaml")}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_manifest_is_yaml_with_each_key_once(path):
    assert all(isinstance(one, dict) and one for one in documents(path))


def test_the_probes_are_those_of_the_guide():
    text = (ROOT / "docs" / "guide" / "probes.md").read_text(encoding="utf-8")
    said = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1].replace("port: 8000", "port: http"))
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == said.pop("terminationGracePeriodSeconds")
    assert {name: pod["containers"][0][name] for name in said} == said
    assert len(said) == 3


def test_the_pod_is_nobody_special_and_what_it_writes_is_on_volumes():
    deployment = kubernetes()["Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["home"]["persistentVolumeClaim"]["claimName"]
    assert claim == kubernetes()["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_service_finds_the_pod():
    found = kubernetes()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} <= ports


def test_every_file_and_volume_that_compose_mounts_is_there():
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / "compose" / source).is_file()
    build = COMPOSE["services"]["server"]["build"]
    assert (DEPLOY / "compose" / build["context"] / build["dockerfile"]).is_file()


def test_the_stack_of_compose_fits_together():
    scraped = documents(DEPLOY / "compose" / "prometheus.yaml")[0]
    host, port = scraped["scrape_configs"][0]["static_configs"][0]["targets"][0].split(":")
    assert f":{port}:{port}" in COMPOSE["services"][host]["ports"][0]
    mounts = [mount.split(":")[1] for service in COMPOSE["services"].values() for mount in service["volumes"]]
    assert all(f"/etc/prometheus/{name}" in mounts for name in scraped["rule_files"])
    shown = documents(DEPLOY / "compose" / "dashboards.yaml")[0]["providers"][0]["options"]["path"]
    assert any(mount.startswith(shown) for mount in mounts)
    source = documents(DEPLOY / "compose" / "grafana.yaml")[0]["datasources"][0]
    assert (
        source["type"]
        == json.loads((DEPLOY / "grafana" / "slos-serve.json").read_text())["panels"][1]["datasource"]["type"]
    )


def test_every_port_of_compose_is_this_machines_alone():
    assert all(port.startswith("127.0.0.1:") for one in COMPOSE["services"].values() for port in one["ports"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_copies_what_exists(path):
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["10001"]
    assert ["ENTRYPOINT", '["slos-serve", "serve"]'] in steps
    for word, rest in steps:
        assert word != "COPY" or (ROOT / rest.split()[0]).exists()
    assert ["VOLUME", "/home/slos"] in steps
