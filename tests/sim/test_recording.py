"""Records: what cannot be read is told in one line, what can be is planned again."""

import json

import pytest
from tests.sim.records_made import write_record

from slos_serve import cli
from slos_serve.core.planner import SloPlanner
from slos_serve.errors import ConfigError
from slos_serve.records.reader import read_recording
from slos_serve.records.replay import replay


class Mine(SloPlanner):
    """Somebody's own planner, which plans as ours does."""


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fail(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return status, captured.err


@pytest.mark.parametrize("verb", ["replay", "whatif"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "RECORD"),
        ("", "describes an engine"),
        ('{"step": 1, "num_tokens": 3, "seconds": 0.1}\n', "describes an engine"),
        ("not json\n", ":1"),
        ("[1]\n", ":1"),
        ('{"kind": "engine", "schema": "slos-serve-record/9"}\n', "slos-serve-record/9"),
        ('{"kind": "request"}\n', "engine line before it"),
        ('{"kind": "weather"}\n', "weather"),
        ('{"kind": "engine", "schema": "slos-serve-record/1", "policy": "fcfs", "planner": "os.system"}\n', "record"),
    ],
)
def test_what_is_no_record_is_told_in_one_line(capsys, tmp_path, verb, text, named):
    path = tmp_path / "record.jsonl"
    if text is not None:
        path.write_text(text)
    status, err = fail(capsys, verb, path)
    assert status == 2
    assert named in err


def test_only_planners_of_this_package_are_imported(tmp_path):
    path = write_record(tmp_path / "record.jsonl")
    lines = lines_of(path)
    lines[0]["planner"] = "os.system"
    rewrite(path, lines)
    with pytest.raises(ConfigError, match=r"slos_serve\.core.*--trust-planner"):
        replay(read_recording(path))


def test_a_planner_of_ones_own_is_replayed_where_it_is_trusted(tmp_path, capsys):
    path = write_record(tmp_path / "record.jsonl", plans=True)
    lines = lines_of(path)
    lines[0]["planner"] = f"{__name__}:Mine"
    rewrite(path, lines)
    assert fail(capsys, "replay", path)[0] == 2
    assert cli.main(["replay", str(path), "--trust-planner"]) == 0


def test_a_line_cut_off_at_the_end_is_left_out(tmp_path):
    path = write_record(tmp_path / "record.jsonl")
    whole = read_recording(path)
    with path.open("a") as file:
        file.write('{"kind": "request", "request_id": "x", "slo')
    again = read_recording(path)
    assert len(again.requests) == len(whole.requests)
    assert len(again.steps) == len(whole.steps)


def test_a_line_cut_off_in_the_middle_costs_that_line_and_is_told(tmp_path, capsys):
    path = write_record(tmp_path / "record.jsonl")
    whole = read_recording(path)
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"kind": "request"' in line)
    lines[at] = lines[at][: len(lines[at]) // 2] + "\n"
    lines.insert(at, "\xff\x00 not text [[[\n")
    path.write_text("".join(lines))
    again = read_recording(path)
    assert len(again.requests) == len(whole.requests) - 1
    assert (len(again.steps), len(again.plans)) == (len(whole.steps), len(whole.plans))
    assert again.num_skipped == 2
    cli.main(["replay", str(path)])
    assert "2 lines are no JSON and were left out" in capsys.readouterr().err


def test_the_last_of_several_runs_counts(tmp_path):
    path = write_record(tmp_path / "record.jsonl")
    once = read_recording(path)
    path.write_text(path.read_text() * 2)
    twice = read_recording(path)
    assert len(twice.steps) == len(once.steps)
    assert len(twice.plans) == len(once.plans)


def test_recorded_plans_come_out_the_same_and_a_changed_one_does_not(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl", plans=True)
    result = replay(read_recording(path))
    assert result.num_plans == result.num_same > 10
    assert cli.main(["replay", str(path)]) == 0
    lines = lines_of(path)
    changed = next(line for line in lines if line.get("kind") == "plan" and line["plan"]["num_tokens"])
    changed["plan"]["num_tokens"][0] += 1
    rewrite(path, lines)
    capsys.readouterr()
    assert cli.main(["replay", str(path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["num_same"] == document["num_plans"] - 1
    assert "num_tokens" in document["differing"][0]


def test_a_state_of_another_version_is_told_with_its_line(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl", plans=True)
    lines = lines_of(path)
    number, line = next((i, line) for i, line in enumerate(lines, 1) if line.get("kind") == "plan")
    line["state"]["schema"] = "slos-serve-state/9"
    rewrite(path, lines)
    status, err = fail(capsys, "replay", path)
    assert status == 2
    assert f"{path}:{number}" in err


def test_divergences_are_counted_with_their_reasons(tmp_path):
    path = write_record(tmp_path / "record.jsonl", plans=True, steered=True)
    lines = lines_of(path)
    plans = [line for line in lines if line.get("kind") == "plan" and line["scheduled"]]
    name = next(iter(plans[0]["scheduled"]))
    plans[0]["state"]["num_free_kv_blocks"] = 0
    del plans[0]["scheduled"][name]
    plans[1]["scheduled"]["under vLLM's own rules"] = 5
    rewrite(path, lines)
    result = replay(read_recording(path))
    assert result.num_exact == result.num_steered - 1
    assert sum(result.divergences.values()) == 1
    assert next(iter(result.divergences)).startswith("not run: ")
