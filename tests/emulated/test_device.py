"""The device's clock: a queue of one, whose batches take what the file and the switches say."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.perf import PerfModel
from slos_serve.emulated.device import Batch, Device
from slos_serve.emulated.emulation import Switches

MODEL = PerfModel.from_terms([{"per_token_s": 0.001, "per_context_token_s": 1e-6, "fixed_s": 0.01}])
ONE = Batch(num_tokens=1, num_requests=1)
ONE_S = 0.011


def device(**switches):
    return Device(MODEL, Switches(**switches), now_s=0.0)


def test_a_batch_takes_what_the_performance_model_says():
    run = device().submit(Batch(num_tokens=20, num_requests=3, context_tokens=5000), 1.0)
    assert (run.start_s, run.end_s) == (1.0, pytest.approx(1.0 + 0.01 + 0.02 + 0.005))


def test_a_batch_handed_over_while_another_runs_starts_when_that_ends():
    one = device()
    first = one.submit(ONE, 1.0)
    second = one.submit(ONE, 1.005)
    assert second.start_s == first.end_s
    assert second.end_s == pytest.approx(1.0 + 2 * ONE_S)


def test_an_idle_device_starts_at_once():
    one = device()
    one.submit(ONE, 1.0)
    assert one.submit(ONE, 5.0).start_s == 5.0


def test_a_slower_device_takes_so_many_times_as_long():
    assert device(slower=1.5).submit(ONE, 0.0).end_s == pytest.approx(1.5 * ONE_S)


def test_noise_has_a_median_of_the_file_and_repeats_with_its_seed():
    seconds = [device(noise=0.1, seed=seed).seconds(ONE, 0.0) for seed in range(400)]
    assert sorted(seconds)[200] == pytest.approx(ONE_S, rel=0.02)
    assert seconds[:10] == [device(noise=0.1, seed=seed).seconds(ONE, 0.0) for seed in range(10)]


def test_slow_periods_come_every_so_often_and_end():
    one = device(slow=(60, 5, 3))
    times = {now: one.seconds(ONE, now) for now in (0.0, 59.9, 60.0, 64.9, 65.0, 121.0)}
    slow = {now for now, seconds in times.items() if seconds == pytest.approx(3 * ONE_S)}
    assert slow == {60.0, 64.9, 121.0}
    assert times[65.0] == pytest.approx(ONE_S)


def test_a_stall_lengthens_one_step_each_time_and_missed_ones_do_not_pile_up():
    one = device(stall=(30, 0.5))
    assert one.seconds(ONE, 29.0) == pytest.approx(ONE_S)
    assert one.seconds(ONE, 30.0) == pytest.approx(ONE_S + 0.5)
    assert one.seconds(ONE, 31.0) == pytest.approx(ONE_S)
    assert one.seconds(ONE, 200.0) == pytest.approx(ONE_S + 0.5)
    assert one.seconds(ONE, 201.0) == pytest.approx(ONE_S)


@given(st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 500)), min_size=2, max_size=30))
def test_batches_never_overlap_and_the_device_never_waits_with_work_at_hand(batches):
    one, now, runs = device(noise=0.1, slow=(1, 0.2, 2)), 0.0, []
    for gap, tokens in batches:
        now += gap
        runs.append(one.submit(Batch(num_tokens=tokens, num_requests=1), now))
    for before, after in itertools.pairwise(runs):
        assert after.start_s == max(before.end_s, after.handed_s)
        assert after.end_s > after.start_s
