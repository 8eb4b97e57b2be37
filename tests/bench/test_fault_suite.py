"""The fault suite itself: strikes, restarts and accounts are right, on a server that costs nothing."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from slos_serve.bench.engines import ServerProcess, ServerProcesses, free_port
from slos_serve.bench.scaled import Scaled
from slos_serve.records.profile import Profile
from slos_serve.sim.hardware import load_hardware

pytest.importorskip("uvicorn")
FAKE = Path(__file__).parent / "fake_server.py"


@pytest.fixture
def faults(monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("faults")


@pytest.fixture
def bed(faults, tmp_path, monkeypatch):
    def start(self, name, model, flags, *, port):
        log = tmp_path / "server.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, FAKE, str(port)], stdout=file, stderr=file, start_new_session=True
            )
        self.engines.append(ServerProcess(name=name, url=f"http://127.0.0.1:{port}", log=log, process=process))
        return self.engines[-1]

    monkeypatch.setattr(ServerProcesses, "start", start)
    options = argparse.Namespace(model="m", flags=[], phase_s=1.0, most_rps=10.0, seed=1)
    with ServerProcesses(tmp_path) as fleet:
        yield faults.Bed(fleet, options, free_port())


@pytest.fixture
def scaled():
    hardware = load_hardware("h100-8b-derived")
    return Scaled(profile=Profile(perf_model=hardware.perf_model, max_num_batched_tokens=512, document={}))


def test_without_a_fault_every_request_completes(faults, bed, scaled):
    row = faults.run_fault("none", bed, scaled, bed.options)
    assert row["offered"] == row["met"] + row["missed"] > 5
    assert (row["lost"], row["doubled"], row["left_over"], row["recovered_s"]) == (0, 0, 0, 0.0)
    assert sum(one["offered"] for one in row["phases"].values()) == row["offered"]


@pytest.mark.parametrize(
    "name", ["engine killed", "all killed", "SIGTERM, normal", "SIGTERM, overflow", "SIGINT, overflow"]
)
def test_a_server_that_ends_is_started_again_and_what_it_broke_off_is_told(faults, bed, scaled, name):
    row = faults.run_fault(name, bed, scaled, bed.options)
    assert row["failed_clearly"] > 0
    assert (row["lost"], row["doubled"], row["left_over"]) == (0, 0, 0)
    assert row["recovered_s"] > 0
    assert faults.answers(bed)


@pytest.mark.parametrize("name", ["clients gone", "half-closed"])
def test_clients_that_misbehave_cost_the_others_nothing_and_leave_nothing(faults, bed, scaled, name):
    row = faults.run_fault(name, bed, scaled, bed.options)
    assert row["failed_clearly"] == row["lost"] == row["left_over"] == 0


def test_a_stall_is_struck_at_the_engine_and_ends(faults, bed, scaled):
    row = faults.run_fault("stall of 4 s", bed, scaled, bed.options)
    assert row["recovered_s"] >= 4
    assert row["failed_clearly"] == row["lost"] == 0
    assert "stall of 4 s" in faults.table([row])
    json.dumps(row)
