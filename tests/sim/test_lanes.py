"""Searches are answered from the journal first; what an interruption leaves behind is not run again."""

import json

import pytest

from slos_serve.errors import ConfigError
from slos_serve.sim.capacity import Effort, Outcome, rate_at, search
from slos_serve.sim.cells import Cell
from slos_serve.sim.lanes import Journal, Lane, code_digest, run_lanes

EFFORT = Effort(num_windows=3, coarse_windows=1, targets=(0.9,))


def cell(**changes):
    values = {"scenario": "chatbot", "system": "vllm", "hardware": "h100-8b-derived", "data": "x", "part": "report"}
    return Cell(**{**values, "window": 0, "rate_rps": 1.0, **changes})


def outcome(met=95, **changes):
    return Outcome(by_class={"chat": (met, 10_000, 0, 0)}, **changes)


def lane(name, capacity=2.0):
    def cell_of(point):
        rate_rps = rate_at(point.rate_index)
        return cell(system=name, part=point.part, rate_rps=rate_rps, window=point.window, may_stop=point.may_stop)

    return Lane(name=name, search=search(("{}",), lambda: 1.0, EFFORT), cell_of=cell_of)


def pretend(one):
    """Attain 100 % at nothing, 90 % at 2 requests per second; fail for a system of that name."""
    if one.system == "broken":
        raise ConfigError(where="x", key="y", value=1, expected="z")
    return outcome(met=round(10_000 * max(0.0, 1 - 0.05 * one.rate_rps)))


def test_an_outcome_is_on_disk_before_the_next_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    seen = []

    def watching(one):
        seen.append(len(path.read_text().splitlines()))
        return pretend(one)

    with Journal(path) as journal:
        run_lanes([lane("a")], journal, run=watching)
    assert seen == list(range(len(seen)))


def test_an_interrupted_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    def dying(one, runs=[0]):  # noqa: B006
        runs[0] += 1
        if runs[0] > 5:
            raise KeyboardInterrupt
        return pretend(one)

    path, whole, made = tmp_path / "runs.jsonl", lane("a"), []
    with Journal(path) as journal, pytest.raises(KeyboardInterrupt):
        run_lanes([lane("a")], journal, run=dying)
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    again = lane("a")
    with Journal(path) as journal:
        assert len(journal) == 5
        run_lanes([again], journal, run=lambda one: made.append(one) or pretend(one))
    with Journal(None) as journal:
        run_lanes([whole], journal, run=pretend)
        assert len(made) == len(journal) - 5
    assert again.answer.curve.capacity(0.9) == whole.answer.curve.capacity(0.9) == pytest.approx(2.0, rel=0.02)
    assert all(json.loads(line) for line in path.read_text().splitlines() if "cut sho" not in line)


def test_runs_made_by_other_code_are_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    with Journal(path, code="old") as journal:
        journal.add(cell(), outcome())
    journal = Journal(path, code="new")
    assert journal.find(cell()) is None
    assert journal.num_foreign == 1
    assert Journal(path, code="old").find(cell()) == outcome()
    assert len(code_digest()) == 16


def test_runs_of_named_systems_stand_although_other_code_made_them(tmp_path):
    path = tmp_path / "runs.jsonl"
    for code, met in (("older", 10), ("old", 20)):
        with Journal(path, code=code) as journal:
            for name in ("vllm", "slos-serve"):
                journal.add(cell(system=name), outcome(met))
    journal = Journal(path, code="new", reuse={"vllm"})
    assert journal.find(cell(system="vllm")) == outcome(20)
    assert journal.find(cell(system="slos-serve")) is None
    assert (journal.num_reused, journal.num_foreign) == (2, 2)
    with Journal(path, code="new") as journal:
        journal.add(cell(system="vllm"), outcome(30))
    assert Journal(path, code="new", reuse={"vllm"}).find(cell(system="vllm")) == outcome(30)


def test_a_stopped_run_answers_only_who_may_stop_too():
    journal = Journal(None)
    journal.add(cell(may_stop=True), outcome(stopped=True))
    assert journal.find(cell(may_stop=True)) == outcome(stopped=True)
    assert journal.find(cell()) is None
    journal.add(cell(), outcome())
    journal.add(cell(may_stop=True), outcome(stopped=True))
    assert journal.find(cell(may_stop=True)) == outcome()


def test_a_search_that_fails_leaves_the_others_alone():
    lanes, ended = [lane("broken"), lane("a")], []
    run_lanes(lanes, Journal(None), run=pretend, progress=lambda done, runs, name: ended.append(name) if name else None)
    assert "ConfigError" in lanes[0].error
    assert lanes[0].answer is None
    assert lanes[1].answer is not None
    assert ended == ["broken", "a"]


def test_several_processes_find_what_one_finds(tmp_path):
    alone, together = [lane("a"), lane("b")], [lane("a"), lane("b")]
    run_lanes(alone, Journal(None), run=pretend)
    with Journal(tmp_path / "runs.jsonl") as journal:
        run_lanes(together, journal, run=pretend, jobs=2)
    for one, two in zip(alone, together, strict=True):
        assert one.answer.curve.met.keys() == two.answer.curve.met.keys()
        assert one.answer.curve.capacity(0.9) == two.answer.curve.capacity(0.9)


def test_a_cell_is_known_by_everything_that_its_outcome_depends_on(tmp_path):
    base = cell().key()
    assert cell(may_stop=True).key() == base
    for changes in ({"window": 1}, {"rate_rps": 2.0}, {"settings": "1"}, {"slo_scale": 0.5}, {"seed": 1}):
        assert cell(**changes).key() != base
    file = tmp_path / "mine.json"
    file.write_text("1")
    one = cell(hardware=str(file)).key()
    file.write_text("2")
    assert cell(hardware=str(file)).key() != one
