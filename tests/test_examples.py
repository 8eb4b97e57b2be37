"""Every example runs and prints what stands beside it (`...` for what other versions of a planner may change)."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_what_stands_beside_it(path, tmp_path):
    result = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr
    expected = path.with_suffix(".out").read_text(encoding="utf-8")
    assert doctest.OutputChecker().check_output(expected, result.stdout, doctest.ELLIPSIS), result.stdout


@pytest.mark.parametrize(
    "path", [EXAMPLES.parent / "docs/extend/scheduler.md", *sorted(EXAMPLES.glob("*.py"))], ids=str
)
def test_every_class_that_a_page_or_an_example_names_is_there(path):
    for module, name in re.findall(r"\b(own_\w+):(\w+)", path.read_text(encoding="utf-8")):
        assert f"class {name}" in (EXAMPLES / f"{module}.py").read_text(encoding="utf-8")
