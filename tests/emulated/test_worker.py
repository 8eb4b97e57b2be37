"""The worker under vLLM's own schedulers, no engine started: every token once, whatever is preempted or drafted."""

import json

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve import emulated
from slos_serve.core.perf import PerfModel
from slos_serve.core.types import BatchPlan, Plan
from slos_serve.emulated.config import EmulatedConfig
from slos_serve.emulated.worker import EmulatedWorker
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_config, make_request, make_scheduler, write_profile

HARDWARE = {
    "schema": "slos-serve-hardware/1",
    "name": "quick",
    "perf_model": {"lines": [{"per_token_s": 1e-9, "fixed_s": 1e-6}]},
    "kv_tokens": 4096,
    "max_model_len": 2048,
    "provenance": {},
}


class Emulated(Engine):
    """The engine core's loop with an emulated device, drafts included."""

    def __init__(self, scheduler, worker, **options):
        super().__init__(scheduler, **options)
        self.worker = worker
        self.num_accepted = self.num_drafted = 0

    def execute(self, output):
        empty = self.worker.execute_model(output)
        result = empty if empty is not None else self.worker.sample_tokens(None)
        return result.get_output() if hasattr(result, "get_output") else result

    def _take(self, output, result):
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            self.num_drafted += len(drafts)
            self.num_accepted += max(0, len(result.sampled_token_ids[result.req_id_to_index[request_id]]) - 1)
        super()._take(output, result)
        if self.depth == 1 and self.scheduler.num_spec_tokens:
            self.scheduler.update_draft_token_ids(self.worker.take_draft_token_ids())


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return an engine; `second` takes the paths of vLLM's second model runner."""
    (tmp_path / "quick.json").write_text(json.dumps(HARDWARE))

    def _make(*, is_async, second=False, num_blocks=1000, switches="", classes=(AsyncScheduler, Scheduler), **options):
        monkeypatch.setenv(emulated.VARIABLE, f"{tmp_path / 'quick.json'}{switches}")
        config = make_config(tmp_path, is_async=is_async, **options)
        if second:
            config.__class__ = EmulatedConfig
        worker = EmulatedWorker(config, 0, 0, "")
        cls = classes[0] if is_async else classes[1]
        scheduler = make_scheduler(tmp_path, cls=cls, config=config, num_blocks=num_blocks)
        assert scheduler.use_v2_model_runner is (second and not options.get("speculative_tokens"))
        return Emulated(scheduler, worker, depth=2 if is_async else 1)

    return _make


def run(engine, count=10, max_tokens=60):
    for number in range(count):
        engine.scheduler.add_request(make_request(f"r{number}", prompt_tokens=50 + 7 * number, max_tokens=max_tokens))
    engine.run()
    return engine.outputs


KINDS = [(is_async, second) for is_async in (True, False) for second in (True, False)]


@pytest.mark.parametrize(("is_async", "second"), KINDS)
def test_preempted_requests_say_what_they_would_have_said(make, is_async, second):
    roomy = run(make(is_async=is_async, second=second))
    engine = make(is_async=is_async, second=second, num_blocks=30)
    preempted = []
    stock = engine.scheduler._preempt_request
    engine.scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request), stock(request, *a, **k))[1]
    assert run(engine) == roomy
    assert preempted
    assert all(len(tokens) == 60 for tokens in roomy.values())


def test_every_kind_of_scheduling_gets_the_same_tokens(make):
    outputs = [run(make(is_async=is_async, second=second)) for is_async, second in KINDS]
    assert all(one == outputs[0] for one in outputs)


@pytest.mark.parametrize("is_async", [True, False])
def test_drafts_are_accepted_at_the_chance_that_is_given_and_change_no_token(make, is_async):
    plain = run(make(is_async=is_async), max_tokens=200)
    engine = make(is_async=is_async, speculative_tokens=3, switches=",acceptance=0.5")
    assert run(engine, max_tokens=200) == plain
    expected = (0.5 + 0.25 + 0.125) / 3
    assert engine.num_accepted / engine.num_drafted == pytest.approx(expected, rel=0.15)


class Holding:
    """Decodes get three drafts; every fifth step one of them is held."""

    def __init__(self):
        self.steps = 0

    def plan(self, state):
        rows, shares = state.requests.rows, []
        self.steps += 1
        for i, name in enumerate(state.requests.request_ids):
            left = int(rows["num_prompt_tokens"][i] + rows["num_output_tokens"][i] - rows["num_computed_tokens"][i])
            is_held = self.steps % 5 == 0 and i == self.steps // 5 % len(state.requests)
            if left > 0 and not is_held and rows["num_output_tokens"][i] < rows["max_output_tokens"][i]:
                shares.append((name, left, 3 if left == 1 and rows["num_output_tokens"][i] else 0))
        names, tokens, drafts = zip(*shares, strict=True) if shares else ((), (), ())
        counts = np.array(tokens, np.int64), np.array(drafts, np.int64)
        return Plan(batch=BatchPlan(request_ids=list(names), num_tokens=counts[0], draft_lengths=counts[1]))


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("acceptance", [0.3, 0.85])
def test_the_plug_in_reads_the_acceptance_that_the_device_is_given(make, tmp_path, acceptance, is_async):
    profile = write_profile(tmp_path / "profile.json", PerfModel.from_json(HARDWARE["perf_model"]))
    slo = {"mode": "enforce", "profile": str(profile), "always_plan": True, "safety": {"is_enabled": False}}
    engine = make(
        is_async=is_async,
        speculative_tokens=3,
        switches=f",acceptance={acceptance}",
        classes=(AsyncSloScheduler, SloScheduler),
        slo={**slo, "state": False, "fault_dir": str(tmp_path / "faults")},
    )
    scheduler = engine.scheduler
    scheduler.slo.learner.poll()
    scheduler.slo.planner = Holding()
    for number in range(8):
        args = {"slo_class": "chat" if number % 2 else "coding"}
        scheduler.add_request(make_request(f"r{number}", prompt_tokens=40 + number, max_tokens=400, args=args))
    engine.run()
    found = scheduler.slo.drafts.acceptance
    scheduler.shutdown()
    assert not scheduler.slo.faults.counts
    assert set(found) == {"chat", "coding"}
    for name, value in found.items():
        assert value == pytest.approx(acceptance, abs=0.06), name


def test_what_a_batch_computes_is_counted_as_the_plug_in_counts_it(make):
    engine = make(is_async=False, max_num_batched_tokens=64)
    batches = []
    submit = engine.worker._device.submit
    engine.worker._device.submit = lambda batch, now: (batches.append(batch), submit(batch, now))[1]
    engine.scheduler.add_request(make_request("a", prompt_tokens=100, max_tokens=3))
    engine.run()
    assert [batch.num_tokens for batch in batches] == [64, 36, 1, 1]
    assert [batch.attention_pairs for batch in batches] == [64 * 32, 36 * (64 + 18), 0, 0]
    assert [batch.context_tokens for batch in batches] == [0, 0, 100, 101]
    assert {batch.num_requests for batch in batches} == {1}


def test_the_log_holds_every_batch_in_order(make, tmp_path):
    engine = make(is_async=True, switches=f",log={tmp_path / 'batches.jsonl'}")
    run(engine, count=3, max_tokens=5)
    engine.worker.shutdown()
    rows = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    assert len(rows) == sum(1 for batch in engine.batches if batch)
    assert all(handed <= start < end for handed, start, end, *_ in rows)
    assert sum(row[3] for row in rows) == sum(sum(batch.values()) for batch in engine.batches)
