"""`slos-serve plan` finds the fewest replicas that keep the promises, and what they have to spare."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.worlds import hardware, sim, workload

from slos_serve.cli import main
from slos_serve.sim.capacity.sizing import Deployment, faster, fewest, highest_factor, likely, with_burst
from slos_serve.sim.systems import find_system


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_fewest_that_pass_are_found_from_any_start(needed, start):
    asked = []
    assert fewest(lambda n: asked.append(n) or n >= needed, start=start, most=64) == needed
    assert len(asked) == len(set(asked))


def test_none_is_found_where_the_most_fails():
    assert fewest(lambda n: False, start=3, most=10) is None


@given(st.floats(1.0, 7.9))
def test_the_headroom_is_within_five_percent(limit):
    found = highest_factor(lambda factor: factor <= limit)
    assert found <= limit <= found * 1.0501


def loads(count=50, gap_s=0.1):
    return workload(*(sim(f"r{i}", 100, 10, at_s=i * gap_s) for i in range(count)), duration_s=count * gap_s)


def test_a_faster_workload_is_the_same_requests_in_less_time():
    load = faster(loads(), 2.0)
    assert load.rate_rps == pytest.approx(20.0)
    assert [one.request.request_id for one in load.arrivals] == [f"r{i}" for i in range(50)]


def test_a_burst_speeds_up_the_middle_fifth_and_nothing_else():
    load = with_burst(loads(101), 4.0)
    gaps = [b.request.arrival_s - a.request.arrival_s for a, b in zip(load.arrivals, load.arrivals[1:], strict=False)]
    assert gaps[:40] == pytest.approx([0.1] * 40)
    assert gaps[40:60] == pytest.approx([0.025] * 20)
    assert gaps[60:] == pytest.approx([0.1] * 40)


def test_more_replicas_attain_more_and_runs_are_remembered():
    runs = []
    deployment = Deployment(
        system=find_system("vllm"),
        settings={"token_budget": 2048},
        hardware=hardware(),
        max_model_len=2000,
        on_run=lambda: runs.append(1),
    )
    load = [workload(*(sim(f"r{i}", 300, 20, at_s=0.05 * i, ttft_s=0.6) for i in range(60)))]
    few, many = deployment.attainment(load, 1), deployment.attainment(load, 8)
    assert few < many
    assert deployment.attainment(load, 1) == few
    assert len(runs) == 2


def plan(capsys, *arguments):
    status = main(["plan", *arguments])
    return status, capsys.readouterr()


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{0.2 * i:.1f},{200 + 7 * (i % 40)},{20 + i % 20},{'coding' if i % 3 else 'chat'}" for i in range(90)]
    path.write_text("\n".join(["arrived_at_s,prompt_tokens,output_tokens,slo_class", *rows, "99,9000,9,chat"]) + "\n")
    return str(path)


def test_the_answer_names_replicas_headroom_and_burst(capsys, trace):
    status, captured = plan(capsys, "--trace", trace, "--rate", "30", "--system", "vllm", "--burst", "3", "--json")
    assert status == 0
    document = json.loads(captured.out)
    entry = document["hardware"]["a100-80g-7b-measured"]
    assert document["best"] == "a100-80g-7b-measured"
    assert entry["workload"]["num_dropped"] == 1
    assert entry["workload"]["by_class"] == {"chat": 30, "coding": 60}
    assert entry["workload"]["rate_rps"] == pytest.approx(30)
    assert entry["replicas"] == entry["gpus"] >= 2
    assert entry["attainment"] == min(entry["attainment_by_class"].values()) >= 0.9
    assert entry["attainment_one_fewer"] < 0.9
    assert entry["headroom_factor"] >= 1
    assert entry["burst"]["replicas"] >= entry["replicas"]
    assert entry["rate_per_gpu_rps"] == pytest.approx(30 / entry["gpus"])
    again = plan(capsys, "--trace", trace, "--rate", "30", "--system", "vllm", "--burst", "3", "--json")[1]
    assert again.out == captured.out


def test_the_shipped_trace_is_told_by_its_name(capsys):
    status, captured = plan(capsys, "--system", "vllm", "--rate", "0.5", "--max-requests", "20")
    assert status == 0
    assert "a100-80g-7b-measured: mixed_small at " in captured.out


def test_one_replica_is_singular_and_has_none_fewer(capsys, trace):
    status, captured = plan(capsys, "--trace", trace, "--rate", "1", "--system", "vllm")
    assert status == 0
    assert "  1 replica: 100.0% of the worst class\n" in captured.out


def test_the_attainment_with_one_replica_fewer_is_told(capsys, trace):
    status, captured = plan(capsys, "--trace", trace, "--rate", "30", "--system", "vllm")
    assert status == 0
    assert "(with one fewer " in captured.out


def test_promises_that_no_number_of_replicas_keeps_are_told(capsys, trace, tmp_path):
    config = tmp_path / "slo.yaml"
    config.write_text("classes:\n  chat: {tpot_ms: 0.1}\n  coding: {tpot_ms: 0.1}\n")
    status, captured = plan(
        capsys, "--trace", trace, "--slo-config", str(config), "--system", "vllm", "--max-replicas", "2"
    )
    assert status == 1
    assert "cannot be served: 2 replicas attain" in captured.out


def test_several_kinds_of_hardware_are_compared_by_gpus(capsys, trace):
    names = "a100-80g-7b-measured,h100-70b-tp8-measured"
    status, captured = plan(capsys, "--trace", trace, "--rate", "2", "--system", "vllm", "--hardware", names)
    assert status == 0
    assert "fewest GPUs: a100-80g-7b-measured" in captured.out
    assert "8 GPUs" in captured.out


def test_the_cheapest_hardware_comes_first_by_price_where_all_have_one(capsys, trace):
    names = "a100-80g-7b-measured,h100-70b-tp8-measured"
    run = ["--trace", trace, "--rate", "2", "--system", "vllm", "--hardware", names]
    prices = ["--price", "a100-80g-7b-measured=90", "--price", "h100-70b-tp8-measured=2"]
    status, captured = plan(capsys, *run, *prices, "--json")
    document = json.loads(captured.out)
    assert status == 0
    assert list(document["hardware"]) == ["h100-70b-tp8-measured", "a100-80g-7b-measured"]
    assert document["hardware"]["h100-70b-tp8-measured"]["cost_per_hour"] == 16.0
    assert document["best"] == "h100-70b-tp8-measured"


def test_a_plan_says_what_so_few_requests_leave_open_and_draws_what_was_tried(capsys, trace, tmp_path):
    run = ["--trace", trace, "--rate", "30", "--system", "vllm", "--out", str(tmp_path / "plan")]
    status, captured = plan(capsys, *run, "--json")
    assert status == 0
    (entry,) = json.loads(captured.out)["hardware"].values()
    low, high = entry["attainment_interval"]
    assert low < entry["attainment"] <= high
    tried = {row["replicas"]: row["attainment"] for row in entry["curve"]}
    assert tried[entry["replicas"]] == entry["attainment"]
    assert tried[entry["replicas"] - 1] == entry["attainment_one_fewer"]
    assert json.loads((tmp_path / "plan" / "plan.json").read_text()) == json.loads(captured.out)
    page = (tmp_path / "plan" / "plan.html").read_text()
    assert "<svg" in page
    assert "Attainment by replicas" in page


def test_where_no_hardware_serves_it_the_closest_and_its_worst_class_are_named(capsys, trace, tmp_path):
    config = tmp_path / "slo.yaml"
    config.write_text("classes:\n  chat: {tpot_ms: 2000}\n  coding: {tpot_ms: 0.1}\n")
    run = ["--trace", trace, "--slo-config", str(config), "--system", "vllm", "--max-replicas", "2"]
    status, captured = plan(capsys, *run, "--json")
    document = json.loads(captured.out)
    assert (status, document["best"], document["closest"]) == (1, None, "a100-80g-7b-measured")
    (entry,) = document["hardware"].values()
    assert entry["lacking"] == "coding"
    assert "of coding (0 of 60)" in entry["reason"]


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_interval_holds_its_share_and_shrinks_with_more_requests(met, offered):
    met = min(met, offered)
    low, high = likely(met, offered)
    assert 0.0 <= low <= met / offered + 1e-12
    assert met / offered - 1e-12 <= high <= 1.0
    lower, higher = likely(4 * met, 4 * offered)
    assert higher - lower < high - low


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--price", "a100=1"], "--price"),
        (["--price", "a100-80g-7b-measured=-1"], "--price"),
        (["--target-attainment", "1.5"], "--target-attainment"),
        (["--burst", "0.5"], "burst"),
        (["--hardware", "abacus"], "abacus"),
        (["--system", "fifo"], "fifo"),
        (["--system", "slos-srve-ar"], "did you mean slos-serve-ar? expected one of"),
        (["--scenario", "chatbt"], "did you mean chatbot? expected one of"),
        (["--scenario", "chatbot", "--data", "/absent"], "data"),
        (["--trace", "absent.csv"], "absent.csv"),
        (["--rate", "-1"], "rate"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, arguments, named):
    status, captured = plan(capsys, *arguments)
    assert status == 2
    assert named in captured.err
    assert captured.err.count("\n") == 1
