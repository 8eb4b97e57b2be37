"""`slos-serve serve`: wrong input is told before anything starts; then vLLM runs with our scheduler and a profile."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from slos_serve import cli
from slos_serve.commands import serve
from slos_serve.core.perf import PerfModel
from slos_serve.errors import ConfigError
from slos_serve.records.profile import SCHEMA
from slos_serve.serving import prepare, single
from slos_serve.serving.platforms import InstalledVllm

pytestmark = pytest.mark.timeout(180)


def write_profile(path, **changes):
    model = PerfModel.from_terms([{"per_token_s": 1e-3, "fixed_s": 1e-2}])
    document = {"schema": SCHEMA, "key": {}, "perf_model": model.to_json()} | changes
    path.write_text(json.dumps(document))
    return path


def parse(*arguments):
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    args, args.extra = parser.parse_known_args([str(argument) for argument in arguments])
    args.arguments = [str(argument) for argument in arguments]
    return args


def fail(capsys, *arguments):
    status = cli.main(["serve", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return status, captured.err


def test_a_taken_port_is_told_before_anything_starts(capsys, model, fake_vllm):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        status, err = fail(capsys, model, "--port", taken.getsockname()[1])
    assert status == 2
    assert "--port" in err
    assert "free port" in err
    assert not fake_vllm.exists()


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("name", ["missing", "./missing", "/no/such/folder", "empty", "a name with spaces"])
def test_a_missing_model_folder_is_told_before_anything_starts(capsys, tmp_path, name):
    (tmp_path / "empty").mkdir()
    status, err = fail(capsys, tmp_path / name if name in ("missing", "empty") else name)
    assert status == 2
    assert "MODEL" in err
    assert "config.json" in err


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--profile", "nowhere.json"], "--profile"),
        (["--slo-config", "nowhere.yaml"], "nowhere.yaml"),
        (["--no-slo", "--record", "steps.jsonl"], "--record"),
        (["--slo-mode", "maybe"], "--slo-mode"),
        (["--scheduler-cls", "my.Scheduler"], "--scheduler-cls"),
        (["--additional-config", "{"], "--additional-config"),
        (["--port", "70000"], "--port"),
    ],
)
def test_other_bad_input_is_one_line_and_status_2(capsys, model, free_port, arguments, named):
    status, err = fail(capsys, model, "--port", free_port, *arguments)
    assert status == 2
    assert named in err


@pytest.mark.usefixtures("fake_vllm")
def test_a_model_behind_a_flag_of_vllm_is_not_guessed(capsys, model):
    status, err = fail(capsys, "--dtype", "float32", model)
    assert status == 2
    assert "MODEL before --dtype" in err


def test_no_vllm_says_how_to_get_one(capsys, model, free_port, monkeypatch):
    monkeypatch.setattr(prepare, "installed_engines", list)
    status, err = fail(capsys, model, "--port", free_port)
    assert status == 1
    assert "pip install" in err


@pytest.mark.usefixtures("fake_vllm")
def test_vllms_flags_and_additional_config_reach_it_beside_ours(model, tmp_path, free_port):
    profile = write_profile(tmp_path / "profile.json")
    args = parse(
        *(model, "--port", free_port, "--profile", profile, "--record", tmp_path / "steps.jsonl"),
        *("--max-model-len", "2048", "--additional-config", '{"other": 1, "slo": {"guard_ms": 5}}'),
    )
    plan = prepare.prepare(args, prepare.find_engine(), {})
    command = plan.command
    additional = json.loads(command[command.index("--additional-config") + 1])
    assert command.count("--additional-config") == 1
    assert additional["other"] == 1
    channel = Path(additional["slo"].pop("channel_dir"))
    assert (channel.is_dir(), channel.stat().st_mode & 0o777) == (True, 0o700)
    prepare.remove_scratch(plan)
    assert not channel.exists()
    assert additional["slo"] == {
        "mode": "enforce",
        "edge": True,
        "may_enforce": True,
        "guard_ms": 5,
        "profile": str(profile),
        "profile_key": "",
        "record": str(tmp_path / "steps.jsonl"),
    }
    assert command[command.index("--scheduler-cls") + 1].endswith(".AutoSloScheduler")
    assert command[command.index("--middleware") + 1].endswith(".SloMiddleware")
    assert command[command.index("--max-model-len") + 1] == "2048"


@pytest.mark.usefixtures("fake_vllm")
def test_without_slos_it_is_plain_vllm_with_the_same_settings(model, tmp_path, free_port, monkeypatch):
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(prepare, "available_memory", lambda: 1 << 33)
    plan = prepare.prepare(parse(model, "--port", free_port, "--no-slo"), prepare.find_engine(), {})
    with_slos = prepare.prepare(parse(model, "--port", free_port), prepare.find_engine(), {})
    assert not any("slos_serve" in token for token in plan.arguments)
    assert plan.env == with_slos.env
    assert set(plan.command) < set(with_slos.command)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("proxies", "environ", "allowed"),
    [("[10.0.0.0/8]", {}, ""), ("[]", {}, None), ("[10.0.0.0/8]", {"FORWARDED_ALLOW_IPS": "10.0.0.1"}, None)],
)
def test_where_gateways_are_known_by_address_no_header_puts_another_in_its_place(
    model, tmp_path, free_port, proxies, environ, allowed
):
    (tmp_path / "classes.yaml").write_text(f"trusted_proxies: {proxies}")
    arguments = (model, "--port", free_port, "--slo-config", tmp_path / "classes.yaml")
    plan = prepare.prepare(parse(*arguments), prepare.find_engine(), environ)
    assert plan.env.get("FORWARDED_ALLOW_IPS") == allowed


@pytest.mark.usefixtures("fake_vllm")
def test_a_profile_belongs_to_model_and_speed_flags_but_not_to_the_port(model, tmp_path, free_port, monkeypatch):
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))

    def profile(*arguments):
        return prepare.prepare(parse(model, *arguments), prepare.find_engine(), {}).profile

    assert profile("--port", free_port) == profile("--served-model-name", "x")
    assert profile() != profile("--max-num-batched-tokens", "512")


def serve_in_child(*arguments):
    command = [sys.executable, "-m", "slos_serve.cli", "serve", *(str(argument) for argument in arguments)]
    # A test run in the background of a shell inherits that SIGINT is ignored; the server must not.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_is_told_as_json_and_a_signal_ends_both_processes(fake_vllm, model, tmp_path, free_port, number):
    profile = write_profile(tmp_path / "profile.json")
    child = serve_in_child(model, "--port", free_port, "--profile", profile, "--json")
    document = json.loads(child.stdout.readline())
    assert document == {
        "url": f"http://127.0.0.1:{free_port}",
        "model": str(model),
        "mode": "enforce",
        "profile": str(profile),
    }
    child.send_signal(number)
    out, err = child.communicate(timeout=90)
    assert out == ""
    assert "a line that vLLM prints" in err
    assert child.returncode == (0 if number == signal.SIGTERM else 130)
    assert json.loads(fake_vllm.read_text())["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", free_port))


@pytest.mark.usefixtures("fake_vllm")
def test_no_server_outlives_a_killed_parent(model, tmp_path, free_port):
    child = serve_in_child(model, "--port", free_port, "--profile", write_profile(tmp_path / "profile.json"), "--json")
    child.stdout.readline()
    child.kill()
    child.communicate(timeout=90)
    for _ in range(100):
        with socket.socket() as probe:
            probe.settimeout(0.1)
            if probe.connect_ex(("127.0.0.1", free_port)):
                return
    pytest.fail("the server still listens")


@pytest.mark.usefixtures("fake_vllm")
def test_vllms_exit_status_is_ours(model, tmp_path, free_port):
    profile = write_profile(tmp_path / "profile.json")
    child = serve_in_child(model, "--port", free_port, "--profile", profile, "--exit-with", 7)
    out, _ = child.communicate(timeout=90)
    assert (child.returncode, out.splitlines()[-1:]) == (7, [])


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_does_not_end_is_made_to_within_a_bound(model, tmp_path, free_port, monkeypatch, capsys):
    monkeypatch.setattr(prepare.launch, "PATIENCE_S", 0.5)
    profile = write_profile(tmp_path / "profile.json")
    assert run_until_ready(parse(model, "--port", free_port, "--profile", profile, "--never-end"), monkeypatch) == 137
    assert "still waits for its connections" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_vllm")
def test_the_bound_leaves_the_time_that_vllm_was_given_to_finish(model, free_port):
    plan = prepare.prepare(
        parse(model, "--port", free_port, "--no-slo", "--shutdown-timeout", 60), prepare.find_engine(), {}
    )
    assert plan.patience_s == prepare.launch.PATIENCE_S + 60


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("flags", [["--headless", "-r", "1"], ["--uds", "/tmp/socket"], ["--grpc"]])
def test_where_nothing_answers_http_nobody_waits_for_an_answer(model, tmp_path, free_port, flags, monkeypatch):
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))
    plan = prepare.prepare(parse(model, "--port", free_port, *flags), prepare.find_engine(), {})
    assert (plan.url, plan.must_profile) == ("", False)
    assert any("observing only" in note for note in plan.notes)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--headless"], "--headless = True"),
        (["--headless", "-dp", "4", "-dpl", "2", "-dpr", "2", "-dpa", "10.0.0.1"], "--headless = True"),
        (["-dp", "4", "-dpl", "2"], "--data-parallel-size-local = '2'"),
        (["--data-parallel-size=4", "--data-parallel-size-local", "0"], "--data-parallel-size-local = '0'"),
        (["-dp", "2", "--data-parallel-backend=ray"], "--data-parallel-backend = 'ray'"),
    ],
)
def test_engines_whose_promises_no_client_would_hear_are_refused_by_name(capsys, model, free_port, flags, named):
    status, err = fail(capsys, model, "--port", free_port, *flags)
    assert status == 2
    assert named in err
    assert "--no-slo" in err
    plan = prepare.prepare(parse(model, "--port", free_port, "--no-slo", *flags), prepare.find_engine(), {})
    assert plan.mode == "none"


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    "flags", [["-asc", "2"], ["-dp", "2"], ["-dp", "4", "-dpl", "2", "-dph"], ["-dp", "2", "-dpn", "1"]]
)
def test_api_servers_beside_their_engines_are_served_as_one(model, free_port, flags):
    plan = prepare.prepare(parse(model, "--port", free_port, *flags), prepare.find_engine(), {})
    assert plan.mode == "enforce"
    assert plan.arguments[-len(flags) :] == flags


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(("value", "is_refused"), [("1", True), ("0", False)])
def test_a_front_end_without_middleware_is_refused_by_name(model, free_port, value, is_refused):
    args, environ = parse(model, "--port", free_port), {"VLLM_USE_RUST_FRONTEND": value}
    if is_refused:
        with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND = '1': expected 0"):
            prepare.prepare(args, prepare.find_engine(), environ)
    else:
        assert prepare.prepare(args, prepare.find_engine(), environ).mode == "enforce"


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("vllm/entrypoints/cli/main.py", "vllm.entrypoints.cli.main"),
        ("vllm/v1/core/sched/async_scheduler.py", "vllm.v1.core.sched.async_scheduler"),
    ],
)
def test_a_vllm_that_lacks_what_is_started_is_told_in_one_line(fake_vllm, model, tmp_path, free_port, removed, named):
    (fake_vllm.parent / "site" / removed).unlink()
    profile = write_profile(tmp_path / "profile.json")
    child = serve_in_child(model, "--port", free_port, "--profile", profile)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 2
    assert [line for line in err.splitlines() if named in line] == [err.splitlines()[-1]]
    assert "Traceback" not in err


def test_a_vllm_without_torch_is_told_in_one_line(fake_vllm, model, tmp_path, free_port):
    missing = "import sys\nsys.modules['torch'] = None\nimport torch\n"
    (fake_vllm.parent / "site/vllm/entrypoints/cli/main.py").write_text(missing)
    child = serve_in_child(model, "--port", free_port, "--profile", write_profile(tmp_path / "profile.json"))
    _, err = child.communicate(timeout=90)
    assert child.returncode == 2
    assert "cannot be started: import of torch halted" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_fork_whose_scheduler_is_another_is_told_in_one_line(fake_vllm, model, tmp_path, free_port):
    (fake_vllm.parent / "site/vllm/v1/core/sched/scheduler.py").write_text("class OurOwn: ...")
    child = serve_in_child(model, "--port", free_port, "--profile", write_profile(tmp_path / "profile.json"))
    _, err = child.communicate(timeout=90)
    assert child.returncode == 2
    assert "has no Scheduler" in err.splitlines()[-1]


@pytest.mark.usefixtures("fake_vllm")
def test_a_vllm_older_than_those_tested_is_refused_by_version_and_served_without_slos(
    capsys, model, free_port, monkeypatch
):
    monkeypatch.setattr(
        prepare, "installed_engines", lambda: [InstalledVllm(package="vllm", version="0.28.1", is_cpu=False)]
    )
    status, err = fail(capsys, model, "--port", free_port)
    assert status == 2
    assert "vllm = '0.28.1': expected vLLM 0.29.0 to 0.33.0" in err
    assert run_until_ready(parse(model, "--port", free_port, "--no-slo"), monkeypatch) == 0


@pytest.mark.usefixtures("fake_vllm")
def test_a_newer_vllm_is_served_with_a_note(model, tmp_path, free_port, monkeypatch):
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))
    engine = InstalledVllm(package="vllm", version="0.35.0.dev3+g12345", is_cpu=False)
    plan = prepare.prepare(parse(model, "--port", free_port, "--slo-mode", "observe"), engine, {})
    assert "vLLM 0.35.0.dev3+g12345 is none that this release was tested with" in plan.notes[0]


@pytest.mark.usefixtures("fake_vllm")
def test_two_vllms_in_one_environment_are_refused_in_one_line(capsys, model, free_port, monkeypatch):
    two = [InstalledVllm(package=name, version="0.33.0", is_cpu=False) for name in ("vllm-cpu", "vllm")]
    monkeypatch.setattr(prepare, "installed_engines", lambda: two)
    status, err = fail(capsys, model, "--port", free_port)
    assert status == 1
    assert "uninstall both" in err


@pytest.fixture
def profiling(monkeypatch):
    """Stand in for the measuring, count its runs, and end the server once it is ready."""
    calls = []

    def install(outcome):
        module = types.ModuleType("slos_serve.bench.profiling")

        def profile_server(base_url, record_path, out_path, model_name, **options):
            calls.append((base_url, model_name))
            outcome(Path(record_path), Path(out_path))

        module.profile_server = profile_server
        monkeypatch.setitem(sys.modules, "slos_serve.bench.profiling", module)
        return calls

    return install


def run_until_ready(args, monkeypatch):
    say = single.say

    def say_and_end(text):
        say(text)
        if text.startswith("ready"):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(single, "say", say_and_end)
    return serve.run(args)


def measured(record, out):
    record.write_text('{"step": 1}\n')
    write_profile(out)


def test_a_profile_outlives_a_measurement_that_fails(tmp_path):
    from slos_serve.serving.profiles import set_aside

    path = tmp_path / "p.json"
    path.write_text("good")
    with set_aside(path):
        assert not path.exists()  # the server takes up what appears there
    assert path.read_text() == "good"
    with set_aside(path):
        path.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("p.json", "new")]
    path.rename(tmp_path / "p.json.before")  # as a killed run leaves it
    with set_aside(path):
        pass
    assert path.read_text() == "new"


def test_it_is_profiled_once_and_the_cache_is_used_then(fake_vllm, model, free_port, profiling, monkeypatch, capsys):
    calls = profiling(measured)
    args = parse(model, "--port", free_port)
    assert run_until_ready(args, monkeypatch) == 0
    assert calls == [(f"http://127.0.0.1:{free_port}", str(model))]
    assert "measuring" in capsys.readouterr().err
    slo = _slo(fake_vllm)
    assert Path(slo["profile"]).exists()
    assert Path(slo["profile"]).with_suffix(".steps.jsonl").read_text() == '{"step": 1}\n'
    assert not Path(slo["record"]).parent.exists()

    assert run_until_ready(args, monkeypatch) == 0
    assert len(calls) == 1
    assert "record" not in _slo(fake_vllm)

    args.reprofile = True
    assert run_until_ready(args, monkeypatch) == 0
    assert len(calls) == 2


def _slo(log):
    arguments = json.loads(log.read_text())["arguments"]
    return json.loads(arguments[arguments.index("--additional-config") + 1])["slo"]


@pytest.mark.usefixtures("fake_vllm")
def test_a_failed_measurement_stops_the_server_and_says_why(model, free_port, profiling, monkeypatch, capsys):
    def fails(record, out):
        raise RuntimeError("no steps were recorded")

    profiling(fails)
    assert run_until_ready(parse(model, "--port", free_port), monkeypatch) == 1
    assert "no steps were recorded" in capsys.readouterr().err


def test_progress_of_measuring_is_told_in_a_log_by_quarters(capsys):
    tell = prepare._teller()
    for share in (0.1, 0.26, 0.3, 0.8, 1.0):
        tell(share)
    assert capsys.readouterr().err.splitlines() == [f"slos-serve: measured {part}" for part in ("25%", "75%", "100%")]
