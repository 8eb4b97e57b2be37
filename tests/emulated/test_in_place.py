"""The benchmark in place: what it makes of a device's log and of the kernel's counts."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "in_place.py"


@pytest.fixture(scope="module")
def in_place():
    spec = importlib.util.spec_from_file_location("in_place", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def log(tmp_path):
    """Steps of 10 ms with 2 ms between them, eight requests each; the last line is still being written."""
    rows = [[0.012 * i, 0.012 * i, 0.012 * i + 0.010, 8, 8, 800] for i in range(100)]
    path = tmp_path / "batches"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "[1.2, 1.2")
    return path


def row_of(in_place, log, variant="vllm", cpu=0.05):
    batches = in_place.read_batches(log, 0.0, 0.6)
    cpus = ((1.0, 2.0), (1.0 + cpu, 2.1))
    return in_place.row_of(variant, 8, batches=batches, times=(0.0, 0.6), cpus=cpus, status={})


def test_a_window_counts_its_batches_their_gaps_and_the_idle_time_between_them(in_place, log):
    row = row_of(in_place, log)
    assert (row.steps, row.running) == (50, 8)
    assert row.gap_p50_ms == pytest.approx(12)
    assert row.idle == pytest.approx(2 / 12)
    assert row.tokens_per_s == pytest.approx(8 / 0.012)
    assert (row.cpu_us, row.threads_us) == (pytest.approx(1000), pytest.approx(2000))


def test_a_window_in_which_the_engine_stood_still_is_an_error_and_no_row(in_place, log):
    with pytest.raises(SystemExit, match="0 batches in the window"):
        in_place.read_batches(log, 50.0, 60.0)


def test_the_cost_is_what_ours_takes_beyond_plain_vllm_at_the_same_number_running(in_place, log):
    rows = [
        row_of(in_place, log, variant, cpu) for variant, cpu in zip(in_place.VARIANTS, (0.05, 0.06, 0.08), strict=True)
    ]
    text = in_place.table(rows)
    assert "ours, no SLOs: +200 us of the engine's thread a step (x1.20)" in text
    assert "ours, SLOs: +600 us of the engine's thread a step (x1.60)" in text
    assert text.count("tokens/s x1.000") == 2


def test_the_kernels_count_of_a_first_thread_grows_with_what_it_does(in_place):
    own, _ = in_place.cpu_s(os.getpid())
    sum(range(2_000_000))
    assert in_place.cpu_s(os.getpid())[0] > own


def test_what_was_measured_before_an_interrupt_is_printed_and_in_the_file(in_place, log, monkeypatch, tmp_path, capsys):
    def interrupted(_args, _folder, _hardware, _scheduling):
        yield row_of(in_place, log)
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    monkeypatch.setattr(in_place, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["in_place.py", "--json", str(path)])
    assert in_place.main() == 130
    assert "vllm" in capsys.readouterr().out
    assert [row["variant"] for row in json.loads(path.read_text())["rows"]] == ["vllm"]


def test_a_variant_that_was_not_reached_is_compared_with_nothing(in_place, log):
    text = in_place.table([row_of(in_place, log)])
    assert text.count("nothing to compare") == 2
