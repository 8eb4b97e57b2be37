"""Starting where little can be written: no home, a random user, a full disk, damaged and contended caches.

Each case runs the installed package in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slos_serve

PACKAGE = Path(slos_serve.__file__).parent
# One compiled loop, and what the hosts would say of it.
LOOP = """
import numpy as np
from slos_serve.core import jit
from slos_serve.core.perf import PerfModel, line_seconds
line = PerfModel.from_terms([{"per_token_s": 1e-3, "fixed_s": 2e-3}]).as_array()
print(round(float(line_seconds(line, 0, 3.0, 1.0, 0.0, 0.0, 0.0)), 6), jit.why_not_kept())
"""
# The two findings of `doctor` that this is about, without the seconds that importing vLLM takes.
DOCTOR = """
import dataclasses, json
from slos_serve.commands import doctor
print(json.dumps([dataclasses.asdict(check(None)) for check in (doctor._numba, doctor._cache)]))
"""


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the package that shares nothing compiled with the one under test."""
    folder = tmp_path / "copy"
    shutil.copytree(PACKAGE, folder / "slos_serve", ignore=shutil.ignore_patterns("__pycache__"))
    folder.chmod(0o755)
    return folder


@pytest.fixture
def python(copy, tmp_path):
    """Start a Python on the copy; nothing of the caller's home or caches is known to it unless a test says so."""
    hidden = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "HOME", "USER", "LOGNAME", "TMPDIR")

    def start(*arguments, prefix=(), **environ):
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_OPT": "0", **environ}
        return subprocess.Popen(
            [*prefix, sys.executable, *arguments],
            env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    run.start = start
    return run


def block(copy):
    """Put a file where Numba would want its folder: it stops root too."""
    for folder in (copy / "slos_serve", *(path for path in (copy / "slos_serve").rglob("*") if path.is_dir())):
        (folder / "__pycache__").touch()


def findings(out):
    return {finding["check"]: finding for finding in json.loads(out)}


def test_without_a_place_for_compiled_loops_they_are_compiled_in_memory_and_the_reason_is_known(python, copy):
    block(copy)
    status, out, err = python("-c", LOOP, HOME="/proc/none")
    assert (status, err) == (0, "")
    assert out.startswith("0.005 cannot cache function")


def test_help_and_version_work_without_a_home(python, copy):
    block(copy)
    for arguments in (["--help"], ["serve", "--help"]):
        status, out, err = python("-m", "slos_serve.cli", *arguments, HOME="/proc/none")
        assert (status, err) == (0, ""), arguments
        assert "slos-serve" in out


def test_a_verb_says_in_one_line_that_each_call_compiles(python, copy, tmp_path):
    block(copy)
    code = "import slos_serve.core.perf; from slos_serve import cli; raise SystemExit(cli._tell_compiling('try', 0))"
    status, out, err = python("-c", code, HOME="/proc/none")
    assert (status, out) == (0, "")
    assert len(err.splitlines()) == 1
    assert "each call compiles: cannot cache function" in err


def test_a_full_disk_costs_the_compiled_loop_and_nothing_else(python):
    fill = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))"
    status, out, err = python("-c", fill + LOOP)
    assert (status, err) == (0, "")
    assert out.startswith("0.005 ")
    assert "File too large" in out


def test_a_damaged_cache_is_found_by_doctor_and_replaced(python, copy):
    folder = copy / "slos_serve/core/__pycache__"
    assert python("-c", LOOP)[1] == "0.005 \n"
    index = next(folder.glob("perf.line_seconds-*.nbi"))
    code = next(folder.glob("perf.line_seconds-*.nbc"))
    index.write_bytes(b"not a pickle")
    assert "1 compiled loops" in findings(python("-c", DOCTOR)[1])["numba"]["detail"]
    for path, damage in ((index, b""), (index, bytes(300)), (code, code.read_bytes()[:40])):
        path.write_bytes(damage)
        status, out, err = python("-c", LOOP)
        assert (status, err) == (0, "")
        assert out.startswith("0.005 ")
        assert python("-c", LOOP)[1] == "0.005 \n"  # what was written again is whole


def test_processes_that_compile_at_once_all_get_their_answer(python):
    processes = [python.start("-c", LOOP) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "0.005 \n", "")


def test_doctor_says_that_each_start_compiles_and_where_the_cache_went(python, copy, tmp_path):
    block(copy)
    _, out, _ = python("-c", DOCTOR, HOME="/proc/none", TMPDIR=str(tmp_path))
    found = findings(out)
    assert found["numba"]["status"] == found["cache"]["status"] == "warn"
    assert "NUMBA_CACHE_DIR" in found["numba"]["advice"]
    assert f"using {tmp_path}/slos-serve-" in found["cache"]["detail"]
    assert "XDG_CACHE_HOME" in found["cache"]["advice"]


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can become somebody unknown")
class TestRandomUser:
    """A user without a name or a home, as OpenShift makes them; it may read everything and write nothing."""

    PREFIX = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups",
              "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")  # fmt: skip

    @pytest.fixture
    def as_nobody(self, python, tmp_path):
        own = tmp_path / "tmp"
        own.mkdir()
        os.chown(own, 12345, 12345)
        return lambda *arguments, **environ: python(*arguments, prefix=self.PREFIX, TMPDIR=str(own), **environ)

    def test_the_loops_run(self, as_nobody):
        status, out, err = as_nobody("-c", LOOP, HOME="/nonexistent")
        assert (status, err) == (0, "")
        assert out.startswith("0.005 cannot cache function")

    def test_the_cache_is_a_private_folder_below_the_temporary_one(self, as_nobody, tmp_path):
        code = "from slos_serve.cache import cache_folder, why_not_usual as why; print(cache_folder('profiles'), why())"
        for environ in ({}, {"HOME": "/"}, {"HOME": "/nonexistent"}):
            status, out, err = as_nobody("-c", code, **environ)
            assert (status, err) == (0, "")
            folder, reason = out.split(maxsplit=1)
            assert folder == str(tmp_path / "tmp/slos-serve-12345/cache/profiles")
            assert reason
        assert (tmp_path / "tmp/slos-serve-12345").stat().st_mode & 0o777 == 0o700

    def test_help_works_without_any_environment(self, as_nobody):
        status, out, err = as_nobody("-m", "slos_serve.cli", "--help")
        assert (status, err) == (0, "")
        assert "doctor" in out
