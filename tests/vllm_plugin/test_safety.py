"""Each of the four rules steps down on enough evidence, and only then."""

from __future__ import annotations

import pytest

from slos_serve.vllm_plugin.safety.rules import SafetyLimits, StepDown


def test_nothing_steps_down_while_all_is_well() -> None:
    safety = StepDown()
    for step in range(5000):
        safety.add_plan(faulty=False)
        safety.add_step(0.02, 0.0004)
        safety.add_promise(step % 50 != 0)
        safety.set_coverage(0.95, step)
        assert not safety.check(step * 0.02)
    assert not safety.is_down


def test_broken_promises_step_down_after_two_hundred() -> None:
    safety = StepDown()
    for i in range(199):
        safety.add_promise(i % 10 != 0)
        assert not safety.check(float(i))
    safety.add_promise(kept=False)
    assert safety.check(200.0)
    assert safety.is_down
    assert safety.reason.startswith("promises kept 89.5% of 200")


def test_one_tenant_alone_steps_nobody_down_where_others_keep_theirs() -> None:
    safety = StepDown()
    for i in range(1000):
        safety.add_promise(i % 3 == 0, "evil" if i % 3 else "fair")
        assert not safety.check(float(i))
    for _ in range(100):
        safety.add_promise(False, "second")
    assert safety.check(1000.0)


def test_the_only_tenant_is_evidence_enough() -> None:
    safety = StepDown()
    for i in range(200):
        safety.add_promise(i % 10 != 0, "all" if i % 20 else f"other{i}")
    assert safety.check(200.0)
    assert safety.reason.startswith("promises kept 90.0% of 200")


def test_margins_that_do_not_hold_step_down() -> None:
    safety = StepDown()
    safety.set_coverage(0.5, 511)
    assert not safety.check(0.0)
    safety.set_coverage(0.89, 512)
    assert safety.check(0.0)
    assert "margin coverage" in safety.reason


@pytest.mark.parametrize(("every", "falls"), [(100, True), (2000, False)])
def test_faults_step_down_above_one_in_a_thousand(every, falls) -> None:
    safety = StepDown()
    down = False
    for step in range(20000):
        safety.add_plan(faulty=step % every == 0)
        down = down or safety.check(float(step))
    assert down is falls


def test_four_faults_are_an_accident() -> None:
    safety = StepDown()
    for _ in range(4):
        safety.add_plan(faulty=True)
    assert not safety.check(0.0)
    safety.add_plan(faulty=True)
    assert safety.check(0.0)


def test_planning_that_takes_too_long_steps_down() -> None:
    safety = StepDown()
    for _ in range(200):
        safety.add_step(0.010, 0.0006)
    assert safety.check(0.0)
    assert "planning takes 6.0%" in safety.reason


def test_steering_resumes_after_the_hold_and_each_step_down_holds_longer() -> None:
    safety = StepDown(SafetyLimits(hold_s=10.0))
    safety.set_coverage(0.5, 1000)
    assert safety.check(0.0)
    safety.set_coverage(0.99, 1000)
    assert not safety.check(9.0)
    assert safety.check(10.0)
    assert not safety.is_down
    assert safety.reason == ""
    safety.set_coverage(0.5, 1000)
    assert safety.check(11.0)
    safety.set_coverage(0.99, 1000)
    assert not safety.check(30.9)
    assert safety.check(31.0)


def test_what_is_just_inside_the_limit_does_not_resume() -> None:
    safety = StepDown(SafetyLimits(hold_s=1.0))
    safety.set_coverage(0.5, 1000)
    safety.check(0.0)
    safety.set_coverage(0.905, 1000)
    assert not safety.check(100.0)
    safety.set_coverage(0.95, 1000)
    assert safety.check(100.0)


def test_it_can_be_switched_off() -> None:
    safety = StepDown(SafetyLimits(is_enabled=False))
    safety.set_coverage(0.1, 1000)
    assert not safety.check(0.0)
