"""The harness around vLLM's own tests: what it takes of a source package, and what it makes of outcomes."""

import importlib.util
import io
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "conformance.py"


@pytest.fixture(scope="module")
def conformance():
    spec = importlib.util.spec_from_file_location("conformance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path, names):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"vllm-1.0/{name}")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"x\n"))
    return path


def test_only_the_schedulers_tests_are_unpacked_and_no_conftest(conformance, tmp_path):
    names = ["tests/v1/core/test_scheduler.py", "tests/v1/core/conftest.py", "tests/v1/kv_connector/unit/utils.py"]
    package = archive(tmp_path / "vllm-1.0.tar.gz", [*names, "tests/other/test_x.py", "../../evil.py", "setup.py"])
    folder = tmp_path / "out"
    folder.mkdir()
    conformance.unpack(package, folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    assert found == {names[0], names[2], *(f"{package}/__init__.py" for package in conformance.PACKAGES)}
    assert not (tmp_path / "evil.py").exists()


def test_a_package_without_the_tests_is_told(conformance, tmp_path):
    with pytest.raises(SystemExit, match="no tests/v1/core"):
        conformance.unpack(archive(tmp_path / "vllm-1.0.tar.gz", ["setup.py"]), tmp_path)


def run_of(outcomes):
    return {"outcomes": outcomes, "steps": {}, "faults": {}, "diverged": {}, "divergences": {}}


def test_differences_are_listed_and_only_the_unexplained_count(conformance, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "EXPLAINED", {("enforce", "test_b"): "it counts calls"})
    found = {
        "stock": run_of({"a": "passed", "test_b": "passed", "c": "failed"}),
        "observe": run_of({"a": "passed", "test_b": "passed", "c": "failed"}),
        "enforce": run_of({"a": "failed", "test_b": "failed", "c": "failed"}),
    }
    document = conformance.compare("1.0", found)
    assert [entry["test"] for entry in document["differences"]] == ["a", "test_b"]
    assert document["unexplained"] == 1
    assert document["stock_fails"] == ["c"]
    assert "UNEXPLAINED" in capsys.readouterr().out
