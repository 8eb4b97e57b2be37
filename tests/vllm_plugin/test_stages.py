"""Stages of a request: thinking and answering each have a pace; a tool round is a request of its own."""

from __future__ import annotations

import math

import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.types import Plan, Tier, Verdict
from slos_serve.vllm_plugin.testing import TOKEN, Engine, make_request

END = 9
SLO = {"thinking_end": [END], "always_plan": False}


class Promises:
    """VLLM's batches, a promise for everyone; keeps the columns it saw first of each request."""

    def __init__(self) -> None:
        self.cached_when_promised: dict[str, int] = {}

    def plan(self, state):
        rows, ids = state.requests.rows, state.requests.request_ids
        pending = [i for i, tier in enumerate(rows["tier"].tolist()) if tier == Tier.PENDING]
        self.cached_when_promised |= {ids[i]: int(rows["num_cached_tokens"][i]) for i in pending}
        verdicts = tuple(Verdict(request_id=ids[i], promised=True) for i in pending)
        return Plan(batch=VllmPlanner().plan(state).batch, verdicts=verdicts)


class Thinker(Engine):
    """Samples `chunks` tokens at a time and the end-of-thinking token as number `end_at`; a step takes `step_s`."""

    def __init__(self, scheduler, *, end_at: int, drafts: int = 0) -> None:
        super().__init__(scheduler, accept=(lambda _request, count: min(count, drafts)) if drafts else None)
        self.end_at = end_at
        self.now = 1e9
        self.step_s = 0.02
        scheduler.slo.clock._read = lambda: self.now
        scheduler.slo.clock._last = 0.0
        scheduler.slo.tracker.thinking_end = frozenset({END})  # found by a thread otherwise

    def execute(self, output):
        result = super().execute(output)
        for name, sampled in zip(result.req_ids, result.sampled_token_ids, strict=True):
            done = self.scheduler.requests[name].num_output_tokens
            sampled[:] = [END if done + n == self.end_at else TOKEN for n in range(1, len(sampled) + 1)]
        self.now += self.step_s
        return result

    def think(self, name, **args):
        request = make_request(name, max_tokens=40, args={"slo_ttft_ms": 1000, **args}, arrival_s=self.now)
        self.scheduler.add_request(request)
        return request


def row(scheduler, name):
    table = scheduler.slo.tracker.table
    return table.rows[table.index(name)]


def stages(scheduler):
    return scheduler.slo.outbox.finished[-1]["stages"]


@pytest.fixture
def thinker(build, monkeypatch):
    def _thinker(**options):
        speculative = 4 if options.get("drafts") else 0
        scheduler = build(Promises(), slo=SLO, speculative_tokens=speculative)
        monkeypatch.setattr(scheduler.slo.outbox, "flush", lambda *_args, **_kwargs: None)  # keep what is said
        return Thinker(scheduler, **options)

    return _thinker


PACES = {"slo_thinking_tpot_ms": 50, "slo_tpot_ms": 100}


def test_the_pace_changes_from_the_token_that_ends_thinking_on(thinker) -> None:
    from slos_serve.core.slo.next_due import pace_s

    engine = thinker(end_at=5)
    engine.think("r", **PACES)
    for _ in range(4):
        engine.step()
    assert (row(engine.scheduler, "r")["is_thinking"], row(engine.scheduler, "r")["num_thinking_tokens"]) == (1, 4)
    assert pace_s(engine.scheduler.slo.tracker.table.rows).tolist() == [0.05]
    for _ in range(3):
        engine.step()
    assert (row(engine.scheduler, "r")["is_thinking"], row(engine.scheduler, "r")["num_thinking_tokens"]) == (0, 5)
    assert pace_s(engine.scheduler.slo.tracker.table.rows).tolist() == [0.1]
    engine.run()
    assert stages(engine.scheduler) == {"prefill": "met", "thinking": "met", "answer": "met"}


@pytest.mark.parametrize(("end_at", "thinking", "answer"), [(2, "met", "met"), (99, "missed", "")])
def test_what_is_fast_enough_for_an_answer_can_be_too_slow_for_thinking(thinker, end_at, thinking, answer) -> None:
    engine = thinker(end_at=end_at)
    engine.step_s = 0.08
    engine.think("r", **{**PACES, "slo_ttft_ms": 100})
    engine.run()
    assert stages(engine.scheduler) == {"prefill": "met", "thinking": thinking, "answer": answer}


def test_a_slow_answer_is_not_charged_to_the_thinking_before_it(thinker) -> None:
    engine = thinker(end_at=15)
    engine.think("r", **PACES)
    for _ in range(16):
        engine.step()
    engine.step_s = 0.3
    engine.run()
    assert stages(engine.scheduler) == {"prefill": "met", "thinking": "met", "answer": "missed"}


def test_an_end_of_thinking_inside_a_burst_of_accepted_drafts_splits_the_burst(thinker) -> None:
    engine = thinker(end_at=6, drafts=4)
    request = engine.think("r", **PACES)
    while engine.scheduler.requests and request.num_output_tokens < 8:
        request.spec_token_ids = [TOKEN] * 4 if request.num_output_tokens else []
        engine.step()
    live = engine.scheduler.slo.tracker.live["r"]
    assert request.num_output_tokens > live.num_thinking_tokens == 6
    assert not live.is_thinking


def test_a_preempted_thinker_goes_on_thinking(thinker) -> None:
    engine = thinker(end_at=8)
    request = engine.think("r", **PACES)
    for _ in range(4):
        engine.step()
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    engine.run()
    assert engine.outputs["r"].count(END) == 1
    assert stages(engine.scheduler)["thinking"] == "met"


def test_without_a_thinking_promise_the_mark_means_nothing(thinker) -> None:
    engine = thinker(end_at=3)
    engine.think("r", slo_tpot_ms=100)
    engine.run()
    assert stages(engine.scheduler) == {"prefill": "met", "thinking": "", "answer": "met"}


def test_rounds_of_a_tool_conversation_have_the_pace_of_their_stage(thinker) -> None:
    engine = thinker(end_at=99)
    args = {"slo_class": "tool"}
    for stage in ("loop", "final", None):
        name = str(stage)
        request = make_request(name, args=args | ({"slo_stage": stage} if stage else {}), arrival_s=engine.now)
        request.session_id = "trip"
        engine.scheduler.add_request(request)
    engine.step()
    assert row(engine.scheduler, "loop")["tpot_s"] == 0.05
    assert row(engine.scheduler, "final")["tpot_s"] == 0.1
    assert row(engine.scheduler, "None")["tpot_s"] == 0.05
    engine.run()
    ended = engine.scheduler.slo.outbox.finished
    assert [one["session"] for one in ended] == ["trip"] * 3
    assert all(one["stages"]["answer"] == "met" for one in ended)


def test_what_a_session_left_in_the_prefix_cache_is_known_before_its_next_round_is_promised(build) -> None:
    planner = Promises()
    scheduler = build(planner, slo=SLO, prefix_caching=True, max_num_batched_tokens=2048, max_num_seqs=64)
    engine = Engine(scheduler)
    firsts = [make_request(f"first{i}", prompt_tokens=200, max_tokens=8, args={"slo_class": "tool"}) for i in range(24)]
    for first in firsts:
        scheduler.add_request(first)
    engine.run()
    for i, first in enumerate(firsts):
        later = make_request(f"second{i}", prompt_tokens=300, max_tokens=8, args={"slo_class": "tool"})
        later.prompt_token_ids[:200] = first.prompt_token_ids
        later._all_token_ids[:200] = first.prompt_token_ids
        later.block_hashes.clear()
        later.update_block_hashes()
        scheduler.add_request(later)
    engine.step()
    known = [planner.cached_when_promised[f"second{i}"] for i in range(24)]
    assert known == [192] * 24  # whole blocks of 16
    assert not scheduler.slo.faults.counts
    assert not scheduler.slo.divergences
    engine.run()


def test_nothing_is_owed_by_a_stage_that_was_never_reached(thinker) -> None:
    engine = thinker(end_at=99)
    engine.think("r", **PACES)
    engine.step()
    engine.abort("r")
    (ended,) = engine.scheduler.slo.outbox.finished
    assert ended["outcome"] == "cancelled"
    assert math.isfinite(ended["ttft_ms"])
