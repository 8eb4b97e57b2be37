"""What vLLM is told about an emulated device, and what such a device refuses in one line."""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from slos_serve import emulated
from slos_serve.emulated.config import EmulatedConfig
from slos_serve.emulated.emulation import Switches, parse
from slos_serve.emulated.platform import WORKER, EmulatedPlatform, check
from slos_serve.errors import ConfigError
from slos_serve.vllm_plugin.testing import make_config

EMULATION = parse("h100-8b-derived")


def config(*, runner="generate", world_size=1, seats=64, block_size=16):
    return SimpleNamespace(
        model_config=SimpleNamespace(runner_type=runner),
        parallel_config=SimpleNamespace(world_size=world_size),
        scheduler_config=SimpleNamespace(max_num_seqs=seats),
        cache_config=SimpleNamespace(block_size=block_size),
    )


def test_what_it_can_serve_passes():
    check(config(), EMULATION)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"runner": "pooling"}, "generates text"),
        ({"world_size": 2}, "a hardware file is about a whole replica"),
        ({"seats": 50_000}, "at most 28125"),
        ({"seats": 2_000, "block_size": 256}, "at most 1757"),
    ],
)
def test_what_it_cannot_serve_is_told_with_what_was_expected(changes, named):
    with pytest.raises(ConfigError, match=named):
        check(config(**changes), EMULATION)


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_a_vllm_built_for_gpus_is_refused(monkeypatch, build):
    monkeypatch.setattr(f"torch.version.{build}", "13.0")
    with pytest.raises(ConfigError, match="build for CPUs"):
        check(config(), EMULATION)


def test_what_only_the_cpus_kernels_rule_out_is_put_back(tmp_path, monkeypatch):
    monkeypatch.setenv(emulated.VARIABLE, "h100-8b-derived")
    given = make_config(tmp_path, is_async=True)
    EmulatedPlatform.check_and_update_config(given)
    assert given.scheduler_config.async_scheduling
    assert given.parallel_config.worker_cls == WORKER
    assert given.parallel_config.distributed_executor_backend == "uni"
    assert given.cache_config.block_size == 16
    assert type(given) is EmulatedConfig
    assert given.use_v2_model_runner
    assert EmulatedPlatform.get_device_name() == "emulated h100-8b-derived"


def test_the_first_runner_is_taken_where_vllms_own_variable_says_so(tmp_path, monkeypatch):
    given = make_config(tmp_path)
    given.__class__ = EmulatedConfig
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert not given.use_v2_model_runner


def test_the_guide_lists_every_switch_and_no_other():
    guide = (Path(__file__).parents[2] / "docs" / "rehearse.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)=", guide, re.MULTILINE)) == {f.name for f in fields(Switches)}
