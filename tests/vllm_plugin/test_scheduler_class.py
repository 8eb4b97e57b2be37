"""The scheduler class fits how the engine schedules: chosen by vLLM's own configuration, or told and only observing."""

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.vllm_plugin.scheduler import AsyncSloScheduler, AutoSloScheduler, SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_config, make_request, make_scheduler


@pytest.fixture
def make(tmp_path):
    made = []

    def _make(cls, *, is_async):
        config = make_config(tmp_path, is_async=is_async, slo={"mode": "enforce"})
        made.append(make_scheduler(tmp_path, cls=cls, config=config))
        return made[-1]

    yield _make
    for scheduler in made:
        scheduler.shutdown()


@pytest.mark.parametrize(("is_async", "expected"), [(True, AsyncSloScheduler), (False, SloScheduler)])
def test_the_automatic_class_is_the_one_that_fits_and_nothing_is_said(make, is_async, expected):
    scheduler = make(AutoSloScheduler, is_async=is_async)
    assert type(scheduler) is expected
    assert not scheduler.slo.standing.differences


@pytest.mark.parametrize(("is_async", "cls"), [(True, AsyncSloScheduler), (False, SloScheduler)])
def test_a_class_that_fits_is_taken_as_it_is(make, is_async, cls):
    scheduler = make(cls, is_async=is_async)
    assert type(scheduler) is cls
    assert not scheduler.slo.standing.differences


@pytest.mark.parametrize(
    ("cls", "is_async", "kind", "other"),
    [(SloScheduler, True, "synchronous", "asynchronous"), (AsyncSloScheduler, False, "asynchronous", "synchronous")],
)
def test_a_class_that_does_not_fit_only_observes_and_says_so_in_one_line(make, cls, is_async, kind, other):
    scheduler = make(cls, is_async=is_async)
    assert scheduler.slo.effective_mode == "observe"
    reason = f"unsupported: {cls.__name__} is for {kind} scheduling and this engine's is {other}: give it "
    assert scheduler.slo.mode_reason.startswith(reason)


def served(scheduler):
    engine = Engine(scheduler, depth=2)
    scheduler.add_request(make_request("a", max_tokens=20))
    engine.run()
    return engine.outputs, engine.batches


def test_a_synchronous_class_on_an_asynchronous_engine_still_leaves_no_step_empty(make, tmp_path):
    config = make_config(tmp_path, is_async=True)
    stock = make_scheduler(tmp_path, cls=AsyncScheduler, config=config)
    assert served(make(SloScheduler, is_async=True)) == served(stock)
