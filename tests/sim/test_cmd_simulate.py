"""`slos-serve simulate` answers with the documented keys, the same bytes for the same seed, and clear refusals."""

import argparse
import json

import pytest

from slos_serve.cli import main
from slos_serve.commands import bench
from slos_serve.commands import simulate as simulate_verb
from slos_serve.commands.simulate import build_workload
from slos_serve.core.slo.deadlines import OUTCOMES
from slos_serve.sim.hardware import load_hardware
from slos_serve.traces.offered import offered_trace

KEYS = {
    *("system", "scenario", "rate_rps", "num_requests", "met", "missed", "declined", "rejected", "failed", "cancelled"),
    *("promised", "kept", "attainment", "attainment_mean_tpot", "attainment_window", "goodput_rps", "ttft_s", "tpot_s"),
    *("drain_s", "by_class", "num_steps", "simulated_s", "wall_s", "plan_s", "kv_peak_tokens"),
    *("replicas", "router", "hops"),
}


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{0.2 * i:.1f},{50 + 7 * (i % 40)},{5 + i % 20},{'coding' if i % 3 else 'chat'}" for i in range(60)]
    path.write_text("\n".join(["arrived_at_s,prompt_tokens,output_tokens,slo_class", *rows]) + "\n")
    return str(path)


def simulate(capsys, *arguments):
    status = main(["simulate", *arguments])
    return status, capsys.readouterr()


def entry_of(capsys, *arguments):
    status, captured = simulate(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(captured.out)


@pytest.mark.parametrize(
    "system", ["vllm", "vllm-spec", "vllm-priority", "vllm-capped", "vllm-legacy", "sarathi-serve", "edf"]
)
def test_the_answer_has_the_documented_keys_and_outcomes_add_up(capsys, trace, system):
    entry = entry_of(capsys, "--trace", trace, "--system", system, "--rate", "3")
    assert set(entry) >= KEYS
    assert sum(entry[name] for name in OUTCOMES if name != "none") == entry["num_requests"] == 60
    assert set(entry["by_class"]) == {"chat", "coding"}
    assert entry["rate_rps"] == pytest.approx(3.0)
    assert entry["system"] == system


@pytest.mark.parametrize("system", ["distserve", "siloed"])
def test_a_system_of_several_replicas_is_one_unit(capsys, trace, system):
    entry = entry_of(capsys, "--trace", trace, "--system", system)
    assert entry["replicas"] == {"distserve": 2, "siloed": 3}[system]
    assert sum(entry[name] for name in OUTCOMES if name != "none") == 60


def test_replicas_and_a_router_are_told_of_and_used(capsys, trace):
    arguments = (
        "--trace",
        trace,
        "--system",
        "slos-serve",
        "--rate",
        "300",
        "--replicas",
        "3",
        "--fault",
        "slow:1@0.5",
    )
    entry = entry_of(capsys, *arguments)
    assert (entry["replicas"], entry["router"]) == (3, "slo")
    assert entry["attainment"] > entry_of(capsys, *arguments[:-4], "--replicas", "1")["attainment"]
    assert entry_of(capsys, *arguments, "--router", "round-robin")["hops"] == 0


def test_steps_are_planned_one_ahead_where_the_engine_does_so_and_as_told_elsewhere(capsys, trace):
    def ttft_s(*arguments):
        entry = entry_of(capsys, "--trace", trace, "--system", "vllm", "--rate", "30", *arguments)
        return entry["async_lag"], entry["ttft_s"]["p50"]

    ahead, in_turn = ttft_s("--async-lag"), ttft_s("--no-async-lag")
    assert (ahead[0], in_turn[0]) == (True, False)
    assert ahead[1] > in_turn[1]
    assert ttft_s() == ahead


OFFERS = [
    ["--rate", "3"],
    ["--num-requests", "40", "--rate", "2.5", "--arrivals", "gamma:2"],
    ["--burstiness", "0.5"],
]


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    document = {
        "schema": "slos-serve-profile/1",
        "key": {"model": "m", "hardware": "1 x NVIDIA H100", "flags": ["vllm=1", "max-model-len=2048"]},
        "perf_model": load_hardware("h100-8b-derived").perf_model.to_json(),
        "r2": 1.0,
        "num_steps": 900,
        "max_num_batched_tokens": 512,
    }
    path.write_text(json.dumps(document))
    return str(path)


def parsed(verb, *arguments):
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    return parser.parse_args(list(arguments))


@pytest.mark.parametrize("offer", OFFERS)
def test_the_same_options_simulate_what_bench_sends(tmp_path, profile, offer):
    path = tmp_path / "trace.csv"
    rows = [f"{0.2 * i * i:.1f},{50 + 37 * (i % 40)},{5 + i % 20}" for i in range(60)]
    path.write_text("\n".join(["arrived_at_s,prompt_tokens,output_tokens", *rows]) + "\n")
    same = ["--trace", str(path), "--mix", "chat=0.6,coding=0.3,summarization=0.1", "--seed", "3", *offer]
    args = parsed(bench, "--target", "http://127.0.0.1:1", "--profile", profile, *same)
    sent = bench.make_requests(args, offered_trace(args, max_total_tokens=2048 - 1))
    served, *_ = build_workload(parsed(simulate_verb, "--hardware", profile, *same), load_hardware(profile))
    assert len({request.slo_class for request in sent}) == 3
    assert [(one.offset_s, len(one.prompt_token_ids), one.output_tokens, one.slo_class, one.slo) for one in sent] == [
        (
            one.request.arrival_s,
            one.request.num_prompt_tokens,
            one.num_output_tokens,
            one.request.slo_class,
            one.request.slo,
        )
        for one in served.arrivals
    ]


def test_our_own_system_makes_promises(capsys, trace):
    entry = entry_of(capsys, "--trace", trace, "--system", "slos-serve")
    assert entry["promised"] > 50
    assert entry["kept"] == entry["promised"]


def test_the_same_seed_gives_the_same_bytes_wall_time_aside(capsys, trace):
    arguments = ("--trace", trace, "--system", "vllm-spec", "--noise", "0.1", "--seed", "3")
    first, second = entry_of(capsys, *arguments), entry_of(capsys, *arguments)
    for entry in (first, second):
        del entry["wall_s"], entry["plan_s"], entry["route_s"]
    assert json.dumps(first) == json.dumps(second)


def test_several_systems_serve_the_same_requests(capsys, trace):
    both = entry_of(capsys, "--trace", trace, "--system", "vllm,edf")
    assert [entry["system"] for entry in both] == ["vllm", "edf"]
    _, captured = simulate(capsys, "--trace", trace, "--system", "vllm,edf")
    assert [line.split()[0] for line in captured.out.splitlines() if " on " in line] == ["vllm", "edf"]


def test_what_is_longer_than_the_context_is_said(capsys, tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n0,100,5\n1,1000000,5\n")
    _, captured = simulate(capsys, "--trace", str(path))
    assert "1 more requests are longer than the context" in captured.out


def test_without_arguments_the_shipped_trace_is_served(capsys):
    status, captured = simulate(capsys, "--system", "vllm")
    assert status == 0
    assert "requests/s" in captured.out
    assert "summarization" in captured.out


def test_steps_are_recorded_one_json_document_a_line(capsys, trace, tmp_path):
    path = tmp_path / "steps.jsonl"
    entry = entry_of(capsys, "--trace", trace, "--system", "vllm", "--record", str(path))
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(steps) == entry["num_steps"]
    assert {"num_tokens", "num_requests", "context_tokens", "attention_pairs", "seconds"} <= set(steps[0])


def test_a_setting_of_the_system_can_be_given(capsys, trace):
    entry = entry_of(capsys, "--trace", trace, "--system", "vllm", "--set", "token_budget=64")
    assert entry["settings"] == {"token_budget": 64}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--system", "orca"), "system"),
        (("--hardware", "abacus"), "hardware"),
        (("--scenario", "chatbot", "--data", "/absent"), "data"),
        (("--scenario", "chatbot", "--trace", "x"), "trace"),
        (("--rate", "-1"), "rate"),
        (("--acceptance", "1.5"), "acceptance"),
        (("--kv-tokens", "0"), "--kv-tokens"),
        (("--replicas", "0"), "--replicas: '0': expected a whole number, at least 1, at most 1024"),
        (("--hops", "-1"), "hops"),
        (("--snapshot-period", "0"), "--snapshot-period"),
        (("--length-error", "0"), "--length-error"),
        (("--fault", "melt:0@3"), "fault"),
        (("--fault", "kill:4@3"), "fault"),
        (("--system", "distserve", "--set", "prefill=0"), "prefill"),
        (("--seed", "-1"), "seed"),
        (("--system", "vllm", "--set", "token_budget"), "set"),
        (("--system", "vllm", "--set", "colour=1"), "colour"),
        (("--trace", "/nowhere.csv"), "nowhere"),
        (("--slo-class", "poetry", "--trace", "TRACE"), "poetry"),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys, tmp_path, arguments, words):
    path = tmp_path / "t.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n")
    status, captured = simulate(capsys, *(str(path) if word == "TRACE" else word for word in arguments))
    assert status == 2
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) == 1
