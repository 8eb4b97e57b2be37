"""When the next batch starts, under one batch in flight or none, whatever was predicted of those before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.perf import PerfModel
from slos_serve.records.writer import BatchShape
from slos_serve.vllm_plugin import pipeline as pipeline_module
from slos_serve.vllm_plugin.pipeline import InFlight, Pipeline
from slos_serve.vllm_plugin.testing import Engine, make_request, write_profile

SHAPE = BatchShape(1, 1, 1, 0, 0.0, has_prefill=False)
HOUR_S = 3600.0


class Device:
    """A queue of one on a virtual clock, and the pipeline beside it; predictions are `bias` times the truth."""

    def __init__(self, depth: int) -> None:
        self.pipeline = Pipeline()
        self.depth = depth
        self.now = self.free_at = 1.7e9
        self.queue: list[tuple[InFlight, float]] = []

    def perf_counter(self) -> float:
        return self.now

    def hand_over(self, true_s: float, bias: float) -> float:
        """Schedule a batch; return its expected start minus the true one."""
        expected = self.pipeline.starts_at(self.now)
        start = max(self.now, self.free_at)
        self.free_at = start + true_s
        entry = InFlight(object(), SHAPE, self.now, self.now, expected, None, true_s * bias, 0, 0.0, 0.0)
        self.pipeline.add(entry)
        self.queue.append((entry, self.free_at))
        return expected - start

    def complete(self):
        entry, self.now = self.queue.pop(0)
        return self.pipeline.take(entry.output, self.now)


@settings(max_examples=8, deadline=None)
@given(
    depth=st.integers(1, 3),
    bias=st.floats(0.3, 3.0),
    pattern=st.lists(st.floats(0.1, 0.5), min_size=1, max_size=7),
    idle_every=st.integers(0, 50),
)
def test_the_planners_clock_stays_beside_the_wall_clock_for_an_hour_of_wrong_predictions(
    depth, bias, pattern, idle_every
) -> None:
    device, longest, step = Device(depth), max(pattern), 0
    bound = (depth - 1) * abs(bias - 1.0) * longest + 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_module, "time", device)
        end = device.now + HOUR_S
        while device.now < end:
            while len(device.queue) < device.depth:
                step += 1
                assert abs(device.hand_over(pattern[step % len(pattern)], bias)) <= bound
            device.complete()
            assert abs(device.pipeline.clock_error_s) <= bound
            if idle_every and step % idle_every == 0:
                while device.queue:
                    device.complete()
                device.pipeline.rest()
                device.now += 1.0


def test_steps_in_flight_two_at_a_time_last_from_one_output_to_the_next(monkeypatch) -> None:
    device = Device(2)
    monkeypatch.setattr(pipeline_module, "time", device)
    device.hand_over(0.02, 1.0)
    measured = []
    for true_s in (0.03, 0.01, 0.05):
        device.hand_over(true_s, 1.0)
        measured.append(device.complete()[1])
    assert measured == pytest.approx([0.02, 0.03, 0.01], abs=1e-6)


def test_the_pause_before_a_request_that_comes_soon_after_the_last_is_no_part_of_its_step(monkeypatch) -> None:
    device = Device(2)
    monkeypatch.setattr(pipeline_module, "time", device)
    measured = []
    for _ in range(3):
        device.hand_over(0.006, 1.0)
        measured.append(device.complete()[1])
        device.pipeline.rest()
        device.now += 0.004  # until the client asks again
    assert measured == pytest.approx([0.006] * 3, abs=1e-6)


def test_the_output_of_an_empty_batch_leaves_the_batch_in_flight_where_it_is(monkeypatch) -> None:
    device = Device(2)
    monkeypatch.setattr(pipeline_module, "time", device)
    device.hand_over(0.02, 1.0)
    assert device.pipeline.take(object(), device.now) is None
    assert device.complete() is not None


class Steady:
    """A virtual clock for plug-in and engine: a step takes what `perf` says, one batch after the other."""

    def __init__(self, scheduler, perf: PerfModel) -> None:
        self.now = self.free_at = 1.7e9
        self.ends: list[float] = []
        clock = scheduler.slo.clock
        clock._read, clock._last = (lambda: self.now), self.now
        self.perf = perf

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("bias", [0.6, 1.02, 1.5])
def test_under_async_scheduling_a_profile_that_is_off_declines_nobody_for_a_clock_that_ran_ahead(
    build, tmp_path, perf, monkeypatch, bias
) -> None:
    from slos_serve.vllm_plugin import runtime
    from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler

    scheduler = build(cls=AsyncSloScheduler, slo={"planner": "slos_serve.core.planner.SloPlanner"}, ready=False)
    write_profile(tmp_path / "profile.json", _scaled(perf, bias))
    scheduler.slo.learner.poll()
    clock = Steady(scheduler, perf)
    monkeypatch.setattr(pipeline_module, "time", clock)
    monkeypatch.setattr(runtime, "time", clock)
    # what is learnt would take the bias out of the predictions: here they stay wrong
    monkeypatch.setattr(scheduler.slo.learner, "observe", lambda *_: None)

    class Timed(Engine):
        def execute(self, output):
            if output.num_scheduled_tokens:
                seconds = perf.seconds(output.total_num_scheduled_tokens, len(output.num_scheduled_tokens))
                clock.free_at = max(clock.now, clock.free_at) + seconds
            clock.ends.append(clock.free_at)
            return super().execute(output)

        def _take(self, output, result):
            clock.now = max(clock.now, clock.ends.pop(0)) + 1e-6
            super()._take(output, result)

    engine, leads = Timed(scheduler, depth=2), []
    for step in range(3000):
        if step % 40 == 0:
            scheduler.add_request(
                make_request(f"r{step}", max_tokens=60, args={"slo_class": "chat"}, arrival_s=clock.now)
            )
        engine.step()
        state = scheduler.slo._next.state
        if state is not None:
            leads.append(state.now_s - clock.now)
    assert max(leads) < 0.1
    errors = scheduler.slo.ended.clock_errors.quantiles()
    assert max(abs(errors["p50"]), abs(errors["p99"])) < 0.05
    reasons = scheduler.slo.promises.tally.classes["chat"].outcomes
    assert set(reasons) == {"met"}
    assert not scheduler.slo.faults.counts


def _scaled(perf: PerfModel, factor: float) -> PerfModel:
    return PerfModel(lines=tuple(tuple(value * factor for value in line) for line in perf.lines))
