"""Requests and orders that no plan foresees: nobody is starved, forgotten or blamed for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec

from slos_serve.core.planner import SloPlanner
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.testing import Engine, make_request

RELAXED = {"slo_ttft_ms": 60_000, "slo_tpot_ms": 5_000}


def listen(scheduler):
    """Return what is told from now on."""
    told = {"verdicts": [], "finished": []}
    send = scheduler.slo.outbox.publisher.send

    def note(message):
        for kind, heard in told.items():
            heard.extend(message[kind])
        send(message)

    scheduler.slo.outbox.publisher.send = note
    return told


def set_clock(scheduler, now_s=1e9):
    """Give the plug-in a clock that tests move."""
    clock = SimpleNamespace(now=now_s)
    scheduler.slo.clock._read, scheduler.slo.clock._last = (lambda: clock.now), now_s
    return clock


def add(scheduler, name, clock=None, **options):
    request = make_request(name, arrival_s=None if clock is None else clock.now, **options)
    scheduler.add_request(request)
    return request


# -- what is only observed -------------------------------------------------------------------------

SHAPE = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}


@pytest.mark.parametrize(
    "specs",
    [
        (SlidingWindowSpec(block_size=16, sliding_window=64, **SHAPE),),
        (FullAttentionSpec(block_size=16, **SHAPE), SlidingWindowSpec(block_size=16, sliding_window=64, **SHAPE)),
        (FullAttentionSpec(block_size=16, **SHAPE), FullAttentionSpec(block_size=32, **SHAPE)),
    ],
)
def test_models_whose_blocks_come_back_early_are_only_observed(build, specs) -> None:
    scheduler = build()
    assert view.unsupported(scheduler) == []
    scheduler.kv_cache_config.kv_cache_groups = [KVCacheGroupSpec([f"l{i}"], spec) for i, spec in enumerate(specs)]
    assert view.unsupported(scheduler) == ["a KV cache that is not full attention in blocks of one size"]


def test_engines_whose_steps_the_planner_does_not_know_are_only_observed(build, monkeypatch) -> None:
    scheduler = build()
    monkeypatch.setattr(scheduler.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(scheduler.scheduler_config, "disable_chunked_mm_input", True)
    assert view.unsupported(scheduler) == ["pipeline parallelism", "images that must not be split"]


@pytest.mark.parametrize(("slots", "is_steered"), [(0, True), (2, True), (10_000, False)])
def test_input_slots_of_a_drafter_are_kept_free_or_the_engine_is_only_observed(
    build, monkeypatch, slots, is_steered
) -> None:
    scheduler = build()
    before = view.limits(scheduler, guard_s=0.0, work_limit=1).max_num_batched_tokens
    drafter = SimpleNamespace(max_num_new_slots_for_drafting=slots)
    monkeypatch.setattr(scheduler.vllm_config, "speculative_config", drafter)
    assert (view.unsupported(scheduler) == []) is is_steered
    after = view.limits(scheduler, guard_s=0.0, work_limit=1).max_num_batched_tokens
    assert after == max(1, before - slots * scheduler.max_num_running_reqs)


# -- odd requests ----------------------------------------------------------------------------------


def test_a_request_with_an_image_is_planned_as_best_effort_work_whatever_it_asks_for(build) -> None:
    scheduler = build(SloPlanner(), max_num_batched_tokens=256)
    told = listen(scheduler)
    request = make_request("image", prompt_tokens=600, args=RELAXED)
    request.mm_features = [object()]
    scheduler.slo.on_add(request)  # vLLM's own queueing wants the real thing
    scheduler.requests["image"] = request
    live = scheduler.slo.tracker.add(request)
    assert live is not None
    scheduler.slo.promises.first_verdict(live, enforcing=True)
    scheduler.slo.outbox.flush(scheduler.slo.clock.now(), is_idle=False)
    assert live.has_row
    assert live.is_set_aside
    assert not scheduler.slo.tracker.stock
    assert [(v["verdict"], v["reason"]) for v in told["verdicts"]] == [("best-effort", "observe")]


def test_streamed_sessions_take_little_beside_promises_and_never_stand_still(build) -> None:
    scheduler = build(SloPlanner(), max_num_batched_tokens=512, max_num_seqs=8, num_blocks=4000)
    engine = Engine(scheduler)
    add(scheduler, "promised", prompt_tokens=16, max_tokens=200, args=RELAXED)
    for _ in range(3):
        engine.step()
    session = make_request("session", prompt_tokens=1500, max_tokens=3)
    session.resumable = True
    scheduler.add_request(session)
    shares = []
    while session.num_computed_tokens < 1500:
        engine.step()
        shares.append(engine.batches[-1].get("session", 0))
        assert engine.batches[-1].get("promised") == 1
    assert min(shares) >= 1
    assert max(shares) <= 45  # half of a step's fixed cost


def test_the_seat_of_a_paused_session_is_promised_to_nobody(build) -> None:
    scheduler = build(SloPlanner(), max_num_seqs=2, max_num_batched_tokens=256)
    engine = Engine(scheduler)
    session = make_request("session", max_tokens=3)
    session.resumable = True
    scheduler.add_request(session)
    for _ in range(6):
        engine.step()
    for name in ("a", "b"):
        add(scheduler, name, prompt_tokens=64, max_tokens=30, args=RELAXED)
    while {"a", "b"} & set(scheduler.requests):
        engine.step()
    assert scheduler.slo.divergences["missing"] == 0


def test_a_grammar_that_gets_ready_inside_a_step_costs_nobody_the_promise(build, monkeypatch) -> None:
    scheduler = build(SloPlanner(), slo={"always_plan": False})
    engine, told = Engine(scheduler), listen(scheduler)
    request = make_request("json", grammar=True, args=RELAXED)
    scheduler.add_request(request)
    assert view.is_blocked(request)
    promote = view.promote
    monkeypatch.setattr(view, "promote", lambda *_: False)  # not yet when the step is planned
    request.structured_output_request.grammar = SimpleNamespace()  # but when vLLM looks
    monkeypatch.setattr(scheduler, "get_grammar_bitmask", lambda *_: None)
    manager = scheduler.structured_output_manager
    advances = "should_advance" if hasattr(manager, "should_advance") else "accept_tokens"  # from 0.30 on
    monkeypatch.setattr(manager, advances, lambda *_, **__: advances == "accept_tokens")
    for _ in range(9):
        engine.step()
        assert request.num_computed_tokens == 0
    monkeypatch.setattr(view, "promote", promote)
    engine.run()
    assert [v["verdict"] for v in told["verdicts"]] == ["promised"]
    assert [end["outcome"] for end in told["finished"]] == ["met"]
    assert not scheduler.slo.faults.counts


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [
        ([5, 6, 7, 9], False),
        ([5, 6, 9, 7], False),
        ([5, 6, 7, 9, 9, 9], False),
        ([5, 6, 7, *range(20, 220), 5, 6], True),
        ([5, 6, 7, *range(20, 30), 6], True),
        ([5, 9], True),
    ],
)
def test_thinking_that_the_prompt_has_closed_is_not_waited_for(prompt, thinks) -> None:
    request = SimpleNamespace(prompt_token_ids=prompt)
    assert view.ends_thinking(request, frozenset({7})) is not thinks


# -- faults of ours --------------------------------------------------------------------------------


def test_a_request_that_cannot_be_graded_takes_nobody_along(build, monkeypatch) -> None:
    scheduler = build(SloPlanner())
    engine, told = Engine(scheduler), listen(scheduler)
    for name in ("a", "b", "c"):
        add(scheduler, name, max_tokens=4, args=RELAXED)
    grade = scheduler.slo.promises._grade

    def failing(live, *args, **options):
        if live.request_id == "a":
            raise RuntimeError("no grade")
        return grade(live, *args, **options)

    monkeypatch.setattr(scheduler.slo.promises, "_grade", failing)
    engine.run()
    assert {end["request_id"] for end in told["finished"]} == {"b", "c"}
    assert not scheduler.slo.tracker.live
    assert not len(scheduler.slo.tracker.table)
    assert dict(scheduler.slo.faults.counts) == {"grade": 1}


def test_rows_of_requests_that_vllm_no_longer_holds_are_dropped_after_one_fault(build) -> None:
    scheduler = build(SloPlanner())
    engine = Engine(scheduler)
    for name in ("dead", "alive"):
        add(scheduler, name, max_tokens=20, args=RELAXED)
    engine.step()
    del scheduler.requests["dead"]
    scheduler.running[:] = [r for r in scheduler.running if r.request_id != "dead"]
    for _ in range(6):
        engine.step()
    assert set(scheduler.slo.tracker.live) == {"alive"}
    assert sum(count for kind, count in scheduler.slo.faults.counts.items() if kind != "reconciled") <= 2
    assert engine.batches[-1] == {"alive": 1}


def test_a_request_that_could_not_be_taken_up_is_served_by_vllms_own_rules(build, monkeypatch) -> None:
    scheduler = build(SloPlanner())
    engine = Engine(scheduler)
    add(scheduler, "promised", max_tokens=60, args=RELAXED)
    tracker = scheduler.slo.tracker
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "_add_row", lambda _: 1 / 0)
        add(scheduler, "lost", max_tokens=5)
    engine.run()
    assert set(engine.finished) == {"promised", "lost"}
    assert not tracker.live
    assert not tracker.stock


# -- an operator's pause ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW])
def test_the_time_of_a_pause_breaks_no_promise(build, kind) -> None:
    scheduler = build(SloPlanner(), max_num_batched_tokens=512, max_num_seqs=64, num_blocks=4000)
    clock = set_clock(scheduler)
    engine, told = Engine(scheduler), listen(scheduler)

    def step():
        clock.now += 0.01
        engine.step()

    for i in range(10):
        add(scheduler, f"live{i}", clock, prompt_tokens=16, max_tokens=30, args={"slo_ttft_ms": 500, "slo_tpot_ms": 50})
    for _ in range(5):
        step()
    add(scheduler, "waiting", clock, prompt_tokens=64, max_tokens=5, args={"slo_ttft_ms": 500, "slo_tpot_ms": 50})
    scheduler.set_pause_state(kind)
    assert scheduler.slo.mode_reason == "paused by the operator"
    add(scheduler, "during", clock, prompt_tokens=64, max_tokens=5, args={"slo_ttft_ms": 500, "slo_tpot_ms": 50})
    assert [(v["verdict"], v["reason"]) for v in told["verdicts"] if v["request_id"] == "during"] == [
        ("best-effort", "paused")
    ]
    if kind is PauseState.PAUSED_NEW:
        for _ in range(60):
            step()
        assert {end["request_id"] for end in told["finished"]} == {f"live{i}" for i in range(10)}
    clock.now += 30.0
    scheduler.set_pause_state(PauseState.UNPAUSED)
    while scheduler.has_unfinished_requests():
        step()
    assert {end["outcome"] for end in told["finished"]} == {"met"}
    assert len(told["finished"]) == 12
    assert all(end["promised"] for end in told["finished"])
    assert all(kept for kept, _ in scheduler.slo.safety._promises)
    assert not scheduler.slo.faults.counts


def test_hits_of_an_emptied_prefix_cache_are_looked_up_again(build) -> None:
    scheduler = build(SloPlanner(), max_num_seqs=1, prefix_caching=True)
    engine = Engine(scheduler)
    add(scheduler, "first", prompt_tokens=320, max_tokens=30, args=RELAXED, seed=1)
    for _ in range(5):
        engine.step()
    add(scheduler, "second", prompt_tokens=320, max_tokens=3, args=RELAXED, seed=1)
    engine.step()
    rows, tracker = scheduler.slo.tracker.table.rows, scheduler.slo.tracker
    index = tracker.table.index("second")
    assert rows["num_cached_tokens"][index] > 0
    tracker.hits.forget()
    assert rows["num_cached_tokens"][index] == 0
