"""`ttl_ms` bounds the wait in the queue, and nothing else."""

from __future__ import annotations

import pytest
from vllm.v1.engine import FinishReason

from slos_serve.config import SloClass, SloConfig
from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.types import Plan, Tier, Verdict
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request

CLASSES = {
    **SloConfig().classes,
    "best-effort": SloClass(name="best-effort", ttl_ms=1000),
    "batch": SloClass(name="batch", ttft_ms=1e6, ttl_ms=1000),
}
SLO = {"config": SloConfig(classes=CLASSES).to_json()}


class Says:
    """VLLM's batches, and one answer to all that are pending."""

    def __init__(self, promised: bool) -> None:
        self.promised = promised

    def plan(self, state):
        rows, ids = state.requests.rows, state.requests.request_ids
        pending = [ids[i] for i, tier in enumerate(rows["tier"].tolist()) if tier == Tier.PENDING]
        verdicts = tuple(Verdict(request_id=i, promised=self.promised, reason="compute") for i in pending)
        return Plan(batch=VllmPlanner().plan(state).batch, verdicts=verdicts)


@pytest.fixture
def serve(build):
    """Serve one long request on the only seat, so that all others wait; `later` seconds pass then."""

    def _serve(*waiting, promised=False, cls=SloScheduler, depth=1, **slo):
        scheduler = build(Says(promised), slo={**SLO, **slo}, cls=cls, max_num_seqs=1)
        engine = Engine(scheduler, depth=depth)
        now = [1e9]
        scheduler.slo.clock._read = lambda: now[0]
        scheduler.slo.clock._last = 0.0
        scheduler.add_request(make_request("runs", max_tokens=40, arrival_s=now[0]))
        for _ in range(4):
            engine.step()
        for name, args in waiting:
            scheduler.add_request(make_request(name, max_tokens=4, args=args, arrival_s=now[0]))
        engine.step()
        now[0] += 0.9
        for _ in range(3):
            engine.step()
        assert not engine.finished
        now[0] += 0.2
        for _ in range(3):
            engine.step()
        return scheduler, engine

    return _serve


@pytest.mark.parametrize(("cls", "depth"), [(SloScheduler, 1), (AsyncSloScheduler, 2)])
def test_a_best_effort_request_that_waits_too_long_is_ended_with_a_clear_outcome(serve, cls, depth) -> None:
    scheduler, engine = serve(("waits", None), ("batch", {"slo_class": "batch"}), cls=cls, depth=depth)
    assert set(engine.finished) == {"waits", "batch"}
    for name in ("waits", "batch"):
        last = engine.finished[name]
        assert (last.finish_reason, last.stop_reason) == (FinishReason.ABORT, "slo:best-effort:rejected")
        assert engine.outputs[name] == []
    tally = scheduler.slo.promises.tally.classes
    assert tally["best-effort"].outcomes == tally["batch"].outcomes == {"rejected": 1}
    assert scheduler.slo.snapshot()["expired"] == 2
    engine.run()
    assert len(engine.outputs["runs"]) == 40
    assert not scheduler.slo.tracker.live
    assert not scheduler.slo.faults.counts
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.slo.limits.num_kv_blocks


def test_a_request_that_was_promised_something_does_not_expire(serve) -> None:
    _, engine = serve(("batch", {"slo_class": "batch"}), promised=True)
    engine.run()
    assert len(engine.outputs["batch"]) == 4


def test_a_class_without_a_bound_waits_as_long_as_it_takes(serve) -> None:
    _, engine = serve(("chat", {"slo_class": "chat"}))
    engine.run()
    assert len(engine.outputs["chat"]) == 4


def test_observing_ends_nobodys_wait(serve) -> None:
    scheduler, engine = serve(("waits", None), mode="observe")
    engine.run()
    assert len(engine.outputs["waits"]) == 4
    assert scheduler.slo.snapshot()["expired"] == 0


def test_a_request_that_has_begun_runs_to_its_end_even_where_it_was_preempted(build) -> None:
    scheduler = build(Says(promised=False), slo=SLO)
    engine = Engine(scheduler)
    now = [1e9]
    scheduler.slo.clock._read = lambda: now[0]
    scheduler.slo.clock._last = 0.0
    begun = make_request("begun", max_tokens=10, arrival_s=now[0])
    scheduler.add_request(begun)
    for _ in range(3):
        engine.step()
    scheduler.running.remove(begun)
    scheduler._preempt_request(begun, 0.0)
    now[0] += 5
    engine.run()
    assert len(engine.outputs["begun"]) == 10


def test_ended_requests_do_not_stay_in_memory_until_their_wait_would_be_over() -> None:
    from types import SimpleNamespace

    from slos_serve.vllm_plugin.engine.expiry import SPARE, Expiry

    expiry = Expiry()
    for i in range(1000):
        live = SimpleNamespace(arrival_s=0.0, request_id=f"r{i}", was_promised=False, has_begun=False)
        expiry.add(live, 1e9)
        assert expiry.take(1.0, {live.request_id: live}, enforcing=bool(i % 2)) == []
        assert len(expiry._heap) <= SPARE + 3
