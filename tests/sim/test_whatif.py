"""What enforcing would have made of a record: projected where the replay is faithful, refused where it is not."""

import json

import pytest
from tests.sim.records_made import CONFIG, write_record

from slos_serve import cli
from slos_serve.errors import ConfigError
from slos_serve.sim.cmd_whatif import what_if
from slos_serve.sim.observed import Observed
from slos_serve.sim.recording import read_recording

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
