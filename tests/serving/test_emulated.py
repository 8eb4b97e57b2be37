"""`serve --emulate`: what reaches vLLM, and bad input, told in one line before anything starts."""

import argparse
import importlib.metadata
import json

import pytest

from slos_serve import cli
from slos_serve.commands import serve
from slos_serve.emulated import VARIABLE
from slos_serve.emulated.emulation import notice
from slos_serve.serving import prepare, replicas
from slos_serve.sim.hardware import load_hardware

pytestmark = pytest.mark.usefixtures("fake_vllm")
NAME = "h100-8b-derived"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def model(model):
    (model / "tokenizer.json").write_text("{}")
    return model


def parse(*arguments):
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    args, args.extra = parser.parse_known_args([str(argument) for argument in arguments])
    args.arguments = [str(argument) for argument in arguments]
    return args


def plan_of(*arguments, environ=None):
    args = parse(*arguments)
    return prepare.prepare(args, prepare.find_engine(args.emulate), environ or {})


def fail(capsys, *arguments):
    status = cli.main(["serve", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert status == 2
    return captured.err


def value_of(plan, flag):
    return plan.command[plan.command.index(flag) + 1]


def test_the_device_and_its_limits_reach_vllm_and_it_is_said_aloud(model):
    plan = plan_of(model, "--emulate", NAME)
    assert plan.env[VARIABLE] == NAME
    assert value_of(plan, "--max-num-seqs") == "512"
    assert value_of(plan, "--max-model-len") == "16384"
    assert value_of(plan, "--max-num-batched-tokens") == "8192"
    assert "--kv-cache-memory-bytes" not in plan.command
    assert any("EMULATED" in note for note in plan.notes)


def test_limits_and_environment_that_the_user_gives_stay(model):
    plan = plan_of(model, "--emulate", NAME, "--max-num-seqs", "32", environ={"OMP_NUM_THREADS": "3"})
    assert plan.command.count("--max-num-seqs") == 1
    assert value_of(plan, "--max-num-seqs") == "32"
    assert "OMP_NUM_THREADS" not in plan.env


def test_a_file_with_more_seats_than_its_memory_gets_as_many_as_fit(model, tmp_path):
    document = load_hardware(NAME).to_json() | {"kv_tokens": 1024, "max_num_seqs": 256}
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert value_of(plan_of(model, "--emulate", tmp_path / "mine.json"), "--max-num-seqs") == "64"
    plan = plan_of(model, "--emulate", tmp_path / "mine.json", "--block-size", "32")
    assert value_of(plan, "--max-num-seqs") == "32"


def test_plain_vllm_runs_on_the_same_device_for_comparison(model):
    plan = plan_of(model, "--emulate", f"{NAME},slower=2", "--no-slo")
    assert plan.mode == "none"
    assert plan.env[VARIABLE] == f"{NAME},slower=2"
    assert "--scheduler-cls" not in plan.command


def test_a_profile_is_of_one_device_and_never_of_this_machine(model):
    plans = [plan_of(model), plan_of(model, "--emulate", NAME), plan_of(model, "--emulate", f"{NAME},slower=2")]
    assert len({plan.profile for plan in plans}) == 3
    assert [bool(notice(plan.key)) for plan in plans] == [False, True, True]


def test_replicas_of_an_emulated_device_share_a_core(model):
    args = parse(model, "--emulate", NAME, "--replicas", "4")
    assert replicas.bundle_of(args, prepare.find_engine(args.emulate)) == {"CPU": 0.25}


def test_without_the_flag_nothing_is_emulated(model):
    assert VARIABLE not in plan_of(model).env


def test_a_variable_left_behind_stops_a_server_that_did_not_ask(capsys, model, free_port, monkeypatch, fake_vllm):
    monkeypatch.setenv(VARIABLE, NAME)
    assert "never emulated by accident" in fail(capsys, model, "--port", free_port)
    assert not fake_vllm.exists()


def test_an_unknown_name_is_answered_with_the_closest(capsys, model, free_port):
    assert "did you mean h100-8b-derived?" in fail(capsys, model, "--port", free_port, "--emulate", "h100-8b")


def test_a_file_without_kv_tokens_is_told_by_its_key(capsys, model, free_port, tmp_path):
    document = load_hardware(NAME).to_json()
    del document["kv_tokens"]
    (tmp_path / "mine.json").write_text(json.dumps(document))
    assert "kv_tokens" in fail(capsys, model, "--port", free_port, "--emulate", tmp_path / "mine.json")


def test_a_vllm_for_gpus_is_never_put_on_an_emulated_device(capsys, model, free_port, monkeypatch):
    engines = [prepare.InstalledVllm(package="vllm", version="0.29.0", is_cpu=False)]
    monkeypatch.setattr(prepare, "installed_engines", lambda: engines)
    assert "build for CPUs" in fail(capsys, model, "--port", free_port, "--emulate", NAME)


def test_a_model_without_a_tokenizer_is_told(capsys, model, free_port):
    (model / "tokenizer.json").unlink()
    assert "tokenizer" in fail(capsys, model, "--port", free_port, "--emulate", NAME)


def test_more_seats_than_the_files_memory_are_told_with_the_most(capsys, model, free_port):
    arguments = (model, "--port", free_port, "--emulate", NAME, "--max-num-seqs", "50000")
    assert "at most 28125" in fail(capsys, *arguments)


def test_an_installation_in_which_vllm_does_not_find_the_device_is_told(capsys, model, free_port, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert "installed anew" in fail(capsys, model, "--port", free_port, "--emulate", NAME)


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size", "-tp"])
def test_more_than_one_gpu_of_an_emulated_replica_is_told(capsys, model, free_port, flag):
    told = fail(capsys, model, "--port", free_port, "--emulate", NAME, flag, "2")
    assert "a hardware file is about a whole replica" in told
