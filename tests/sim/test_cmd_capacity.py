"""`slos-serve capacity` writes the documented answer, goes on where it stopped, and refuses bad input in a line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from slos_serve.cli import main
from slos_serve.commands.capacity import read_replicas, read_systems
from slos_serve.core.slo.summary import GradedRequest
from slos_serve.core.types import Slo
from slos_serve.sim.capacity.detail import burst_runs, first_share, graded, summary
from slos_serve.sim.capacity.report import scaling, tabs
from slos_serve.sim.capacity.runs import Cell
from slos_serve.sim.capacity.search import Answer, Curve, RunOutcome, index_of, rate_at
from slos_serve.sim.capacity.study import QUICK, Study
from slos_serve.sim.capacity.table import as_text, hardware_entry, is_baseline, number, scenario_entry
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.systems import SYSTEMS
from slos_serve.traces.synthetic import SYNTHETIC, write_stand_ins
from slos_serve.traces.trace import read_trace, write_trace

KEYS = {
    *("capacity_rps", "capacity_95_rps", "capacity_99_rps", "ratio", "ratio_interval", "ratio_spec"),
    *("ratio_spec_interval", "settings", "spread", "best_baseline", "best_baseline_spec"),
    *("clairvoyant_rps", "share_of_clairvoyant"),
}


def capacity(capsys, *arguments):
    status = main(["capacity", *arguments])
    return status, capsys.readouterr()


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Hardware on which no token is ever in time."""
    document = load_hardware("h100-8b-derived").to_json()
    document |= {"name": "slow", "perf_model": {"lines": [{"fixed_s": 2.0, "per_token_s": 1e-9}]}}
    path = tmp_path_factory.mktemp("hardware") / "slow.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_table_is_found_written_and_found_again_without_a_run(capsys, data, tmp_path):
    arguments = ["--data", str(data), "--scenarios", "summarization", "--systems", "slos-serve-ar,vllm,sarathi-serve"]
    arguments += ["--hardware", "h100-8b-derived", "--quick", "--requests", "40", "--json"]
    arguments += ["--out", str(tmp_path / "out")]
    status, first = capacity(capsys, *arguments, "--jobs", "2")
    assert status == 0
    document = json.loads(first.out)
    entry = document["hardware"]["h100-8b-derived"]["scenarios"]["summarization"]
    assert set(entry) >= KEYS
    for name, rps in entry["capacity_rps"].items():
        low, high = entry["spread"][name]
        assert low <= rps <= high
        assert (entry["capacity_95_rps"][name] or 0) <= rps
    assert entry["best_baseline"] in {"vllm", "sarathi-serve"}
    assert entry["ratio"] == entry["capacity_rps"]["slos-serve-ar"] / entry["capacity_rps"][entry["best_baseline"]]
    assert document["hardware"]["h100-8b-derived"]["geomean"]["ratio"] == pytest.approx(entry["ratio"])
    assert list(entry["at_capacity"]) == ["slos-serve-ar", entry["best_baseline"]]
    closer = entry["at_capacity"]["slos-serve-ar"]
    assert entry["num_dropped"] == 0
    assert 0 <= closer["kept"] <= closer["promised"] <= closer["num_requests"]
    assert all(0 <= share <= 1 for share in closer["attainment_by_prompt"])
    folder = tmp_path / "out"
    assert json.loads((folder / "report.json").read_text()) == document
    assert "| summarization |" in (folder / "report.md").read_text()
    for name in ("capacity", "attainment", "feasible"):
        assert (folder / f"{name}-h100-8b-derived.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "<script" not in page
    assert not [part for part in page.split('"') if part.endswith((".png", ".css", ".js"))]
    lines = (folder / "runs.jsonl").read_text().splitlines()
    status, again = capacity(capsys, *arguments, "--jobs", "1")
    assert (status, again.out) == (0, first.out)
    assert (folder / "runs.jsonl").read_text().splitlines() == lines


def test_a_baseline_that_cannot_hold_the_lowest_rate_leaves_no_ratio(capsys, data, tmp_path, slow):
    status, captured = capacity(
        capsys, "--data", str(data), "--scenarios", "chatbot", "--systems", "sarathi-serve", "--hardware", slow,
        "--quick", "--windows", "1", "--requests", "4", "--jobs", "1", "--json", "--out", str(tmp_path),
    )  # fmt: skip
    assert status == 0
    entry = json.loads(captured.out)["hardware"][slow]["scenarios"]["chatbot"]
    assert entry["capacity_rps"] == {"sarathi-serve": 0.0}
    assert (entry["best_baseline"], entry["ratio"]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scenarios", "poetry"], "poetry"),
        (["--systems", "fifo"], "fifo"),
        (["--hardware", "abacus"], "abacus"),
        (["--windows", "0"], "windows"),
        (["--jobs", "0"], "jobs"),
        (["--requests", "0"], "requests"),
        (["--replicas", "0"], "replicas"),
        (["--replicas", "one"], "replicas"),
        (["--router", "slo,roulette"], "roulette"),
        (["--reuse", "vllm,fifo"], "fifo"),
        (["--slo-scale", "0"], "--slo-scale: '0': expected a number, more than 0, at most 100"),
        (["--acceptance", "1"], "acceptance"),
        (["--data", "/absent"], "data"),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys, data, tmp_path, arguments, named):
    status, captured = capacity(capsys, "--data", str(data), "--out", str(tmp_path / "out"), *arguments)
    assert status == 2
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("slos-serve capacity: ")
    assert "simulate" not in captured.err
    assert "capacity: capacity" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_traces_is_told_before_anything_runs(capsys, tmp_path):
    status, captured = capacity(capsys, "--data", str(tmp_path), "--scenarios", "chatbot", "--out", str(tmp_path / "o"))
    assert status == 2
    assert "azure2023_conv.csv.gz" in captured.err


@pytest.mark.parametrize("text", ["arrived_at_s,prompt_tokens,output_tokens\n", "arrived_at_s,prompt_tokens\n1,2\n"])
def test_an_empty_or_incomplete_trace_is_told_with_its_file(capsys, tmp_path, text):
    import gzip

    (tmp_path / "traces").mkdir()
    (tmp_path / "traces/azure2023_conv.csv.gz").write_bytes(gzip.compress(text.encode()))
    status, captured = capacity(capsys, "--data", str(tmp_path), "--scenarios", "chatbot", "--out", str(tmp_path / "o"))
    assert status == 2
    assert "azure2023_conv.csv.gz" in captured.err


def test_groups_of_systems_and_numbers_of_replicas_are_read():
    assert read_systems("slos-serve,vllm,vllm") == ("slos-serve", "vllm")
    main_systems = read_systems("main")
    assert {"slos-serve", "slos-serve-ar", "vllm", "sarathi-serve", "edf"} <= set(main_systems)
    assert set(read_systems("main,ablations")) == set(SYSTEMS)
    assert read_replicas("1,4,4") == (1, 4)


def test_settings_are_tried_the_default_first_and_fewer_in_a_quick_look():
    values = {"scenarios": ("chatbot",), "systems": ("vllm",), "hardware": ("measured",), "data": "x", "effort": QUICK}
    grid = Study(**values).grid("vllm")
    assert json.loads(grid[0]) == SYSTEMS["vllm"].default
    assert len(grid) == len(SYSTEMS["vllm"].grid)
    assert len(Study(**values, is_quick=True).grid("vllm-spec")) == 3


def test_routers_are_compared_where_there_are_several_replicas_beside_one_alone():
    values = {"scenarios": ("chatbot",), "systems": ("vllm",), "hardware": ("measured",), "data": "x", "effort": QUICK}
    study = Study(**values, replicas=(1, 4), routers=("slo", "pooled"))
    assert [site.name for site in study.sites] == ["measured", "measured x4 slo", "measured x4 pooled"]
    rates = (1.0, 1.5, 1.8)
    found = {
        site.name: {"scenarios": {"chatbot": {"capacity_rps": {"vllm": rate}}}}
        for site, rate in zip(study.sites, rates, strict=True)
    }
    assert scaling(found, study, "measured")["chatbot"] == {
        "vllm, slo": {1: 1.0, 4: 1.5},
        "vllm, pooled": {1: 1.0, 4: 1.8},
    }
    assert [site.name for site in Study(**values, replicas=(4,), routers=("slo",)).sites] == ["measured"]


def grade(prompt_tokens, outcome, **changes):
    return GradedRequest(slo_class="chat", outcome=outcome, num_prompt_tokens=prompt_tokens, **changes)


def test_a_closer_look_tells_which_prompts_miss_and_how_late_the_declined_come():
    rows = [(grade(100 * i, "met" if i < 6 else "declined", promised=i < 6, ttft_s=0.1 * i), Slo(ttft_s=0.1))
            for i in range(1, 9)]  # fmt: skip
    found = summary(rows)
    assert found["attainment_by_prompt"] == [1.0, 1.0, 0.5, 0.0]
    assert (found["promised"], found["kept"], found["declined"]) == (5, 5, 3)
    assert found["declined_ttft_p99"] == pytest.approx(8.0, abs=0.05)
    assert summary([(grade(5, "missed"), None)])["declined_ttft_p99"] is None


def test_a_burst_is_shown_over_one_time_for_systems_of_one_gpu_and_of_several(data):
    values = {"systems": ("slos-serve-ar", "distserve"), "hardware": ("published",), "data": str(data)}
    study = Study(scenarios=("coding",), effort=QUICK, **values)
    settings = {name: dict(SYSTEMS[name].default) for name in study.systems}
    entry = {"capacity_rps": dict.fromkeys(study.systems, 0.5), "settings": settings}
    entry |= {"best_baseline": "distserve", "best_baseline_spec": "distserve"}
    runs = burst_runs(entry, study, study.sites[0], "coding")
    assert list(runs) == ["slos-serve-ar", "distserve (2 times the GPUs and rate, time stretched)"]
    ours, theirs = ([row["arrival_s"] for row in rows] for rows in runs.values())
    assert theirs == pytest.approx(ours)


def curve(capacity_rps, *, windows=4):
    """Attain 90 % at a rate, more below and less above, alike in every window."""
    built = Curve()
    middle = index_of(capacity_rps)
    for index in range(middle - 12, middle + 6):
        share = min(1.0, 0.9 - 0.5 * math.log(rate_at(index) / rate_at(middle)))
        built.add(index, [RunOutcome(by_class={"chat": (round(1e4 * share), 10_000, 0, 0)})] * windows)
    return built


def answers(**capacities):
    return {name.replace("_", "-"): Answer(settings="{}", curve=curve(rps)) for name, rps in capacities.items()}


def test_ratios_are_against_the_best_without_drafts_and_the_best_of_all():
    found = answers(slos_serve=6.0, slos_serve_ar=4.0, vllm=2.0, sarathi_serve=2.5, vllm_spec=3.0)
    entry = scenario_entry(found, hardware="toy")
    assert (entry["best_baseline"], entry["best_baseline_spec"]) == ("sarathi-serve", "vllm-spec")
    assert entry["ratio"] == pytest.approx(2.4, rel=0.03)
    assert entry["ratio_spec"] == pytest.approx(2.0, rel=0.03)
    assert entry["ratio_ar"] == pytest.approx(1.6, rel=0.03)
    assert entry["ratio_interval"] == pytest.approx([entry["ratio"]] * 2)
    assert entry["capacity_99_rps"]["vllm"] < entry["capacity_95_rps"]["vllm"] < entry["capacity_rps"]["vllm"]
    assert set(entry) >= KEYS


def test_the_mean_over_scenarios_is_geometric_and_has_an_interval():
    slow_, fast = answers(slos_serve=2.0, vllm=1.0), answers(slos_serve=8.0, vllm=1.0)
    entry = hardware_entry({"chatbot": slow_, "coding": fast}, {"chatbot": "toy", "coding": "toy"})
    assert entry["geomean"]["ratio"] == pytest.approx(4.0, rel=0.03)
    assert entry["geomean"]["ratio_interval"] == pytest.approx([entry["geomean"]["ratio"]] * 2)
    assert entry["geomean"]["num_scenarios"] == 2
    facts = {"known_lengths": True, "is_quick": True, "num_windows": 3, "slo_scale": 0.5, "data": SYNTHETIC}
    text = as_text({"hardware": {"toy": entry}, "errors": {"toy/coding/edf": "ValueError: x"}, "study": facts})
    assert "every system knows the true output lengths; every promise times 0.5; a quick look" in text
    assert SYNTHETIC in text
    assert "| chatbot |" in text
    higher = number(entry["scenarios"]["chatbot"]["capacity_99_rps"]["vllm"])
    assert any(line.startswith("| chatbot at 99 % |") and higher in line for line in text.splitlines())
    assert "toy/coding/edf: no answer, ValueError: x" in text


def test_a_capacity_below_every_rate_that_was_run_is_unknown_and_not_zero():
    found = answers(vllm=2.0)
    entry = scenario_entry(found, hardware="toy")
    assert entry["capacity_99_rps"]["vllm"] is not None
    short = Curve()
    short.add(5, [RunOutcome(by_class={"chat": (50, 100, 0, 0)})])
    assert scenario_entry({"vllm": Answer(settings="{}", curve=short)}, hardware="toy")["capacity_rps"]["vllm"] is None


def test_the_share_of_the_bound_is_taken_on_the_windows_of_the_bound():
    rates = range(index_of(2.0), index_of(8.0))

    def curve(capacities):
        found = Curve()
        for index in rates:
            met = [95 if rate_at(index) < capacity else 85 for capacity in capacities]
            found.add(index, [RunOutcome(by_class={"chat": (count, 100, 0, 0)}) for count in met])
        return Answer(settings="{}", curve=found)

    entry = scenario_entry(
        {"slos-serve": curve([4.0, 4.0, 3.0, 3.0]), "clairvoyant": curve([5.0, 5.0])}, hardware="toy"
    )
    assert entry["clairvoyant_rps"] == pytest.approx(5.0, rel=0.05)
    assert entry["share_of_clairvoyant"] == pytest.approx(4.0 / 5.0, rel=0.02)


def test_who_was_met_was_not_later_than_promised_even_where_many_come_at_once(tmp_path):
    write_stand_ins(tmp_path)
    path = tmp_path / "traces/azure2023_code.csv.gz"
    trace = read_trace(path)
    write_trace(replace(trace, arrived_at_s=np.floor(5 * trace.arrived_at_s) / 5), path)
    system = {"system": "slos-serve", "hardware": "a100-80g-7b-measured"}
    cell = Cell(scenario="coding", data=str(tmp_path), part="tune", window=0, rate_rps=2.0, max_requests=80, **system)
    rows = graded(cell)
    assert len({grade.arrival_s for grade, _ in rows}) < len(rows) == 80
    assert all(first_share(grade, slo) <= 1 for grade, slo in rows if grade.outcome == "met")


def test_bounds_and_our_own_systems_are_no_opponents():
    assert is_baseline("vllm")
    assert not is_baseline("clairvoyant")
    assert not is_baseline("slos-serve-ar")


def test_tabs_show_one_panel_at_a_time_without_script():
    text = tabs("group", [("one", "<p>1</p>"), ("two", "<p>2</p>")])
    assert text.count('type="radio"') == 2
    assert text.count("checked>") == 1
    assert "<script" not in text
    assert "#group-1:checked ~ .panels > div:nth-child(2)" in text
