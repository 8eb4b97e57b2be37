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


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"schema": "other"}, "schema"),
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


def test_a_file_that_is_no_json_is_told(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="readable JSON"):
        load_hardware(str(path))
