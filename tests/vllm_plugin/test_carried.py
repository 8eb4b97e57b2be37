"""A plan is paid for once: it is carried out until something happens, and then there is a new one."""

from __future__ import annotations

import pytest

from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request

OURS = {"planner": "slos_serve.core.planner.SloPlanner", "always_plan": False}
WIDE = {"slo_ttft_ms": 60_000, "slo_tpot_ms": 400}


@pytest.fixture(params=[SloScheduler, AsyncSloScheduler], ids=["sync", "async"])
def engine(request, build):
    scheduler = build(cls=request.param, slo=OURS, max_num_seqs=4, max_num_batched_tokens=512, num_blocks=400)
    return Engine(scheduler, depth=2 if request.param is AsyncSloScheduler else 1)


def add(engine, name, args=WIDE, **options):
    engine.scheduler.add_request(make_request(name, args=args, arrival_s=engine.scheduler.slo.clock.peek(), **options))


def steps(engine, count):
    """Step so often; return how many plans were made."""
    slo = engine.scheduler.slo
    before = slo.num_plans
    for _ in range(count):
        engine.step()
    assert not slo.faults.counts
    return slo.num_plans - before


def test_decodes_with_slack_are_planned_once_for_many_steps(engine) -> None:
    for i in range(3):
        add(engine, f"r{i}", max_tokens=200)
    steps(engine, 6)
    assert steps(engine, 60) <= 4
    assert all(batch == dict.fromkeys(("r0", "r1", "r2"), 1) for batch in engine.batches[-50:])
    assert not engine.scheduler.slo.divergences
    engine.run()
    assert {len(tokens) for tokens in engine.outputs.values()} == {200}
    assert engine.scheduler.slo.promises.tally.classes["custom"].outcomes == {"met": 3}


def test_an_arrival_is_planned_for_in_the_very_next_step(engine) -> None:
    add(engine, "r", max_tokens=200)
    steps(engine, 20)
    add(engine, "new", max_tokens=5)
    assert steps(engine, 1) == 1
    steps(engine, 3)
    assert any("new" in batch for batch in engine.batches[-4:])


def test_an_end_where_nobody_waits_needs_no_plan(engine) -> None:
    for i in range(3):
        add(engine, f"r{i}", max_tokens=200)
    steps(engine, 12)
    engine.abort("r1")
    assert steps(engine, 8) <= 1
    assert engine.batches[-1].keys() == {"r0", "r2"}
    assert not engine.scheduler.slo.divergences


def test_requests_that_come_and_end_cost_one_plan_each_at_the_most(engine) -> None:
    engine.scheduler.slo._learn = lambda *_: None  # how long the mock's steps take on a busy machine is no news
    for i in range(3):
        add(engine, f"r{i}", max_tokens=200)
    steps(engine, 12)
    made = 0
    for i in range(8):
        add(engine, f"short{i}", max_tokens=3)
        made += steps(engine, 8)
    assert made <= 12  # 8 arrivals, and where a run is over
    assert not engine.scheduler.slo.divergences
    engine.run()
    assert not engine.scheduler.slo.divergences
    assert {len(engine.outputs[f"short{i}"]) for i in range(8)} == {3}


def test_a_request_whose_last_token_is_in_flight_is_not_missed(engine) -> None:
    for i in range(3):
        add(engine, f"r{i}", args={**WIDE, "hidden_max_tokens": 400}, max_tokens=20 + 7 * i)
    engine.run()
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {"r0": 20, "r1": 27, "r2": 34}
    assert not engine.scheduler.slo.divergences


def test_an_end_lets_in_who_waits_at_once(engine) -> None:
    for i in range(6):  # four seats
        add(engine, f"r{i}", max_tokens=200)
    steps(engine, 30)
    waiting = engine.scheduler.requests.keys() - engine.batches[-1].keys()
    engine.abort(next(iter(engine.batches[-1])))
    steps(engine, 3)
    assert waiting & engine.batches[-1].keys()


def test_a_plan_is_made_anew_when_steps_start_later_than_foretold(engine) -> None:
    add(engine, "r", max_tokens=300)
    steps(engine, 40)
    assert steps(engine, 5) <= 1
    clock = engine.scheduler.slo.clock
    read = clock._read
    clock._read = lambda: read() + 30.0
    assert steps(engine, 1) == 1


def test_a_plan_is_made_anew_where_blocks_are_short(engine, monkeypatch) -> None:
    from slos_serve.vllm_plugin.engine import view

    add(engine, "r", max_tokens=300)
    steps(engine, 40)
    slo = engine.scheduler.slo
    while slo._next.carried is None or 1 not in slo._next.carried.foretold.blocks[slo._next.carried.num_steps :][:1]:
        engine.step()
    monkeypatch.setattr(view, "free_units", lambda *_: 0)
    assert steps(engine, 1) == 1


def test_a_plan_is_made_anew_after_vllm_did_something_else(engine) -> None:
    for i in range(2):
        add(engine, f"r{i}", max_tokens=300)
    steps(engine, 40)
    steps(engine, 1)
    slo = engine.scheduler.slo
    slo._next.carried.steering.expected["r0"] = 2  # as if one token had been too few
    steps(engine, 1)
    assert slo._next.carried is None
    assert steps(engine, 1) == 1


def test_a_change_of_mode_is_planned_for_at_once(engine) -> None:
    add(engine, "r", max_tokens=300)
    steps(engine, 40)
    engine.scheduler.slo.housekeeper.set_mode("observe")
    assert steps(engine, 1) == 1
    assert engine.scheduler.slo.last_plan is not None


def test_steps_of_a_plan_that_goes_on_say_so_in_the_record(build, tmp_path) -> None:
    import json

    path = tmp_path / "record.jsonl"
    scheduler = build(slo={**OURS, "record": str(path)}, max_num_seqs=4)
    engine = Engine(scheduler)
    add(engine, "r", max_tokens=60)
    engine.run()
    scheduler.slo.recorder.flush()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ages = [line.get("plan_age", 0) for line in lines if "kind" not in line]
    planned = {line["step"] for line in lines if line.get("kind") == "plan"}
    assert max(ages) > 10
    assert ages.count(0) < 20
    assert planned <= {line["step"] for line in lines if "kind" not in line and "plan_age" not in line}


def test_without_an_slo_the_table_is_left_alone_and_ends_are_told_in_full(engine, monkeypatch) -> None:
    tracker = engine.scheduler.slo.tracker
    looked = []
    sync = tracker.sync
    monkeypatch.setattr(tracker, "sync", lambda ends_s: (looked.append(ends_s), sync(ends_s)))
    monkeypatch.setattr(engine.scheduler.slo.outbox, "_snapshot_at", 1e12)  # none is due
    monkeypatch.setattr(engine.scheduler.slo.outbox, "flush", lambda *_args, **_kwargs: None)
    for i in range(3):
        add(engine, f"r{i}", args=None, max_tokens=30 + i)
    engine.run()
    assert not looked
    ends = {end["request_id"]: end["num_output_tokens"] for end in engine.scheduler.slo.outbox.finished}
    assert ends == {"r0": 30, "r1": 31, "r2": 32}
