"""Requests that the planner does not understand are never stalled."""

from __future__ import annotations

import numpy as np
import pytest
from vllm.v1.request import RequestStatus

from slos_serve.core.baselines import EdfPlanner, VllmPlanner
from slos_serve.core.types import BatchPlan, Plan
from slos_serve.vllm_plugin.testing import Engine, make_request


class Full:
    """Plan every row, as much as it wants, so that nothing is left for others."""

    def plan(self, state):
        return VllmPlanner().plan(state)


def compile_grammar(request) -> None:
    class Grammar:
        def accept_tokens(self, *_args):
            return True

        def is_terminated(self):
            return False

        def fill_bitmask(self, *_args):
            return None

    request.structured_output_request.grammar = Grammar()


def test_a_request_that_waits_for_its_grammar_blocks_nobody_and_runs_once_it_is_ready(build, monkeypatch) -> None:
    scheduler = build(EdfPlanner())
    manager = scheduler.structured_output_manager
    if hasattr(manager, "should_advance"):
        monkeypatch.setattr(manager, "should_advance", lambda *_a, **_k: False)
    else:
        monkeypatch.setattr(manager, "accept_tokens", lambda *_a, **_k: True)
    engine = Engine(scheduler)
    blocked = make_request("json", grammar=True, args={"slo_class": "chat"})
    scheduler.add_request(blocked)
    for i in range(3):
        scheduler.add_request(make_request(f"r{i}", max_tokens=4))
    for _ in range(8):
        engine.step()
    assert set(engine.finished) == {"r0", "r1", "r2"}
    assert blocked.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    assert "json" not in scheduler.slo.tracker.table
    compile_grammar(blocked)
    engine.step()
    assert "json" in scheduler.slo.tracker.table
    engine.run()
    assert "json" in engine.finished
    assert not scheduler.slo.faults.counts
    assert not scheduler.slo.divergences


def test_a_grammar_that_cannot_be_compiled_fails_its_request_alone(build) -> None:
    scheduler = build(EdfPlanner())
    engine = Engine(scheduler)
    broken = make_request("json", grammar=True, args={"slo_class": "chat"})
    scheduler.add_request(broken)
    scheduler.add_request(make_request("r", max_tokens=4))
    broken.structured_output_request.grammar = ValueError("no such schema")
    engine.run()
    assert engine.finished["json"].finish_reason.name == "ERROR"
    assert scheduler.slo.promises.tally.classes["chat"].outcomes == {"failed": 1}
    assert not scheduler.slo.tracker.live
    assert not scheduler.slo.faults.counts


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_requests_with_rules_of_their_own_run_beside_full_plans(build, monkeypatch, policy) -> None:
    from slos_serve.vllm_plugin.engine import view

    plain = view.follows_stock_rules
    monkeypatch.setattr(view, "follows_stock_rules", lambda r: r.request_id.startswith("image") or plain(r))
    scheduler = build(Full(), policy=policy, max_num_batched_tokens=64)
    engine = Engine(scheduler)
    for i in range(20):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=100, max_tokens=10))
        if i % 5 == 0:
            scheduler.add_request(
                make_request(f"image{i}", prompt_tokens=100, max_tokens=10, args={"slo_class": "chat"})
            )
    engine.run()
    assert len(engine.finished) == 24
    assert scheduler.slo.promises.tally.classes["chat"].outcomes.total() == 4
    assert not scheduler.slo.faults.counts
    assert not scheduler.slo.tracker.stock


def test_streamed_input_keeps_working_beside_plans(build) -> None:
    scheduler = build(Full())
    engine = Engine(scheduler)
    session = make_request("session", max_tokens=3)
    session.resumable = True
    scheduler.add_request(session)
    scheduler.add_request(make_request("r", max_tokens=30))
    for _ in range(6):
        engine.step()
    assert session.status is RequestStatus.WAITING_FOR_STREAMING_REQ
    more = make_request("session", max_tokens=3)
    more.resumable = True
    scheduler.add_request(more)
    for _ in range(6):
        engine.step()
    assert session.status is RequestStatus.WAITING_FOR_STREAMING_REQ
    last = make_request("session", max_tokens=3)
    scheduler.add_request(last)
    engine.run()
    assert "r" in engine.finished
    assert not scheduler.slo.faults.counts
    assert not scheduler.slo.tracker.live


def test_a_request_set_aside_by_vllm_itself_is_kept_where_vllm_puts_it(build, monkeypatch) -> None:
    class LatestFirst:
        def plan(self, state):
            ids = state.requests.request_ids[::-1]
            count = len(ids)
            return Plan(
                batch=BatchPlan(request_ids=ids, num_tokens=np.full(count, 8), draft_lengths=np.zeros(count, np.int64))
            )

    scheduler = build(LatestFirst())
    for i in range(4):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=8))
    scheduler.requests["r2"].num_stale_output_tokens = 1  # its output is still in flight
    output = scheduler.schedule()
    assert list(output.num_scheduled_tokens) == ["r3", "r1", "r0"]
    if hasattr(scheduler, "skipped_waiting"):
        assert [r.request_id for r in scheduler.skipped_waiting] == ["r2"]
        assert not scheduler.waiting
    else:
        assert [r.request_id for r in scheduler.waiting] == ["r2"]
        assert {r.request_id for r in scheduler.deferred_waiting} == {"r2"}
        assert not scheduler.kv_holding_waiting
    scheduler.requests["r2"].num_stale_output_tokens = 0
    assert "r2" in scheduler.schedule().num_scheduled_tokens


def test_paused_engines_stay_paused(build) -> None:
    from vllm.v1.core.sched.interface import PauseState

    scheduler = build(Full())
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r"))
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(10):
        assert scheduler.schedule().num_scheduled_tokens == {}
    scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert "r" in engine.finished
