"""Steering ends for harm, not for cost: what counts is how long the device waits for us."""

from __future__ import annotations

import gc
import json

import pytest
from vllm.v1.core.sched.interface import PauseState

from slos_serve.core.baselines import VllmPlanner
from slos_serve.lines import LineFile
from slos_serve.vllm_plugin import pipeline as pipeline_module
from slos_serve.vllm_plugin import runtime
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.pipeline import Pipeline
from slos_serve.vllm_plugin.safety import cost as cost_module
from slos_serve.vllm_plugin.safety import work_limit as effort
from slos_serve.vllm_plugin.safety.rules import SafetyLimits, StepDown
from slos_serve.vllm_plugin.safety.stalls import Spent, Stalls
from slos_serve.vllm_plugin.safety.work_limit import WorkLimit
from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request

STEP_S = 4.2e-3  # of three decodes
SAFETY = {"is_enabled": True, "hold_s": 2.0}


class Machine:
    """One core on a virtual clock: our code takes `cpu_s` of it at every plan, and `wall_s` passes meanwhile."""

    def __init__(self) -> None:
        self.now = self.free_at = 1.7e9
        self.cpu = self.others_s = 0.0
        self.cpu_s = self.wall_s = 0.0
        self.slowdown = 1.0
        self.ends: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.cpu

    def spend(self) -> None:
        self.cpu += self.cpu_s
        self.now += max(self.wall_s, self.cpu_s)
        self.others_s += max(self.wall_s - self.cpu_s, 0.0)


class Spending:
    """VLLM's batches, at a price."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def plan(self, state):
        self.machine.spend()
        return VllmPlanner().plan(state)


class Timed(Engine):
    def __init__(self, scheduler, machine: Machine, perf) -> None:
        self.perf = perf
        super().__init__(scheduler, depth=2 if isinstance(scheduler, AsyncSloScheduler) else 1)
        self.machine = machine
        self.num_made = 0

    def execute(self, output):
        machine = self.machine
        count = len(output.num_scheduled_tokens)
        step_s = machine.slowdown * self.perf.seconds(output.total_num_scheduled_tokens, count) if count else 0.0
        machine.free_at = max(machine.now, machine.free_at) + step_s
        machine.ends.append(machine.free_at)
        return super().execute(output)

    def _take(self, output, result):
        self.machine.now = max(self.machine.now, self.machine.ends.pop(0)) + 1e-6
        super()._take(output, result)

    def serve(self, steps, until=lambda: False) -> bool:
        for _ in range(steps):
            while len(self.scheduler.requests) < 3:
                self.num_made += 1
                args = {"slo_ttft_ms": 60_000, "slo_tpot_ms": 1000}
                name = f"r{self.num_made}"
                request = make_request(name, max_tokens=400, args=args, arrival_s=self.machine.now)
                self.scheduler.add_request(request)
            self.step()
            if until():
                return True
        return False


@pytest.fixture
def serving(build, monkeypatch, perf):
    """Return an engine whose every step plans anew, on a machine with a clock of its own."""

    def _serving(cls) -> Timed:
        scheduler = build(cls=cls, slo={"safety": SAFETY, "planner": "slos_serve.core.baselines.VllmPlanner"})
        machine = Machine()
        for module in (runtime, pipeline_module):
            monkeypatch.setattr(module, "time", machine)
        monkeypatch.setattr(cost_module, "thread_time", machine.thread_time)
        slo = scheduler.slo
        slo.clock._read, slo.clock._last = (lambda: machine.now), machine.now
        slo.planner = Spending(machine)
        slo._cpu_wait.read_s = lambda: 0.0  # what waits here is the test
        return Timed(scheduler, machine, perf)

    return _serving


def test_under_async_scheduling_what_a_batch_in_flight_covers_harms_nobody(serving) -> None:
    engine = serving(AsyncSloScheduler)
    engine.machine.cpu_s = 0.9 * STEP_S
    assert not engine.serve(1500, lambda: engine.scheduler.slo.safety.is_down)
    assert engine.scheduler.slo.safety.time_share < 0.01
    assert engine.scheduler.slo.effective_mode == "enforce"


def test_under_async_scheduling_what_exceeds_the_batch_in_flight_steps_down_and_up_again(serving) -> None:
    engine = serving(AsyncSloScheduler)
    safety = engine.scheduler.slo.safety
    engine.machine.cpu_s = 1.2 * STEP_S
    assert engine.serve(400, lambda: safety.is_down)
    assert safety.reason.startswith("planning takes")
    assert "device's time" in safety.reason
    engine.machine.cpu_s = 0.0
    assert engine.serve(1000, lambda: not safety.is_down)
    assert engine.scheduler.slo.effective_mode == "enforce"


def test_under_sync_scheduling_every_part_of_it_delays_the_device(serving) -> None:
    engine = serving(SloScheduler)
    engine.machine.cpu_s = 0.08 * STEP_S
    assert engine.serve(400, lambda: engine.scheduler.slo.safety.is_down)
    assert "planning takes 7." in engine.scheduler.slo.safety.reason  # the steps are longer by it


def test_while_it_is_too_dear_nobody_plans_beside(serving) -> None:
    engine = serving(SloScheduler)
    slo = engine.scheduler.slo
    engine.machine.cpu_s = 0.5 * STEP_S
    assert engine.serve(400, lambda: slo.safety.is_down)
    before = slo.num_plans
    engine.serve(50)
    assert slo.num_plans == before


@pytest.mark.parametrize(("ours", "is_too_dear"), [(0.9, False), (1.4, True)])
def test_what_others_had_the_cpus_for_is_no_delay_of_ours(serving, ours, is_too_dear) -> None:
    engine = serving(AsyncSloScheduler)
    slo, machine = engine.scheduler.slo, engine.machine
    slo._cpu_wait.read_s = lambda: machine.others_s
    machine.cpu_s, machine.wall_s = ours * STEP_S, 1.5 * STEP_S
    assert engine.serve(400, lambda: slo.safety.is_down) == is_too_dear
    assert is_too_dear or slo.safety.time_share < 0.01


@pytest.mark.parametrize("cls", [SloScheduler, AsyncSloScheduler])
def test_a_machine_that_is_merely_busy_is_no_reason(serving, cls) -> None:
    engine = serving(cls)
    engine.machine.cpu_s, engine.machine.wall_s = 0.02 * STEP_S, 0.2 * STEP_S
    assert not engine.serve(1000, lambda: engine.scheduler.slo.safety.is_down)


@pytest.mark.parametrize("cls", [SloScheduler, AsyncSloScheduler])
def test_one_pause_of_our_own_code_is_no_reason(serving, cls) -> None:
    engine = serving(cls)
    engine.serve(300)
    engine.machine.cpu_s = 4.0
    engine.serve(1)
    engine.machine.cpu_s = 0.0
    assert not engine.serve(600, lambda: engine.scheduler.slo.safety.is_down)


@pytest.mark.parametrize("cls", [SloScheduler, AsyncSloScheduler])
def test_one_step_of_the_device_that_stalls_is_no_reason_and_breaks_no_promise_of_ours(serving, cls) -> None:
    engine = serving(cls)
    safety = engine.scheduler.slo.safety
    engine.serve(300)
    engine.machine.slowdown = 1000.0
    engine.serve(1)
    engine.machine.slowdown = 1.0
    assert not engine.serve(600, lambda: safety.is_down)
    safety.add_promise(kept=False, arrival_s=engine.machine.now - 600 * STEP_S - 3)
    assert not [kept for kept, _ in safety._promises].count(False)
    safety.add_promise(kept=False, arrival_s=engine.machine.now)
    assert [kept for kept, _ in safety._promises].count(False) == 1


@pytest.mark.parametrize("cls", [SloScheduler, AsyncSloScheduler])
def test_a_pause_by_the_operator_is_no_reason(serving, cls) -> None:
    engine = serving(cls)
    engine.serve(300)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.machine.now += 30.0
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert not engine.serve(600, lambda: engine.scheduler.slo.safety.is_down)
    assert engine.scheduler.slo.safety.time_share < 0.01


def test_an_engine_that_can_hardly_afford_plans_makes_them_cheaper_and_steers_on(serving) -> None:
    engine = serving(SloScheduler)
    slo = engine.scheduler.slo
    engine.machine.cpu_s = 0.042 * STEP_S
    assert not engine.serve(400, lambda: slo.safety.is_down)
    assert slo.work_limit.thrift == effort.MAX_THRIFT
    engine.machine.cpu_s = 0.0
    assert engine.serve(4000, lambda: slo.work_limit.thrift == 0)
    assert slo.effective_mode == "enforce"


def test_a_queue_that_waits_is_not_walked_at_each_plan(build, monkeypatch) -> None:
    scheduler = build(max_num_seqs=4)
    sizes = []
    seen = view.seen
    monkeypatch.setattr(view, "seen", lambda requests, **more: sizes.append(len(requests)) or seen(requests, **more))
    for i in range(60):
        scheduler.add_request(make_request(f"r{i}", max_tokens=20, args={"slo_ttft_ms": 60_000, "slo_tpot_ms": 1000}))
    Engine(scheduler).run()
    assert len(sizes) > 60
    assert max(sizes) == 4


def test_stalls_that_are_not_rare_excuse_nothing() -> None:
    safety = StepDown(SafetyLimits(num_promises=20))
    for i in range(20):
        safety.add_stall(float(i))
        safety.add_step(0.02, 0.0)
        safety.add_promise(kept=False, arrival_s=i - 0.5)
    assert [kept for kept, _ in safety._promises].count(False) == 17
    safety.add_promise(kept=False)
    safety.add_promise(kept=False)
    safety.add_promise(kept=False)
    assert safety.check(20.0)


def test_a_plan_gets_cheaper_in_steps_before_it_is_given_up_and_dearer_again_afterwards() -> None:
    limit = WorkLimit()
    work, steps = [limit.value], [limit.run_steps]
    for share in (0.04, 0.04):
        for _ in range(effort.ADAPT_EVERY):
            limit.adapt(share, 0.05)
        work.append(limit.value)
        steps.append(limit.run_steps)
    assert work[0] > work[1] > work[2]
    assert steps[0] < steps[1] < steps[2]
    for _ in range(3 * effort.ADAPT_EVERY):
        limit.adapt(0.005, 0.05)
    assert (limit.value, limit.run_steps) == (work[0], steps[0])


def test_a_device_with_an_unknown_time_for_what_is_in_flight_is_not_said_to_wait() -> None:
    pipeline = Pipeline()
    assert pipeline.waited_s(10.0) == float("inf")


def test_what_held_up_a_step_is_told_the_longest_first() -> None:
    assert Spent(0.2, 0.05, 0.0004).text() == "200 ms collecting garbage, 50 ms waiting for a CPU that others had"
    assert "the device" in Spent(0.0, 0.0, 0.0).text()


def test_a_collection_is_counted_until_the_next_mark() -> None:
    stalls = Stalls()
    try:
        gc.collect()
        assert stalls.since(0.0).collecting_s > 0
        stalls.mark()
        assert stalls.since(0.0).collecting_s == 0
    finally:
        stalls.close()
    assert not [call for call in gc.callbacks if getattr(call, "__self__", None) is stalls]


def test_a_stalled_step_says_in_log_and_record_what_held_it_up(serving, vllm_log, tmp_path) -> None:
    engine = serving(SloScheduler)
    slo = engine.scheduler.slo
    path = tmp_path / "record.jsonl"
    slo.recorder._file = LineFile(path, max_bytes=1 << 20)
    engine.serve(100)
    engine.machine.slowdown = 1000.0
    engine.serve(1)
    engine.machine.slowdown = 1.0
    engine.serve(20)
    slo.recorder.flush()
    assert [record.message for record in vllm_log.records if "a step took" in record.message]
    stalled = [line for line in map(json.loads, path.read_text().splitlines()) if "stall" in line]
    assert [line["seconds"] > 1 for line in stalled] == [True]
    assert set(stalled[0]["stall"]) == {"collecting_s", "waiting_s", "ours_s"}
