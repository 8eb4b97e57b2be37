"""`bench`, `simulate` and `plan` offer a trace by the same words, and say what they offer."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from slos_serve.cli import main
from slos_serve.traces.offered import add_options, check_options, offered_trace, tell

ROWS = "arrived_at_s,prompt_tokens,output_tokens\n" + "".join(f"{100 + i},100,10\n" for i in range(10))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "late.csv"
    path.write_text(ROWS)
    return path


def offered(*words, longest=None):
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args([str(word) for word in words])
    args.seed = 0
    check_options("bench", args)
    return offered_trace(args, max_total_tokens=longest)


def test_the_first_requests_of_a_file_that_begins_late_come_at_their_own_rate(file):
    trace = offered("--trace", file, "--num-requests", 4, "--rate", 2)
    assert trace.arrived_at_s.tolist() == pytest.approx([0, 0.5, 1, 1.5])
    assert trace.rate_rps == pytest.approx(2)


@pytest.mark.parametrize("words", [("--slo-class", "support"), ("--mix", "support=1")])
def test_a_class_that_no_request_takes_is_told(tmp_path, file, words):
    named = tmp_path / "named.csv"
    named.write_text(ROWS.replace("tokens\n", "tokens,slo_class\n").replace(",10\n", ",10,coding\n"))
    trace = offered("--trace", named, *words)
    assert set(trace.slo_class) == {"coding"}
    assert trace.origin.notes == (f"{' '.join(words)} changes nothing: every request names its class",)
    assert not offered("--trace", named).origin.notes
    taken = offered("--trace", file, *words)
    assert (set(taken.slo_class), taken.origin.notes) == ({"support"}, ())


def test_a_window_counts_from_the_first_request_and_names_what_is_near(file):
    assert offered("--trace", f"{file}@2:3").arrived_at_s.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"the last one comes at 9 s"):
        offered("--trace", f"{file}@20:3")


def test_a_window_reads_the_file_no_further_than_its_end(tmp_path):
    path = tmp_path / "cut.csv"
    path.write_text(ROWS + "200,100,10\nthis line is damaged\n")
    assert len(offered("--trace", f"{path}@3:50")) == 7
    with pytest.raises(ValueError, match="1 values: expected 3"):
        offered("--trace", path)


def test_a_window_of_coarse_ticks_is_that_of_the_whole_file(tmp_path):
    rows = [
        {"timestamp": 3000 * (i // 4), "input_length": 600, "output_length": 5, "hash_ids": [i, i + 99]}
        for i in range(40)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = offered("--trace", path)
    times = whole.arrived_at_s
    for start, length in ((0, 3), (4, 7.5), (1.5, 3), (8.25, 100)):
        cut = offered("--trace", f"{path}@{start}:{length}")
        inside = times[(times >= start) & (times < start + length)] - start
        assert cut.arrived_at_s.tolist() == pytest.approx(inside.tolist())


def test_request_rate_and_burstiness_mean_what_they_mean_to_vllm_bench(file):
    poisson = offered("--trace", file, "--request-rate", 5, "--burstiness", 1, "--num-prompts", 10)
    assert poisson.rate_rps == pytest.approx(5)
    many = "arrived_at_s,prompt_tokens,output_tokens\n" + "0,1,1\n" * 20_000
    file.write_text(many)
    bursty = offered("--trace", file, "--request-rate", 5, "--burstiness", 0.25)
    assert bursty.gap_cv == pytest.approx(2.0, rel=0.1)  # gaps of a Gamma distribution of shape 0.25
    assert bursty.rate_rps == pytest.approx(5)


def test_lengths_alone_need_arrivals(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n5,1,6,5\n6,2,8,3\n")
    with pytest.raises(ValueError, match="lengths without arrival times: say --arrivals"):
        offered("--trace", path)
    assert offered("--trace", path, "--arrivals", "poisson", "--rate", 3).prompt_tokens.tolist() == [5, 6]


def test_classes_are_drawn_from_the_mix_or_are_the_named_one(file):
    assert set(offered("--trace", file, "--slo-class", "coding").slo_class) == {"coding"}
    drawn = offered("--trace", file, "--mix", "chat=1,coding=1").slo_class
    assert set(drawn) == {"chat", "coding"}
    assert drawn.tolist() == offered("--trace", file, "--mix", "chat=1,coding=1").slo_class.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "0"], "--rate = 0.0: expected a positive number"),
        (["--num-requests", "-1"], "--num-requests = -1"),
        (["--burstiness", "nan"], "--burstiness"),
        (["--burstiness", "1", "--arrivals", "poisson"], "either --burstiness or --arrivals"),
        (["--block-tokens", "-1"], "--block-tokens -1"),
    ],
)
def test_options_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        offered(*words)


def test_the_page_on_traces_shows_what_is_said_of_its_example(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    shown = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    path = tmp_path / "burst.csv"
    path.write_text("\n".join(line for line in shown[:5]) + "\n")
    trace = offered("--trace", path)
    tell("burst.csv", len(trace), trace.span_s, trace)
    assert capsys.readouterr().err.splitlines() == shown[5:7]


def test_what_is_offered_read_and_left_out_is_said(file, capsys):
    file.write_text(ROWS + "110,9000,10\n111,5,0\n")
    trace = offered("--trace", file, longest=4096)
    tell("late", len(trace), trace.span_s, trace)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "late: 11 requests over 12 s (0.9167/s), read as slos-serve CSV"
    assert said[1:] == ["late: left out: 1 longer than the context", "late: 1 with no output, served as one token each"]


def test_one_instant_is_said_to_be_one(file, capsys):
    file.write_text("arrived_at_s,prompt_tokens,output_tokens\n" + "7,5,1\n" * 4)
    trace = offered("--trace", file)
    tell("burst", len(trace), trace.span_s, trace)
    assert "4 requests over 0 s (all at one instant: rates count them over 1 s)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb", [["simulate", "--system", "vllm"], ["plan", "--system", "vllm", "--max-replicas", "2"]]
)
def test_the_verbs_take_the_mix_and_say_what_they_offer(verb, file, capsys):
    status = main([*verb, "--trace", str(file), "--mix", "chat=1,coding=1", "--json"])
    told = capsys.readouterr()
    assert status in (0, 1)
    assert "10 requests over 10 s" in told.err
    assert "coding" in told.out


def test_a_scenario_takes_no_option_of_a_trace(capsys):
    assert main(["simulate", "--scenario", "chatbot", "--mix", "chat=1"]) == 2
    assert "either --scenario or --mix" in capsys.readouterr().err


def test_simulate_tells_machines_what_was_left_out(file, capsys):
    file.write_text("Timestamp,Request tokens,Response tokens\n5,100,10\n6,100,0\n9,100,10\n")
    assert main(["simulate", "--system", "vllm", "--trace", str(file), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["num_requests"] == 2
    assert entry["trace"]["left_out"] == {"failed": 1}
    assert np.isclose(entry["trace"]["span_s"], 6)


def test_the_first_requests_are_read_and_counted_without_the_rest(tmp_path):
    path = tmp_path / "b.csv"
    rows = "5,10,1\n6,20,0\n8,30,3\n9,40,4\n12,50,0\n13,60,6\nthis line is damaged\n"
    path.write_text("Timestamp,Request tokens,Response tokens\n" + rows)
    trace = offered("--trace", path, "--num-requests", 3)
    assert trace.prompt_tokens.tolist() == [10, 30, 40]
    assert trace.span_s == 8
    assert trace.origin.left_out == {"failed": 2}
    windowed = offered("--trace", f"{path}@2:100", "--num-requests", 1)
    assert (windowed.prompt_tokens.tolist(), windowed.span_s) == ([30], 2)


def test_the_first_requests_of_coarse_ticks_come_as_in_the_whole_file(tmp_path):
    rows = [
        {"timestamp": 3000 * (i // 4), "input_length": 600, "output_length": 5, "hash_ids": [i, -i]} for i in range(20)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = offered("--trace", path, "--num-requests", 6)
    assert first.arrived_at_s.tolist() == offered("--trace", path).arrived_at_s.tolist()[:6]
    assert first.span_s == 4.5


def test_plan_tells_machines_what_was_left_out(file, capsys):
    file.write_text("Timestamp,Request tokens,Response tokens\n5,100,10\n6,100,0\n9,100,10\n")
    assert main(["plan", "--system", "vllm", "--max-replicas", "2", "--trace", str(file), "--json"]) in (0, 1)
    (entry,) = json.loads(capsys.readouterr().out)["hardware"].values()
    assert entry["workload"]["left_out"] == {"failed": 1}


def test_epoch_times_end_on_a_cluster_too(file, capsys):
    file.write_text(
        "arrived_at_s,prompt_tokens,output_tokens\n" + "".join(f"{1758100000 + i},90,5\n" for i in range(4))
    )
    assert main(["simulate", "--system", "vllm", "--replicas", "2", "--trace", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated_s"] < 60
