"""Searches are answered from the journal first; what an interruption leaves behind is not run again."""

import json
import os
from dataclasses import replace

import pytest

from slos_serve.errors import ConfigError
from slos_serve.sim.capacity import jobs as job_module
from slos_serve.sim.capacity import runs as cells
from slos_serve.sim.capacity.bounds import UnsolvedError
from slos_serve.sim.capacity.jobs import Journal, SearchJob, WorkerError, code_digest, run_searches
from slos_serve.sim.capacity.runs import Cell
from slos_serve.sim.capacity.search import RunOutcome, SearchEffort, rate_at, search
from slos_serve.sim.workloads import scenarios

EFFORT = SearchEffort(num_windows=3, coarse_windows=1, targets=(0.9,))


def cell(**changes):
    values = {"scenario": "chatbot", "system": "vllm", "hardware": "h100-8b-derived", "data": "x", "part": "report"}
    return Cell(**{**values, "window": 0, "rate_rps": 1.0, **changes})


def outcome(met=95, **changes):
    return RunOutcome(by_class={"chat": (met, 10_000, 0, 0)}, **changes)


def search_job(name, capacity=2.0):
    def cell_of(point):
        rate_rps = rate_at(point.rate_index)
        return cell(system=name, part=point.part, rate_rps=rate_rps, window=point.window, may_stop=point.may_stop)

    return SearchJob(name=name, search=search(("{}",), lambda: 1.0, EFFORT), cell_of=cell_of)


def pretend(one):
    """Attain 100 % at nothing, 90 % at 2 requests per second; fail for a system of that name."""
    if one.system == "broken":
        raise ConfigError(where="x", key="y", value=1, expected="z")
    if one.system == "unsolved":
        raise UnsolvedError("the linear programme was not solved: time limit")
    if one.system == "faulty":
        raise RuntimeError("a fault of ours")
    if one.system == "gone":
        os._exit(1)
    return outcome(met=round(10_000 * max(0.0, 1 - 0.05 * one.rate_rps)))


DAMAGE = {
    "torn": b'{"key": "{\\"system',
    "no text": b"\xff\xfe\x00\x80",
    "no key": b'{"by_class": {}, "drain_s": 0, "stopped": false, "code": "other"}',
    "key of another shape": b'{"key": "[1]", "by_class": {}, "drain_s": 0, "stopped": false, "code": "other"}',
    "system of another shape": (
        b'{"key": "{\\"system\\": []}", "by_class": {}, "drain_s": 0, "stopped": false, "code": "other"}'
    ),
    "deep": b"[" * 100_000,
    "no object": b"[1, 2]\n3\nnull",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_costs_itself_alone_and_no_search_that_goes_on(tmp_path, damage):
    path = tmp_path / "runs.jsonl"
    with Journal(path, code="then") as journal:
        run_searches([search_job("a")], journal, run=pretend)
    with path.open("ab") as file:
        file.write(damage)
    known, made = len(journal), []
    with Journal(path, code="now", reuse=["a"]) as journal:
        assert journal.num_reused == known > 0
        run_searches([search_job("a")], journal, run=lambda one: made.append(one) or pretend(one))
    assert made == []


def test_an_outcome_is_on_disk_before_the_next_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    seen = []

    def watching(one):
        seen.append(len(path.read_text().splitlines()))
        return pretend(one)

    with Journal(path) as journal:
        run_searches([search_job("a")], journal, run=watching)
    assert seen == list(range(len(seen)))


def test_an_interrupted_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    def dying(one, runs=[0]):  # noqa: B006
        runs[0] += 1
        if runs[0] > 5:
            raise KeyboardInterrupt
        return pretend(one)

    path, whole, made = tmp_path / "runs.jsonl", search_job("a"), []
    with Journal(path) as journal, pytest.raises(KeyboardInterrupt):
        run_searches([search_job("a")], journal, run=dying)
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    again = search_job("a")
    with Journal(path) as journal:
        assert len(journal) == 5
        run_searches([again], journal, run=lambda one: made.append(one) or pretend(one))
    with Journal(None) as journal:
        run_searches([whole], journal, run=pretend)
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
    several, ended = [search_job("broken"), search_job("a")], []
    run_searches(
        several, Journal(None), run=pretend, progress=lambda done, runs, name: ended.append(name) if name else None
    )
    assert "ConfigError" in several[0].error
    assert several[0].answer is None
    assert several[1].answer is not None
    assert ended == ["broken", "a"]


@pytest.mark.parametrize("name", ["unsolved", "faulty"])
def test_a_run_that_fails_in_whatever_way_costs_its_own_search_alone(name):
    several = [search_job(name), search_job("a")]
    run_searches(several, Journal(None), run=pretend)
    assert "linear programme" in several[0].error or "RuntimeError" in several[0].error
    assert several[1].answer is not None


def test_a_search_whose_first_guess_fails_leaves_the_others_alone():
    def guess():
        raise RuntimeError("no guess")

    broken = SearchJob(name="broken", search=search(("{}",), guess, EFFORT), cell_of=lambda _: cell())
    several = [broken, search_job("a")]
    run_searches(several, Journal(None), run=pretend)
    assert several[0].error == "RuntimeError: no guess"
    assert several[1].answer is not None


def test_a_worker_that_dies_ends_the_job_in_words_and_keeps_what_is_known(tmp_path):
    with Journal(tmp_path / "runs.jsonl") as journal, pytest.raises(WorkerError, match="--jobs"):
        run_searches([search_job("gone")], journal, run=pretend, jobs=2)


def test_several_processes_find_what_one_finds(tmp_path):
    alone, together = [search_job("a"), search_job("b")], [search_job("a"), search_job("b")]
    run_searches(alone, Journal(None), run=pretend)
    with Journal(tmp_path / "runs.jsonl") as journal:
        run_searches(together, journal, run=pretend, jobs=2)
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


def test_a_run_is_made_again_after_the_promises_or_the_data_have_changed(tmp_path, monkeypatch):
    (tmp_path / "traces").mkdir()
    file = tmp_path / "traces" / "azure2023_conv.csv"
    file.write_text("1")
    before = cell(data=str(tmp_path)).key()
    file.write_text("2")
    cells._data_digest.cache_clear()  # as a later command would
    changed = cell(data=str(tmp_path)).key()
    assert changed != before
    classes = scenarios.SCENARIO_SLOS.classes
    tighter = {**classes, "chat": replace(classes["chat"], tpot_ms=1.0)}
    monkeypatch.setattr(scenarios, "SCENARIO_SLOS", replace(scenarios.SCENARIO_SLOS, classes=tighter))
    assert cell(data=str(tmp_path)).key() != changed


@pytest.mark.parametrize("source", ["config.py", "core/planner.py", "sim/hardware/h100-8b-derived.json"])
def test_the_code_is_known_by_every_file_that_bears_on_outcomes(source, monkeypatch, tmp_path):
    for name in ("config.py", "core/planner.py", "sim/hardware/h100-8b-derived.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(job_module, "files", lambda _: tmp_path)
    before = code_digest()
    (tmp_path / source).write_text("2")
    assert code_digest() != before
