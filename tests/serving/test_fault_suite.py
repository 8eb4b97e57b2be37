"""A part of `make faults` that takes a minute or two: a real server, struck under load, loses nobody."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_server_whose_clients_leave_and_whose_engine_is_killed_loses_nobody(tmp_path):
    pytest.importorskip("vllm")
    command = [sys.executable, "faults.py", "--only", "clients gone", "--only", "engine killed", "--phase-s", "4"]
    command += ["--most-rps", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    gone, killed = json.loads((tmp_path / "faults.json").read_text())["rows"]
    for row in (gone, killed):
        assert row["offered"] > 10
        assert row["lost"] == row["doubled"] == row["left_over"] == 0
        assert row["recovered_s"] is not None
    assert gone["failed_clearly"] == 0
    assert killed["failed_clearly"] > 0
