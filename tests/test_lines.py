"""Files of lines: whole lines, bounded, private, and never an exception."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.lines import NUM_OLDER, LineFile


def test_a_line_that_a_kill_cut_short_is_ended_before_the_next_run_begins(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    file = LineFile(path, max_bytes=1000)
    file.write(['{"c": 3}'])
    file.write(['{"d": 4}'])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}', '{"d": 4}']


def test_a_new_file_is_for_its_user_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        LineFile(tmp_path / "new" / "r", max_bytes=1000).write(["x"])
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "r").stat().st_mode & 0o777 == 0o600


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 300), max_size=60), st.integers(2000, 4000))
def test_the_parts_never_exceed_the_bound_and_lose_only_the_oldest_lines(tmp_path_factory, sizes, bound):
    folder = tmp_path_factory.mktemp("lines")
    file = LineFile(folder / "r", max_bytes=bound)
    file.header = ["header"]
    written = [f"{i} {'x' * size}" for i, size in enumerate(sizes)]
    for line in written:
        file.write([line])
    parts = [folder / "r", *(folder / f"r.{i}" for i in range(1, NUM_OLDER + 1))]
    found = [line for part in reversed(parts) if part.exists() for line in part.read_text().splitlines()]
    kept = [line for line in found if line != "header"]
    assert kept == written[len(written) - len(kept) :]
    assert sum(part.stat().st_size for part in parts if part.exists()) <= bound + len(parts) * len("header\n")
    assert file.problem == ""


@pytest.mark.parametrize("name", ["file/r", "folder"])
def test_what_cannot_be_written_is_a_problem_and_no_exception(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    file = LineFile(tmp_path / name, max_bytes=1000)
    file.write(["x"])
    file.write(["y"])
    assert file.problem


def test_a_disk_that_fills_up_costs_the_line_at_the_end_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "r"
    code = (
        "import resource, signal, sys; from pathlib import Path; from slos_serve.lines import LineFile;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); file = LineFile(Path(sys.argv[1]), max_bytes=10**6);"
        "[file.write(['{\"step\": %d}' % i]) for i in range(50)]; print(file.problem)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert path.stat().st_size == 100
    LineFile(path, max_bytes=10**6).write(['{"step": 99}'])
    steps = []
    for line in path.read_text().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            steps.append(None)
    assert steps == [*range(steps.index(None)), None, 99]


def test_a_device_is_written_to_and_never_moved(tmp_path):
    link = tmp_path / "r"
    link.symlink_to(os.devnull)
    file = LineFile(link, max_bytes=8)
    for _ in range(5):
        file.write(["some line"])
    assert file.problem == ""
    assert list(tmp_path.iterdir()) == [link]
