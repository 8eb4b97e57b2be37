"""What a record of a running scheduler holds: replayable plans, finished requests, and no more than it may."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from slos_serve.core.types import BatchPlan, Limits, Plan, ReplicaState, Request, RequestTable, Slo, Verdict
from slos_serve.http.seal import sealed
from slos_serve.records import writer
from slos_serve.records.reader import read_recording
from slos_serve.records.replay import replay
from slos_serve.records.writer import StepRecorder
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request

OURS = "slos_serve.core.planner.SloPlanner"


def served(build, tmp_path, *, depth=1, cls=SloScheduler, mode="enforce", count=40, **options):
    path = tmp_path / "run.jsonl"
    slo = {"record": str(path), "planner": OURS, "always_plan": False, "mode": mode}
    scheduler = build(slo=slo, cls=cls, **options)
    scheduler.slo.recorder._plan_every = 1
    engine = Engine(scheduler, depth=depth)
    kinds = [{"slo_class": "chat"}, {"slo_class": "coding"}, {"slo_class": "best-effort"}, None]
    for i in range(count):
        args = kinds[i % 4]
        if args is not None:
            args = sealed({**args, "slo_id": f"id{i}", "slo_tenant": "acme"})
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=5 + 9 * i, max_tokens=3 + i % 20, args=args))
        if i % 3 == 0:
            engine.step()
    engine.run()
    scheduler.slo.housekeeper.stop()
    scheduler.slo.recorder.flush()
    return scheduler, read_recording(path)


@pytest.mark.parametrize("num_blocks", [1000, 80])
def test_recorded_plans_replay_to_the_same_bytes_and_the_engine_ran_them(build, tmp_path, num_blocks) -> None:
    scheduler, recording = served(build, tmp_path, num_blocks=num_blocks, prefix_caching=True)
    assert not scheduler.slo.faults.counts
    result = replay(recording)
    assert result.num_plans == result.num_same > 20
    assert result.num_steered == result.num_plans
    assert result.num_exact == result.num_steered
    assert scheduler.slo.divergences.total() == 0


def test_asynchronous_steps_replay_too_and_what_differs_is_explained(build, tmp_path) -> None:
    scheduler, recording = served(build, tmp_path, depth=2, cls=AsyncSloScheduler)
    assert not scheduler.slo.faults.counts
    result = replay(recording)
    assert result.num_plans == result.num_same > 20
    assert not [what for what in result.divergences if what.endswith("unexplained")]
    assert recording.engine["is_async"] is True


def test_observing_records_plans_that_nobody_carried_out(build, tmp_path) -> None:
    _, recording = served(build, tmp_path, mode="observe")
    result = replay(recording)
    assert result.num_plans == result.num_same > 20
    assert result.num_steered == 0
    assert not any(line["enforced"] for line in recording.requests)


def test_a_request_is_recorded_with_what_it_asked_for_and_what_became_of_it(build, tmp_path) -> None:
    _, recording = served(build, tmp_path, count=8)
    assert len(recording.requests) == 8
    by_id = {line["request_id"]: line for line in recording.requests}
    chat = by_id["r4"]
    assert chat["said"] == {"slo_class": "chat"}
    assert (chat["num_prompt_tokens"], chat["num_output_tokens"]) == (41, 7)
    assert chat["outcome"] in ("met", "missed", "declined")
    assert chat["slo"]["tpot_s"] == 0.1
    assert chat["arrival_s"] <= chat["first_token_s"] <= chat["t"]
    assert by_id["r3"]["slo"] == {}
    assert recording.find_request("id4") == "r4"
    assert recording.find_request("r4") == "r4"
    assert recording.find_request("nobody") is None
    plan = recording.plan_about("r4")
    assert plan is not None
    assert any(verdict["request_id"] == "r4" for verdict in plan.document["plan"]["verdicts"])
    assert "tenants" not in recording.engine["config"]
    assert recording.reference()[1] > 0


def state_of(count: int, now_s: float) -> ReplicaState:
    from slos_serve.core.perf import PerfModel

    table = RequestTable()
    for i in range(count):
        slo = Slo(ttft_s=1.0 + i, tpot_s=0.05)
        table.add(
            Request(
                request_id=f"chatcmpl-{i:032x}-0", arrival_s=1e9, num_prompt_tokens=100, max_output_tokens=9, slo=slo
            )
        )
    limits = Limits(max_num_batched_tokens=512, max_num_seqs=16, max_model_len=2048, block_size=16, num_kv_blocks=1000)
    model = PerfModel.from_terms([{"fixed_s": 0.0123456789}])
    return ReplicaState(now_s=now_s, requests=table, num_free_kv_blocks=9, limits=limits, perf_model=model)


EMPTY = Plan(batch=BatchPlan(request_ids=[], num_tokens=np.zeros(0, np.int64), draft_lengths=np.zeros(0, np.int64)))
WITH_VERDICT = replace(EMPTY, verdicts=(Verdict(request_id="a", promised=False, reason="compute"),))


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_plans_with_verdicts_are_kept_and_of_the_others_every_sixteenth(tmp_path) -> None:
    recorder = StepRecorder(tmp_path / "r.jsonl")
    for step in range(64):
        recorder.ask(step, state_of(1, 1e9 + step), WITH_VERDICT if step == 5 else EMPTY)
        recorder.answer({"a": 1}, is_steered=True)
    recorder.flush()
    assert [line["step"] for line in lines_of(tmp_path / "r.jsonl")] == [5, 15, 31, 47, 63]


def test_plans_are_rationed_by_the_second_and_in_all(tmp_path, monkeypatch) -> None:
    recorder = StepRecorder(tmp_path / "r.jsonl")
    for step in range(3000):  # 30 s
        recorder.ask(step, state_of(100, 1e9 + step / 100), WITH_VERDICT)
        recorder.answer({}, is_steered=False)
    recorder.flush()
    written = (tmp_path / "r.jsonl").stat().st_size
    assert recorder.num_plans_skipped > 2000
    assert written < 1.3 * (writer.PLAN_BURST_BYTES + 30 * writer.PLAN_BYTES_PER_S)
    monkeypatch.setattr(writer, "MAX_PLAN_BYTES", 10_000)
    recorder = StepRecorder(tmp_path / "s.jsonl")
    for step in range(100):
        recorder.ask(step, state_of(1, 1e9 + 1000 * step), WITH_VERDICT)
        recorder.answer({}, is_steered=False)
    recorder.flush()
    assert (tmp_path / "s.jsonl").stat().st_size < 14_000
    assert recorder.num_plans_skipped > 85


def test_a_plan_is_kept_as_it_was_made_whatever_becomes_of_its_state(tmp_path) -> None:
    recorder = StepRecorder(tmp_path / "r.jsonl")
    state = state_of(2, 1e9)
    recorder.ask(1, state, WITH_VERDICT)
    state.requests.rows["tier"] = 2
    state.requests.remove(state.requests.request_ids[0])
    recorder.answer({}, is_steered=False)
    recorder.flush()
    (line,) = lines_of(tmp_path / "r.jsonl")
    assert line["state"] == state_of(2, 1e9).to_json()


def test_records_name_nobody_unless_asked_and_only_their_user_reads_them(build, tmp_path) -> None:
    said = {"slo_class": "chat", "slo_tenant": "acme", "slo_session": "s1", "slo_id": "i", "note": "secret"}
    for names in (False, True):
        path = tmp_path / f"{names}.jsonl"
        scheduler = build(slo={"record": str(path), "record_names": names})
        scheduler.add_request(make_request("r", max_tokens=2, args=sealed(said)))
        Engine(scheduler).run()
        scheduler.slo.housekeeper.stop()
        scheduler.slo.recorder.flush()
        (line,) = read_recording(path).requests
        assert (line.get("tenant") == "acme", "session" in line) == (names, names)
        assert ("acme" in path.read_text()) is names
        assert "secret" not in path.read_text()
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_whole_record_is_bounded_and_each_part_reads_by_itself(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    recorder = StepRecorder(path, max_bytes=40_000)
    recorder.add_fact("engine", 0.0, {"policy": "fcfs"})
    recorder.add_fact("model", 0.0, {"perf_model": {}})
    for step in range(2000):
        recorder.add(step, 0.0, writer.BatchShape(1, 1, 1, 0, 1.0, has_prefill=False), 0.1, None, None)
        if step % 20 == 0:
            recorder.flush()
    recorder.flush()
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == ["r.jsonl", "r.jsonl.1", "r.jsonl.2", "r.jsonl.3"]
    assert sum(part.stat().st_size for part in parts) <= 41_000
    steps = [read_recording(part).steps for part in parts]
    assert all(read_recording(part).model is not None for part in parts)
    newest, oldest = steps[0][-1]["step"], steps[-1][0]["step"]
    assert [line["step"] for part in reversed(steps) for line in part] == list(range(oldest, newest + 1))
    assert newest == 1999


def test_a_line_that_json_cannot_say_costs_itself_alone(tmp_path) -> None:
    recorder = StepRecorder(tmp_path / "r.jsonl")
    for value in (1, object(), 3):
        recorder.add_fact("request", 0.0, {"value": value})
    recorder.flush()
    assert [line["value"] for line in lines_of(tmp_path / "r.jsonl")] == [1, 3]
    assert recorder.num_dropped == 1


def test_without_a_file_nothing_is_kept() -> None:
    recorder = StepRecorder(None)
    recorder.ask(1, state_of(1, 1e9), WITH_VERDICT)
    recorder.answer({}, is_steered=False)
    recorder.add_fact("engine", 0.0, {})
    recorder.flush()
    assert not recorder.is_open
    assert not recorder._buffer


def test_a_scheduler_whose_constructor_has_not_run_is_vllms_own() -> None:
    bare = object.__new__(SloScheduler)
    assert bare.slo is None
