"""Events run in the documented order, and time never falls."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.sim.replica.kernel import Kernel, Priority


def test_events_at_one_time_run_by_priority_and_then_in_the_order_they_were_scheduled():
    kernel, seen = Kernel(), []
    for name, priority in [
        ("plan", Priority.PLAN),
        ("arrival 1", Priority.ARRIVAL),
        ("end", Priority.STEP_END),
        ("arrival 2", Priority.ARRIVAL),
    ]:
        kernel.schedule(1.0, priority, lambda name=name: seen.append(name))
    kernel.run()
    assert seen == ["end", "arrival 1", "arrival 2", "plan"]
    assert kernel.num_events == 4


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(list(Priority))), max_size=40))
def test_the_order_is_total_and_time_never_falls(events):
    kernel, seen = Kernel(), []
    for sequence, (at_s, priority) in enumerate(events):
        kernel.schedule(at_s, priority, lambda key=(at_s, priority, sequence): seen.append((kernel.now_s, key)))
    kernel.run()
    assert [key for _, key in seen] == sorted(key for _, key in seen)
    assert all(now == key[0] for now, key in seen)


def test_an_event_may_schedule_another_at_its_own_time():
    kernel, seen = Kernel(), []
    kernel.schedule(
        2.0, Priority.PLAN, lambda: kernel.schedule(2.0, Priority.STEP_END, lambda: seen.append(kernel.now_s))
    )
    kernel.run()
    assert seen == [2.0]


@pytest.mark.parametrize("at_s", [0.5, math.inf, math.nan])
def test_the_past_and_times_that_are_no_times_are_refused(at_s):
    kernel = Kernel(start_s=1.0)
    with pytest.raises(ValueError, match="at_s"):
        kernel.schedule(at_s, Priority.PLAN, lambda: None)


def test_a_run_ends_at_its_horizon_and_goes_on_from_there():
    kernel, seen = Kernel(), []
    for at_s in (1.0, 2.0, 3.0):
        kernel.schedule(at_s, Priority.PLAN, lambda at_s=at_s: seen.append(at_s))
    kernel.run(until_s=2.0)
    assert seen == [1.0, 2.0]
    assert len(kernel) == 1
    kernel.run()
    assert seen == [1.0, 2.0, 3.0]


def test_stop_ends_a_run_after_the_current_event():
    kernel, seen = Kernel(), []
    kernel.schedule(1.0, Priority.PLAN, kernel.stop)
    kernel.schedule(1.0, Priority.PLAN, lambda: seen.append("late"))
    kernel.run()
    assert seen == []
    assert len(kernel) == 1
