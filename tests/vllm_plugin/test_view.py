"""A vLLM that differs from the one this plug-in was written for is noticed, not steered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve.core.baselines import VllmPlanner
from slos_serve.vllm_plugin import runtime
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.shape import Shapes
from slos_serve.vllm_plugin.testing import Engine, make_request


class WiderHook(Scheduler):
    def _reserve_prefill_lookahead(self, request, num_computed_tokens, num_new_tokens, extra):
        return num_new_tokens


class ThirdQueue(Scheduler):
    def __init__(self, policy):
        self.policy = policy
        self.waiting = create_request_queue(self.policy)
        self.skipped_waiting = create_request_queue(self.policy)
        self.kv_holding_waiting = create_request_queue(self.policy)


class OneCall(Scheduler):
    def schedule(self, throttle_prefills=False):
        num_new_tokens = self._reserve_prefill_lookahead(None, 0, 0)
        return [num_new_tokens]


class OwnAsyncSchedule(AsyncScheduler):
    def schedule(self, throttle_prefills=False):
        return super().schedule(throttle_prefills)


class NoHook:
    pass


def test_the_installed_vllm_is_the_one_this_was_written_for() -> None:
    assert view.probe() == []


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (WiderHook, "takes"),
        (ThirdQueue, "keeps waiting requests in ['kv_holding_waiting', 'skipped_waiting', 'waiting']"),
        (OneCall, "1 times"),
        (NoHook, "missing"),
    ],
)
def test_each_difference_is_one_sentence(cls, words) -> None:
    assert any(words in sentence for sentence in view.probe(cls))


class RenamedEverything(Scheduler):
    _reserve_prefill_lookahead = None

    def __init__(self, policy):
        self.waiting = create_request_queue(policy)

    def _free_request(self, request):
        raise NotImplementedError

    def _preempt_request(self, request):
        raise NotImplementedError


def test_all_differences_are_told_at_once_so_that_none_hides_behind_another() -> None:
    sentences = " ".join(view.probe(RenamedEverything, OwnAsyncSchedule))
    for words in (
        "Scheduler._reserve_prefill_lookahead",
        "Scheduler._free_request takes",
        "Scheduler._preempt_request takes",
        "keeps waiting requests in ['waiting']",
        "Scheduler.kv_cache_manager is missing",
        "AsyncScheduler has",
    ):
        assert words in sentences


def test_an_async_scheduler_with_an_order_of_its_own_is_a_difference() -> None:
    assert view.probe(Scheduler, OwnAsyncSchedule) == ["AsyncScheduler has a schedule() of its own"]


def test_a_difference_means_observing_with_one_clear_message(build, monkeypatch, vllm_log) -> None:
    monkeypatch.setattr(runtime.view, "probe", lambda: ["the hook is gone"])
    scheduler = build(VllmPlanner())
    assert [line for line in vllm_log.messages if "only observes" in line] == [
        "SLO scheduler only observes: the hook is gone"
    ]
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_class": "chat"}))
    engine.run()
    snapshot = scheduler.slo.snapshot()
    assert (snapshot["mode"], snapshot["effective_mode"]) == ("enforce", "observe")
    assert snapshot["reason"] == "unsupported: the hook is gone"
    assert engine.finished["r"].stop_reason == "slo:observe:met"


def test_what_this_engine_cannot_be_steered_in_is_named(build) -> None:
    scheduler = build(VllmPlanner())
    assert view.unsupported(scheduler) == []
    scheduler.need_mamba_block_aligned_split = True
    scheduler.num_prefill_lookahead = 3
    scheduler.connector = object()
    found = view.unsupported(scheduler)
    scheduler.connector = None
    assert found == ["Mamba state aligned to blocks", "multi-module MTP", "a KV connector"]


def test_what_newer_vllms_cannot_be_steered_in_is_named_too(build) -> None:
    scheduler = build(VllmPlanner())
    scheduler.prefix_replay_tokens = 16
    scheduler.aux_output_connector = SimpleNamespace(max_cache_hit=lambda request: 0)
    found = view.unsupported(scheduler)
    scheduler.aux_output_connector = None
    assert found == ["prefix hits that are computed again", "prefix hits cut to auxiliary outputs"]


@pytest.mark.parametrize("seats", [3, 40])
def test_no_plan_counts_on_more_seats_than_vllm_admits_to(build, seats) -> None:
    scheduler = build(VllmPlanner(), max_num_seqs=16)
    scheduler.max_num_active_reqs = seats
    assert view.limits(scheduler, guard_s=0.0, work_limit=1).max_num_seqs == min(seats, 16)


def test_a_step_that_skips_its_drafts_counts_none(build) -> None:
    scheduler = build(VllmPlanner(), speculative_tokens=3)
    scheduler.add_request(make_request("r"))
    output = scheduler.schedule()
    output.num_spec_tokens_to_schedule = 3
    output.skip_drafts = False
    assert Shapes(scheduler).of(output).draft_steps == 3
    output.skip_drafts = True
    assert Shapes(scheduler).of(output).draft_steps == 0


def test_free_blocks_match_what_requests_are_thought_to_hold(build) -> None:
    scheduler = build(VllmPlanner(), num_blocks=200)
    engine = Engine(scheduler)
    for i in range(6):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=17 * (i + 1), max_tokens=40))
    for _ in range(12):
        engine.step()
        scheduler.slo.tracker.sync(scheduler.slo.clock.now())
        held = int(scheduler.slo.tracker.table.rows["num_kv_blocks"].sum())
        assert held + view.free_units(scheduler, 1) == scheduler.slo.limits.num_kv_blocks


def test_the_end_of_thinking_is_found_by_given_ids_only_without_a_tokenizer(build) -> None:
    scheduler = build(VllmPlanner())
    assert view.thinking_end(scheduler, "</think>") == frozenset()
    assert view.thinking_end(scheduler, (9, 11)) == {9, 11}


def test_a_scheduler_without_the_queue_of_what_was_skipped_is_observed_all_the_same() -> None:
    newer = SimpleNamespace(waiting=[], running=[])
    assert view.waiting_queues(newer) == ((), [])
    assert not view.promote(newer, make_request("r", prompt_tokens=4, max_tokens=1))
