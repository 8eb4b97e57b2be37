"""What enforcing would have made of a record: projected where the replay is faithful, refused where it is not."""

import json

import numpy as np
import pytest
from tests.sim.records_made import CONFIG, write_record

from slos_serve import cli
from slos_serve.commands.whatif import what_if
from slos_serve.errors import ConfigError
from slos_serve.records.reader import read_recording
from slos_serve.sim.observed import Observed, Pace

BUSY = 9.0


def change(path, edit):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        edit(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_record_of_the_simulator_itself_replays_within_the_tolerance_and_is_projected(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl", rate=BUSY)
    assert cli.main(["whatif", str(path), "--json", "--runs", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["mode"] == "observe"
    assert document["refused"] == ""
    assert {entry["num_requests"] for entry in document["replay"].values()} == {40}
    assert all(abs(entry["difference"]) <= 0.03 for entry in document["replay"].values())
    shares = document["projection"]
    assert shares["chat"]["vllm"] < 0.9  # or there would be nothing to gain
    assert shares["chat"]["enforced"] > shares["chat"]["vllm"]


def test_a_machine_whose_steps_vary_is_replayed_as_it_was_and_not_as_it_might_have_been(tmp_path):
    path = write_record(tmp_path / "record.jsonl", rate=BUSY, noise_sigma=0.4)
    recording = read_recording(path)
    observed = Observed.of(recording)
    graded = observed.run(observed.workload(), enforced=False, seed=0)
    start = min(line["arrival_s"] for line in recording.requests)
    lines = {round(line["arrival_s"] - start, 6): line for line in recording.requests}
    assert 0.05 < sum(line["outcome"] == "met" for line in lines.values()) / len(lines) < 0.95
    pairs = [(one, lines[round(one.arrival_s, 6)]) for one in graded]
    assert sum(one.outcome != line["outcome"] for one, line in pairs) <= 1
    assert max(abs(one.ttft_s - line["ttft_ms"] / 1e3) for one, line in pairs) < 0.02


def test_an_engine_that_was_held_up_between_two_steps_is_held_up_in_the_replay(tmp_path):
    path = write_record(tmp_path / "record.jsonl", rate=BUSY)
    steps = read_recording(path).steps
    held_up_s = steps[len(steps) // 2]["t"]

    def hold_up(line):
        for key in ("t", "arrival_s", "added_s"):
            if line.get(key, 0.0) > held_up_s:
                line[key] += 1.0

    change(path, hold_up)
    recording = read_recording(path)
    observed = Observed.of(recording)
    start = min(line["arrival_s"] for line in recording.requests)
    ends = {round(line["arrival_s"] - start, 6): line["t"] - start for line in recording.requests}
    across = [at for at, end in ends.items() if at + 1.0 < held_up_s + 1.0 - start < end]
    assert across
    graded = observed.run(observed.workload(), enforced=False, seed=0)
    late = {end: one.finish_s - end for one in graded for end in [ends[round(one.arrival_s, 6)]]}
    just_before = late.pop(held_up_s - start, None)
    assert just_before is None or just_before == pytest.approx(1.0, abs=0.05)  # it comes out just after
    assert max(abs(seconds) for seconds in late.values()) < 0.05


def test_requests_reach_the_engine_as_late_as_they_did(tmp_path):
    path = write_record(tmp_path / "record.jsonl", rate=1.0, transit_s=0.03)
    observed = Observed.of(read_recording(path))
    transits = [one.transit_s for one in observed.workload().arrivals]
    assert transits == pytest.approx([0.03] * len(transits), abs=0.006)
    change(path, lambda line: line.pop("added_s", None))
    assert not any(one.transit_s for one in Observed.of(read_recording(path)).workload().arrivals)


def test_the_pace_of_a_step_holds_while_it_ran_and_the_average_elsewhere():
    pace = Pace.of(np.array([1.0, 2.0, 5.0]), np.array([1.0, 1.0, 2.0]), np.array([1.0, 0.5, 2.5]))
    assert pace(0.0, 1.0) == pytest.approx(1.0)
    assert pace(1.0, 0.25) == pytest.approx(0.5)
    assert pace(0.5, 1.0) == pytest.approx(1.5)  # half of it at the first step's pace, half at the second's
    assert pace(2.0, 1.0) == pytest.approx(1.0)  # nothing ran then: 4 seconds of work in 4
    assert pace(100.0, 3.0) == pytest.approx(3.0)


def test_a_step_of_no_time_or_of_unknown_size_leaves_the_pace_as_it_is():
    pace = Pace.of(np.array([1.0, 2.0]), np.array([1.0, 1.0]), np.array([1.0, 0.5]))
    odd = Pace.of(np.array([1.0, 1.0, 1.5, 2.0]), np.array([1.0, 0.0, 0.5, 1.0]), np.array([1.0, 0.1, np.nan, 0.5]))
    assert [odd(at, 1.0) for at in (0.0, 0.5, 1.0, 9.0)] == [pace(at, 1.0) for at in (0.0, 0.5, 1.0, 9.0)]


def test_the_same_seed_projects_the_same(tmp_path):
    observed = Observed.of(read_recording(write_record(tmp_path / "record.jsonl", rate=BUSY)))
    assert what_if(observed, None, seeds=[3]) == what_if(observed, None, seeds=[3])


def test_a_replay_that_is_off_is_refused_naming_class_and_points(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl")

    def worsen(line):
        if line.get("kind") == "request" and line["slo_class"] == "slow":
            line["outcome"] = "missed"

    change(path, worsen)
    assert cli.main(["whatif", str(path), "--json", "--runs", "1"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["projection"] is None
    assert "slow was 0.0 %" in document["refused"]
    assert "chat" not in document["refused"]
    assert captured.err.count("\n") == 1
    assert "refused" in captured.err


def test_other_classes_are_projected_by_what_clients_asked_for(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl", rate=BUSY)
    config = tmp_path / "classes.yaml"
    config.write_text(json.dumps({"classes": {**CONFIG["classes"], "chat": {"ttft_ms": 60_000, "tpot_ms": 5000}}}))
    assert cli.main(["whatif", str(path), "--slo-config", str(config), "--json", "--runs", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["replay"]["chat"]["observed"] < 0.9
    assert document["projection"]["chat"]["vllm"] == 1.0
    assert cli.main(["whatif", str(path), "--slo-config", str(config), "--runs", "1"]) == 0
    assert "projected" in capsys.readouterr().out


def test_requests_that_were_cancelled_are_load_and_not_graded(tmp_path):
    path = write_record(tmp_path / "record.jsonl")

    def cancel(line):
        if line.get("kind") == "request" and line["request_id"] in {"r0", "r1"}:
            line["outcome"] = "cancelled"

    change(path, cancel)
    observed = Observed.of(read_recording(path))
    assert sum(observed.num_by_class.values()) == 78
    assert observed.workload().num_requests == 80


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda line: line.update(policy="priority") if line.get("kind") == "engine" else None, "policy"),
        (lambda line: line.update(outcome="none") if line.get("kind") == "request" else None, "request"),
        (lambda line: line.update(enforced=True) if line.get("request_id") == "r3" else None, "mode"),
        (lambda line: line.pop("limits", None), "steps"),
    ],
)
def test_what_cannot_be_replayed_is_named(tmp_path, edit, key):
    path = write_record(tmp_path / "record.jsonl")
    change(path, edit)
    with pytest.raises(ConfigError) as caught:
        Observed.of(read_recording(path))
    assert caught.value.key == key
