"""The life of a request without a promise: it gets what is left, gives way, keeps its tokens, and ends."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.planning import ageing
from slos_serve.vllm_plugin.testing import Engine, make_request


class Virtual(Engine):
    """An engine on virtual time: a step takes what the performance model says; tracks who was preempted."""

    def __init__(self, scheduler, perf) -> None:
        super().__init__(scheduler)
        self.now = 1e9
        self.perf = perf
        self.preempted: list[str] = []
        scheduler.slo.clock._read = lambda: self.now
        scheduler.slo.clock._last = 0.0
        scheduler.slo.work_limit.spend = lambda *_: None
        learn, preempt = scheduler.slo._learn, scheduler._preempt_request
        scheduler.slo._learn = lambda entry, _, overhead, now: learn(entry, entry.predicted_s, 0.0, now)

        def note(request, *args, **kwargs):
            self.preempted.append(request.request_id)
            preempt(request, *args, **kwargs)

        scheduler._preempt_request = note

    def execute(self, output):
        result = super().execute(output)
        self.now += self.perf.seconds(max(1, output.total_num_scheduled_tokens), max(1, len(result.req_ids)))
        return result

    def arrive(self, name, **options):
        request = make_request(name, arrival_s=self.now, **options)
        self.scheduler.add_request(request)
        return request


CHAT = {"slo_ttft_ms": 400, "slo_tpot_ms": 100}


@pytest.fixture
def engine(build, perf, monkeypatch):
    def _engine(**options):
        slo = {"planner": "slos_serve.core.planner.SloPlanner", "always_plan": False, "safety": {"is_enabled": False}}
        scheduler = build(slo=slo, **options)
        monkeypatch.setattr(scheduler.slo.outbox, "flush", lambda *_args, **_kwargs: None)
        return Virtual(scheduler, perf)

    return _engine


def said(engine, name):
    verdicts = engine.scheduler.slo.outbox.verdicts
    return [(one["verdict"], one["reason"]) for one in verdicts if one["request_id"] == name]


def test_the_newest_gives_way_first_keeps_its_tokens_and_ends_with_all_of_them(engine) -> None:
    engine = engine(num_blocks=65, max_num_seqs=16, max_num_batched_tokens=512)
    works = [engine.arrive(f"work{i}", prompt_tokens=200, max_tokens=60) for i in range(4)]
    for _ in range(12):
        engine.step()
    produced = {work.request_id: work.num_output_tokens for work in works}
    assert min(produced.values()) > 0
    engine.arrive("chat", prompt_tokens=300, max_tokens=20, args=CHAT)
    engine.step()
    assert engine.preempted[:1] == ["work3"]
    assert "work0" not in engine.preempted
    assert works[3].num_output_tokens >= produced["work3"]
    engine.run()
    assert said(engine, "chat") == [("promised", "")]
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {
        **{f"work{i}": 60 for i in range(4)},
        "chat": 20,
    }
    tally = engine.scheduler.slo.promises.tally.classes
    assert tally["custom"].outcomes == {"met": 1}
    assert tally["best-effort"].outcomes == {"none": 4}
    # the others are vLLM's own, once no promise is left to plan for
    assert 0 < engine.scheduler.slo.snapshot()["best_effort_preemptions"] <= len(engine.preempted)


def test_work_ends_oldest_first_beside_a_stream_of_promises(engine) -> None:
    engine = engine(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=512)
    for i in range(6):
        engine.arrive(f"work{i}", prompt_tokens=150, max_tokens=120)
        engine.now += 1e-3
    rng = np.random.default_rng(0)
    num_chats, next_s = 0, engine.now
    ended: list[str] = []
    while len(ended) < 6:
        if engine.now >= next_s:
            engine.arrive(f"chat{num_chats}", prompt_tokens=300, max_tokens=20, args=CHAT)
            num_chats += 1
            next_s = engine.now + float(rng.exponential(0.08))
        engine.step()
        ended += [name for name in engine.finished if name.startswith("work") and name not in ended]
        assert num_chats < 500, f"starved: {ended}"
    assert num_chats >= 8
    assert ended[0] == "work0"
    tally = engine.scheduler.slo.promises.tally.classes["custom"]
    assert tally.num_kept == tally.num_promised > 4
    assert not engine.scheduler.slo.faults.counts


def test_the_oldest_work_ends_under_an_overload_that_never_does(engine, monkeypatch) -> None:
    monkeypatch.setattr(ageing, "STILL_S", 1.0)
    engine = engine(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=512)
    slo = engine.scheduler.slo
    for i in range(2):
        engine.arrive(f"work{i}", prompt_tokens=150, max_tokens=20)
    rng = np.random.default_rng(0)
    num_chats, next_s = 0, engine.now
    while "work0" not in engine.finished:
        while engine.now >= next_s:  # about twice what the engine could serve
            engine.arrive(f"chat{num_chats}", prompt_tokens=300, max_tokens=20, args=CHAT)
            num_chats += 1
            next_s += float(rng.exponential(0.01))
        engine.step()
        assert num_chats < 3000, f"starved: {engine.outputs.get('work0')}"
    tally = slo.promises.tally.classes["custom"]
    assert tally.num_kept == tally.num_promised > 50
    assert slo.promises.tally.classes["best-effort"].outcomes == {"none": 1}
    assert not slo.faults.counts


def test_who_is_refused_is_told_so_and_promoted_when_room_comes_in_time(engine) -> None:
    engine = engine(num_blocks=45, max_num_seqs=4, max_num_batched_tokens=512)
    engine.arrive("first", prompt_tokens=500, max_tokens=60, args={"slo_ttft_ms": 500, "slo_tpot_ms": 100})
    engine.step()
    engine.arrive("second", prompt_tokens=500, max_tokens=10, args={"slo_ttft_ms": 3000, "slo_tpot_ms": 100})
    engine.step()
    engine.abort("first")
    engine.run()
    history = said(engine, "second")
    assert history[-1][0] in {"promised", "promoted"}
    (ended,) = [one for one in engine.scheduler.slo.outbox.finished if one["request_id"] == "second"]
    assert (ended["outcome"], ended["promised"]) == ("met", True)


def test_a_demotion_shows_in_verdict_outcome_and_counts(engine) -> None:
    engine = engine(max_num_seqs=16, max_num_batched_tokens=512)
    for i in range(12):
        engine.arrive(f"r{i}", prompt_tokens=1500, max_tokens=5, args={"slo_ttft_ms": 300, "slo_tpot_ms": 50})
    engine.run()
    outcomes = {one["request_id"]: one["outcome"] for one in engine.scheduler.slo.outbox.finished}
    refused = {name for name in outcomes if ("best-effort", "compute") in said(engine, name)}
    assert refused
    assert {outcomes[name] for name in refused} == {"declined"}
    kept = set(outcomes) - refused
    assert kept
    assert {outcomes[name] for name in kept} == {"met"}
    assert all(engine.finished[name].stop_reason == "slo:best-effort:declined" for name in refused)
    assert engine.scheduler.slo.promises.tally.classes["custom"].outcomes == {
        "met": len(kept),
        "declined": len(refused),
    }
