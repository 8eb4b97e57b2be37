"""Everything else that vLLM can do goes on beside plans: on its own scheduler classes, with a mock model."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from slos_serve.core.baselines import tokens_needed
from slos_serve.core.types import BatchPlan, Plan, Status
from slos_serve.http import seal
from slos_serve.http.seal import sealed
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.stats import Listener
from slos_serve.vllm_plugin.testing import Engine, make_config, make_request, make_scheduler
from slos_serve.vllm_plugin.wire.channel import address, instance_name
from slos_serve.vllm_plugin.wire.control import ask

CHAT = {"slo_class": "chat"}
SLO = {"planner": "slos_serve.core.planner.SloPlanner", "always_plan": False}
CLASSES = [(SloScheduler, 1), (AsyncSloScheduler, 2)]


def mixed(i):
    return ({"slo_class": "chat"}, {"slo_class": "coding"}, None, {"slo_ttft_ms": 1, "slo_tpot_ms": 1})[i % 4]


def served(engine, count, max_tokens):
    slo = engine.scheduler.slo
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {f"r{i}": max_tokens for i in range(count)}
    assert not slo.faults.counts
    assert not slo.tracker.live
    assert not len(slo.tracker.table)
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == slo.limits.num_kv_blocks


@pytest.mark.parametrize(("cls", "depth"), CLASSES)
def test_more_adapters_than_fit_into_a_batch_wait_for_each_other(build, monkeypatch, cls, depth) -> None:
    class Lora:
        max_loras = 1

    scheduler = build(slo=SLO, cls=cls)
    monkeypatch.setattr(scheduler, "lora_config", Lora())
    engine = Engine(scheduler, depth=depth)
    adapters = [LoRARequest(f"a{i}", i + 1, "/nowhere") for i in range(3)]
    for i in range(12):
        request = make_request(f"r{i}", args=mixed(i), max_tokens=6)
        request.lora_request = adapters[i % 3]
        scheduler.add_request(request)
    ids = {f"r{i}": adapters[i % 3].lora_int_id for i in range(12)}
    engine.run()
    assert all(len({ids[name] for name in batch}) <= 1 for batch in engine.batches)
    served(engine, 12, 6)


class NewcomersAlone:
    """Plan whoever waits and nobody else, as a plan may whose promises fill the step."""

    def plan(self, state):
        rows = state.requests.rows
        waits = rows["status"] != int(Status.RUNNING)
        chosen = np.flatnonzero(waits if waits.any() else ~waits)
        ids = [state.requests.request_ids[i] for i in chosen]
        tokens, none = tokens_needed(rows)[chosen], np.zeros(len(ids), np.int64)
        return Plan(batch=BatchPlan(request_ids=ids, num_tokens=tokens, draft_lengths=none))


@pytest.mark.parametrize(("cls", "depth"), CLASSES)
def test_a_held_request_whose_adapter_leaves_no_room_for_the_planned_ones_goes_on(build, monkeypatch, cls, depth):
    class Lora:
        max_loras = 1

    scheduler = build(NewcomersAlone(), cls=cls)
    monkeypatch.setattr(scheduler, "lora_config", Lora())
    engine = Engine(scheduler, depth=depth)
    for i in range(2):
        request = make_request(f"r{i}", max_tokens=6)
        request.lora_request = LoRARequest(f"a{i}", i + 1, "/nowhere")
        scheduler.add_request(request)
        engine.step()
    assert engine.run(max_steps=100) > 0
    assert scheduler.slo.divergences["adapters"] > 0
    served(engine, 2, 6)


@pytest.mark.parametrize(("cls", "depth"), CLASSES)
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 2},
        {"prefix_caching": True},
        {"policy": "priority"},
        {"num_blocks": 40},
        {"max_num_batched_tokens": 32},
        {"speculative_tokens": 3},
    ],
    ids=str,
)
def test_every_setting_serves_every_request(build, cls, depth, options) -> None:
    scheduler = build(slo=SLO, cls=cls, **options)
    engine = Engine(scheduler, depth=depth)
    for i in range(24):
        request = make_request(f"r{i}", prompt_tokens=20 + 7 * i, args=mixed(i), max_tokens=9, seed=i % 5)
        scheduler.add_request(request)
    engine.run()
    served(engine, 24, 9)


def test_choices_of_one_prompt_are_promised_and_graded_one_by_one(build) -> None:
    scheduler = build(slo=SLO, prefix_caching=True)
    engine = Engine(scheduler)
    for i in range(3):  # as vLLM's front end splits n = 3
        scheduler.add_request(
            make_request(f"{i}_chatcmpl-x", args=sealed({**CHAT, "slo_id": "x"}), seed=1, prompt_tokens=100)
        )
    engine.run()
    assert scheduler.slo.promises.tally.classes["chat"].outcomes == {"met": 3}


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_an_end_that_the_model_chooses_is_an_end(build, ignore_eos) -> None:
    scheduler = build(slo=SLO)
    engine = Engine(scheduler)
    request = make_request("r", args=CHAT, max_tokens=20)
    request.sampling_params.ignore_eos = ignore_eos
    request.sampling_params._eos_token_id = None if ignore_eos else 7
    if not ignore_eos:
        request.sampling_params.stop_token_ids = [7]
        request.sampling_params._all_stop_token_ids = {7}
    request.sampling_params.logprobs = 3
    scheduler.add_request(request)
    engine.run()
    assert len(engine.outputs["r"]) == (20 if ignore_eos else 1)
    assert scheduler.slo.promises.tally.classes["chat"].outcomes == {"met": 1}


@pytest.mark.parametrize(("cls", "depth"), CLASSES)
def test_resetting_the_prefix_cache_with_requests_running_loses_none(build, cls, depth) -> None:
    scheduler = build(slo=SLO, cls=cls, prefix_caching=True)
    engine = Engine(scheduler, depth=depth)
    for i in range(8):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=60, args=mixed(i), max_tokens=12))
    for _ in range(6):
        engine.step()
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not scheduler.running
    engine.run()
    served(engine, 8, 12)


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_a_pause_holds_what_it_says_and_everything_goes_on_afterwards(build, state) -> None:
    scheduler = build(slo=SLO)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r0", args=CHAT, max_tokens=30))
    for _ in range(4):
        engine.step()
    scheduler.set_pause_state(state)
    scheduler.add_request(make_request("r1", args=CHAT, max_tokens=30))
    for _ in range(5):
        output = scheduler.schedule()
        assert output.num_scheduled_tokens == ({"r0": 1} if state is PauseState.PAUSED_NEW else {})
        scheduler.update_from_output(output, engine.execute(output))
    scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert set(engine.finished) == {"r0", "r1"}
    assert scheduler.slo.promises.tally.classes["chat"].outcomes.total() == 2


def test_without_chunked_prefill_the_engine_is_stock_and_says_so_once(tmp_path, perf, vllm_log) -> None:
    config = make_config(tmp_path, slo={"mode": "enforce"}, max_num_batched_tokens=2048)
    config.scheduler_config.enable_chunked_prefill = False
    scheduler = make_scheduler(tmp_path, cls=SloScheduler, config=config)
    try:
        lines = [line for line in vllm_log.messages if "only observes" in line]
        assert lines == ["SLO scheduler only observes: chunked prefill switched off cannot be steered"]
        engine = Engine(scheduler)
        for i in range(6):
            scheduler.add_request(make_request(f"r{i}", args=mixed(i), max_tokens=5))
        engine.run()
        served(engine, 6, 5)
        assert scheduler.slo.snapshot()["reason"] == "unsupported: chunked prefill switched off cannot be steered"
    finally:
        scheduler.shutdown()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: setattr(s.vllm_config.model_config, "runner_type", "pooling"), "pooling models"),
        (lambda s: setattr(s, "is_encoder_decoder", True), "encoder-decoder models"),
        (lambda s: setattr(s.parallel_config, "data_parallel_size", 2), "data-parallel engines in lock step"),
    ],
)
def test_what_cannot_be_steered_is_refused_in_words(tmp_path, change, words) -> None:
    scheduler = make_scheduler(tmp_path, cls=Scheduler)
    change(scheduler)
    assert view.unsupported(scheduler) == [words]


@pytest.mark.parametrize(("num_servers", "is_shared"), [(1, False), (2, True)])
def test_several_api_servers_of_one_start_find_the_engine_by_configurations_of_their_own(
    tmp_path, num_servers, is_shared
) -> None:
    seal.prepare()
    engine, server = (make_config(tmp_path) for _ in range(2))
    for config in (engine, server):
        config.parallel_config._api_process_count = num_servers
    assert engine.instance_id != server.instance_id
    assert (instance_name(engine) == instance_name(server)) == is_shared
    assert os.environ[seal.ENVIRONMENT] not in instance_name(engine)


def test_each_of_two_api_servers_hears_verdicts_and_can_ask_the_engine(tmp_path) -> None:
    def config(rank):
        made = make_config(tmp_path, slo={"mode": "enforce", "channel_dir": str(tmp_path / "s")})
        made.scheduler_config.scheduler_cls = "slos_serve.vllm_plugin.scheduler.SloScheduler"
        made.parallel_config._api_process_count, made.parallel_config._api_process_rank = 2, rank
        return made

    seal.prepare()
    scheduler = make_scheduler(tmp_path, cls=SloScheduler, config=config(-1))
    heard: list[list[dict]] = [[], []]
    where = [instance_name(config(rank)) for rank in range(2)]
    listeners = [
        Listener(address(name, 0, below=str(tmp_path / "s")), one.append)
        for name, one in zip(where, heard, strict=True)
    ]
    try:
        scheduler.add_request(make_request("r0", args={"slo_class": "chat"}, max_tokens=3))
        Engine(scheduler).run()
        for _ in range(1000):
            if all(heard):
                break
            scheduler.slo.outbox.heartbeat(0.0, at_once=True)
            time.sleep(0.01)
        assert all(messages[-1]["snapshot"]["steps"] > 0 for messages in heard)
        for name in where:
            answer = ask(address(name, 0, "control", str(tmp_path / "s")), {"mode": "observe"}, timeout_s=60)
            assert "error" not in answer
    finally:
        for listener in listeners:
            listener.close()
        scheduler.shutdown()


def test_an_engine_of_several_publishes_on_an_address_of_its_own(tmp_path, perf) -> None:
    config = make_config(tmp_path, slo={"mode": "enforce"})
    config.parallel_config.data_parallel_index = 3  # vLLM treats independent engines as one engine each
    scheduler = make_scheduler(tmp_path, cls=SloScheduler, config=config)
    try:
        assert scheduler.slo.standing.differences == []
        assert scheduler.slo.outbox.publisher.where == address(config.instance_id, 3)
        assert scheduler.slo.outbox._message(0.0)["engine"] == 3
    finally:
        scheduler.shutdown()


@pytest.mark.parametrize(("cls", "depth"), CLASSES)
def test_all_requests_aborted_at_once_leave_nothing_behind(build, cls, depth) -> None:
    scheduler = build(slo=SLO, cls=cls, max_num_seqs=4)
    engine = Engine(scheduler, depth=depth)
    for i in range(12):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=100, args=mixed(i), max_tokens=50))
    for _ in range(5):
        engine.step()
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.run()
    assert not scheduler.slo.tracker.live
    assert not scheduler.slo.faults.counts
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.slo.limits.num_kv_blocks
