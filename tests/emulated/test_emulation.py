"""How an emulated device is named, and that nothing is emulated where nobody asked."""

import json

import pytest

from slos_serve import emulated
from slos_serve.emulated.emulation import Switches, current, notice_of, parse
from slos_serve.errors import ConfigError
from slos_serve.sim.hardware import load_hardware

NAME = "h100-8b-derived"


def test_without_the_variable_nothing_is_emulated(monkeypatch):
    monkeypatch.delenv(emulated.VARIABLE, raising=False)
    assert emulated.platform_class() is None
    assert current() is None


def test_an_empty_variable_asks_for_nothing(monkeypatch):
    monkeypatch.setenv(emulated.VARIABLE, "")
    assert emulated.platform_class() is None


def test_the_variable_names_the_device(monkeypatch):
    monkeypatch.setenv(emulated.VARIABLE, f"{NAME},slower=2")
    assert emulated.platform_class() == "slos_serve.emulated.platform.EmulatedPlatform"
    assert current().switches.slower == 2


def test_a_name_alone_is_its_file_without_switches():
    emulation = parse(NAME)
    assert emulation.hardware == load_hardware(NAME)
    assert emulation.switches == Switches()
    assert emulation.describe()["emulated"] == NAME
    assert "no model runs" in emulation.describe()["leaves_out"]


@pytest.mark.parametrize("device", [None, "CPU", {"vllm": "0.29.0"}])
def test_a_real_device_needs_no_notice(device):
    assert notice_of(device) == ""


def test_the_notice_of_an_emulated_device_names_it_and_what_it_leaves_out():
    said = notice_of(parse(NAME).describe())
    assert said.startswith(f"The device is EMULATED ({NAME}): no model runs")


def test_every_switch_is_read():
    text = f"{NAME},slower=1.5,noise=0.05,slow=60:5:3,stall=30:0.5,acceptance=0.4,output_tokens=0,seed=7,log=/tmp/x"
    assert parse(text).switches == Switches(
        slower=1.5,
        noise=0.05,
        slow=(60, 5, 3),
        stall=(30, 0.5),
        acceptance=0.4,
        output_tokens=0,
        seed=7,
        log="/tmp/x",
    )


def test_what_is_written_is_read_again():
    emulation = parse(f"{NAME},slower=1.5,,seed=3")
    assert parse(emulation.text) == emulation


def test_a_file_is_named_by_its_whole_path_so_that_another_folder_finds_it(tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(json.dumps(load_hardware(NAME).to_json()))
    monkeypatch.chdir(tmp_path)
    assert parse("mine.json,seed=1").text == f"{tmp_path / 'mine.json'},seed=1"


def test_two_devices_that_may_differ_in_speed_have_different_keys(tmp_path):
    document = load_hardware(NAME).to_json()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    before = parse(str(path)).key()
    document["perf_model"]["lines"][0]["fixed_s"] *= 2
    path.write_text(json.dumps(document))
    assert parse(str(path)).key() != before
    assert parse(f"{NAME},slower=2").key() != parse(NAME).key()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("h100-8b-derivd", "did you mean h100-8b-derived?"),
        ("nowhere.json", "a JSON file that exists"),
        (f"{NAME},slowr=2", "did you mean slower?"),
        (f"{NAME},slower", "SWITCH=VALUE"),
        (f"{NAME},slower=0", "above 0"),
        (f"{NAME},slower=-1", "0 or more"),
        (f"{NAME},noise=fast", "0 or more"),
        (f"{NAME},noise=nan", "0 or more"),
        (f"{NAME},acceptance=1.5", "at most 1"),
        (f"{NAME},slow=60:5", "EVERY:FOR:TIMES"),
        (f"{NAME},stall=0:5", "above 0 seconds"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(text, named):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert named in str(caught.value)


def test_a_file_without_kv_tokens_is_told_by_its_key(tmp_path):
    document = load_hardware(NAME).to_json()
    del document["kv_tokens"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="kv_tokens = None: expected a value"):
        parse(str(path))
