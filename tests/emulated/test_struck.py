"""A real server is struck under load: nobody's request is lost, and it serves again. All faults: `make faults`."""

import argparse
import importlib
from pathlib import Path

import pytest

from slos_serve.bench.engines import Fleet, free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def faults(monkeypatch):
    pytest.importorskip("vllm")
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("faults")


def test_a_server_whose_engine_is_killed_under_load_loses_no_request_and_serves_again(faults, tmp_path):
    options = argparse.Namespace(device="emulated", phase_s=3.0, most_rps=6.0, seed=1, out=tmp_path)
    scaled = faults.prepare(options)
    with Fleet(tmp_path) as fleet:
        bed = faults.Bed(fleet, options, free_port())
        row = faults.run_fault("engine killed", bed, scaled, options)
    assert (row["lost"], row["doubled"], row["left_over"]) == (0, 0, 0)
    assert row["failed_clearly"] > 0
    assert row["phases"]["normal"]["met"] > 0
    assert row["recovered_s"] is not None
