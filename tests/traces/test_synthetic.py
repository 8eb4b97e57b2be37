"""Scenarios without the public traces."""

import json

import numpy as np
import pytest

from slos_serve.cli import main
from slos_serve.errors import ConfigError
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.workloads.scenarios import SCENARIOS, Offer, hardware_of
from slos_serve.traces.synthetic import SYNTHETIC, data_folder, write_stand_ins
from slos_serve.traces.trace import read_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    write_stand_ins(folder)
    return folder


def test_the_same_bytes_come_out_each_time(folder, tmp_path):
    write_stand_ins(tmp_path)
    for file in folder.rglob("*.gz"):
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_requests_come_one_at_a_time(folder):
    for name in ("azure2023_code", "azure2023_conv"):
        gaps = np.diff(read_trace(folder / f"traces/{name}.csv.gz").arrived_at_s)
        assert np.quantile(gaps, 0.01) > 1e-4


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("constants", ["published", "measured"])
def test_every_window_of_every_scenario_is_offered(folder, name, constants):
    hardware = load_hardware(hardware_of(name, constants))
    for part, num_seeds in (("report", 10), ("tune", 3)):
        for seed in range(num_seeds):
            offer = Offer(data=folder, hardware=hardware, rate_rps=2.0, part=part, seed=seed)
            workload = SCENARIOS[name].offer(offer)
            assert workload.num_requests >= 60, (part, seed)


def test_a_scenario_runs_without_data_and_says_what_it_ran_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data_folder.cache_clear()
    arguments = ["simulate", "--scenario", "tool-calling", "--system", "vllm", "--rate", "2"]
    assert main([*arguments, "--hardware", "h100-8b-derived", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["data"] == SYNTHETIC
    assert SYNTHETIC in captured.err


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="data"):
        data_folder("/absent", command="simulate")
