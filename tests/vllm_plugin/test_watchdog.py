"""Each rule that stops steering is provoked on a live scheduler, and each gives way once its cause is gone."""

from __future__ import annotations

import time

import numpy as np
import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.vllm_plugin.safety.watchdog import PlannerHungError, Watchdog
from slos_serve.vllm_plugin.testing import Engine, make_request

QUICK = {"is_enabled": True, "hold_s": 0.05, "num_covered_steps": 32, "num_timed_steps": 20, "num_promises": 5}


class Traffic:
    """An engine with decodes that never end, whose steps take what `seconds` and `overhead` make of a prediction."""

    def __init__(self, scheduler) -> None:
        self.scheduler = scheduler
        self.engine = Engine(scheduler)
        self.slowdown = 1.0
        self.overhead = 0.0
        self.num_made = 0
        learn = scheduler.slo._learn
        scheduler.slo._learn = lambda entry, _, __, now: learn(
            entry, entry.predicted_s * self.slowdown, entry.predicted_s * self.overhead, now
        )

    def run(self, until, steps=4000):
        """Step, with two requests alive, until `until()`; tell whether it came to that."""
        for _ in range(steps):
            while len(self.scheduler.requests) < 2:
                self.num_made += 1
                self.scheduler.add_request(
                    make_request(f"r{self.num_made}", max_tokens=500, args={"slo_ttft_ms": 1e7, "slo_tpot_ms": 1e6})
                )
            self.engine.step()
            if until():
                return True
        return False

    def falls(self, words):
        safety = self.scheduler.slo.safety
        return self.run(lambda: safety.is_down) and words in safety.reason

    def rises(self):
        return self.run(lambda: not self.scheduler.slo.safety.is_down)


@pytest.fixture
def traffic(build):
    return Traffic(build(VllmPlanner(), slo={"safety": QUICK}))


def test_steps_that_outlast_their_margins_step_down_until_they_fit_again(traffic, vllm_log) -> None:
    assert not traffic.run(lambda: traffic.scheduler.slo.safety.is_down, steps=200)
    traffic.slowdown = 50.0
    assert traffic.falls("margin coverage")
    assert traffic.scheduler.slo.effective_mode == "observe"
    assert "ALERT: SLO scheduling stepped down" in vllm_log.text
    assert not traffic.run(lambda: not traffic.scheduler.slo.safety.is_down, steps=500)  # it goes on: so does the rule
    traffic.slowdown = 1.0
    assert traffic.rises()
    assert traffic.scheduler.slo.effective_mode == "enforce"


def test_planning_that_costs_too_much_steps_down_until_it_is_cheap_again(traffic) -> None:
    traffic.overhead = 0.06
    assert traffic.falls("planning takes")
    assert not traffic.run(lambda: not traffic.scheduler.slo.safety.is_down, steps=500)
    traffic.overhead = 0.045  # inside the limit, but not by enough
    assert not traffic.run(lambda: not traffic.scheduler.slo.safety.is_down, steps=500)
    traffic.overhead = 0.0
    assert traffic.rises()


def test_a_planner_that_fails_steps_down_until_it_works_again(traffic) -> None:
    class Faulty:
        share, rng = 0.2, np.random.default_rng(0)

        def plan(self, state):
            if self.rng.random() < self.share:
                raise RuntimeError("made to fail")
            return VllmPlanner().plan(state)

    planner = traffic.scheduler.slo.planner = Faulty()
    assert traffic.falls("planner faults")
    planner.share = 0.0
    assert traffic.rises()
    planner.share = 1.0
    assert traffic.falls("planner faults")
    assert not traffic.run(
        lambda: not traffic.scheduler.slo.safety.is_down, steps=1500
    )  # it is tried beside, and fails


def test_promises_that_are_broken_step_down_and_are_tried_again_after_a_while(build) -> None:
    scheduler = build(slo={"safety": QUICK, "planner": "slos_serve.core.planner.SloPlanner"})
    traffic = Traffic(scheduler)
    promises = scheduler.slo.promises
    for i in range(5):
        scheduler.add_request(make_request(f"late{i}", max_tokens=2, args={"slo_ttft_ms": 1e6, "slo_e2e_ms": 1e6}))
        scheduler.slo.tracker.outputs.grades["ttft_s"] = 0.0  # what was promised in good faith comes late
    assert traffic.falls("promises kept 0.0% of 5")
    assert promises.tally.classes["custom"].outcomes["missed"] == 5
    assert traffic.rises()


def test_a_clock_that_is_set_back_steps_down_for_a_while(traffic) -> None:
    clock = traffic.scheduler.slo.clock
    read = clock._read
    traffic.run(lambda: False, steps=5)
    clock._read = lambda: read() - 0.05
    assert not traffic.run(lambda: traffic.scheduler.slo.safety.is_down, steps=20)  # NTP at work
    clock._read = lambda: read() - 3600
    before = clock.peek()
    assert traffic.falls("the clock was set back by 3.6e+03 s")
    assert clock.now() >= before
    assert traffic.rises()
    assert not traffic.scheduler.slo.faults.counts


class Hangs:
    """Planning that does not end, for a minute."""

    def __init__(self) -> None:
        self.is_hanging = True

    def plan(self, state):
        ends = time.monotonic() + 60
        while self.is_hanging and time.monotonic() < ends:
            sum(range(100))
        return VllmPlanner().plan(state)


def test_a_planner_that_hangs_is_cut_off_and_every_request_is_served(build) -> None:
    scheduler = build(Hangs(), slo={"safety": {**QUICK, "max_plan_s": 0.05}})
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_class": "chat"}))
    started = time.monotonic()
    engine.step()
    assert time.monotonic() - started < 30
    assert scheduler.slo.faults.counts == {"plan": 1}
    engine.step()
    assert scheduler.slo.safety.reason == "a plan was cut off after 0.05 s"
    scheduler.slo.planner.is_hanging = False
    engine.run()
    assert set(engine.finished) == {"r"}


def test_a_planner_that_hangs_is_not_asked_again_before_the_hold_is_over(build) -> None:
    scheduler = build(Hangs(), slo={"safety": {**QUICK, "hold_s": 3600.0, "max_plan_s": 0.05}})
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", max_tokens=30, args={"slo_class": "chat"}))
    engine.run()
    assert set(engine.finished) == {"r"}
    assert scheduler.slo.watchdog.num_interrupts == 1


def test_nothing_is_raised_in_code_that_runs_after_a_plan() -> None:
    dog = Watchdog(0.0)
    for _ in range(200):
        try:
            with dog:
                dog.interrupt()
        except PlannerHungError:
            pass
        dog.interrupt()  # no plan is under way
        sum(range(1000))
    assert dog.num_interrupts > 0


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_every_request_completes_while_the_planner_fails_at_random_and_rules_are_on(build, share) -> None:
    class Faulty:
        rng = np.random.default_rng(1)

        def plan(self, state):
            if self.rng.random() < share:
                raise ValueError("made to fail")
            return VllmPlanner().plan(state)

    # a mock engine's steps are so brief that planning is dear beside them
    scheduler = build(Faulty(), slo={"safety": {**QUICK, "max_time_share": 1e9}})
    engine = Engine(scheduler)
    for i in range(80):
        args = {"slo_class": ("chat", "coding", "best-effort")[i % 3]}
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=10 + i, max_tokens=40, args=args))
    engine.run()
    assert sorted(map(len, engine.outputs.values())) == [40] * 80
    assert scheduler.slo.faults.counts["plan"] > 0
