"""What `slos-serve config` prints is the configuration it was asked about, and explains every key once."""

import json
from dataclasses import fields

import pytest

from slos_serve.cli import main
from slos_serve.commands.config import CLASS_KEYS, KEYS, as_yaml
from slos_serve.config import ApiKey, SloClass, SloConfig, load_slo_config

RICH = SloConfig(
    classes={
        "best-effort": SloClass(name="best-effort", ttl_ms=5000),
        "7": SloClass(name="7", ttft_ms=300, e2e_ms=0.5, on_unattainable="reject", weight=2, floor_ms=0),
        "yes": SloClass(name="yes", ttft_slowdown=3.5, output_tokens_hint=7, tpot_ms=50),
    },
    default_class="yes",
    tenants={"größer: #1": "7"},
    models={"null": "yes"},
    api_keys={"acme": ApiKey(key_sha256=ApiKey.digest("sk-1"), slo_class="7", admin=True)},
    trusted_proxies=("10.0.0.0/8",),
    max_best_effort_queue=9,
)


@pytest.mark.parametrize("config", [SloConfig(), RICH])
def test_the_file_reads_as_the_configuration_it_was_made_from(config, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    assert load_slo_config(path) == config


def test_every_key_is_explained():
    assert set(KEYS) == {field.name for field in fields(SloConfig)}
    assert set(CLASS_KEYS) == {field.name for field in fields(SloClass)} - {"name"}


def test_the_verb_prints_the_effective_file_and_its_json(capsys, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes: {gold: {ttft_ms: 100}}\ndefault_class: gold\n")
    assert main(["config", "--slo-config", str(path)]) == 0
    printed = capsys.readouterr().out
    path.write_text(printed)
    config = load_slo_config(path)
    assert (config.default_class, config.classes["gold"].ttft_ms, "chat" in config.classes) == ("gold", 100, True)
    assert main(["config", "--slo-config", str(path), "--json"]) == 0
    assert SloConfig.from_json(json.loads(capsys.readouterr().out)) == config
    path.write_text("classes: {gold: 5}")
    assert main(["config", "--slo-config", str(path)]) == 2
