"""The mode changes while the engine runs, for all classes or for one, and is asked for from another process."""

from __future__ import annotations

import time

import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.types import Plan, Tier, Verdict
from slos_serve.vllm_plugin.safety.modes import Modes
from slos_serve.vllm_plugin.testing import Engine, make_request
from slos_serve.vllm_plugin.wire.channel import address
from slos_serve.vllm_plugin.wire.control import ask


class PromiseAll:
    """VLLM's batches, and a promise for whoever may still get one."""

    def plan(self, state):
        rows, ids = state.requests.rows, state.requests.request_ids
        pending = [ids[i] for i, tier in enumerate(rows["tier"].tolist()) if tier == Tier.PENDING]
        verdicts = tuple(Verdict(request_id=i, promised=True) for i in pending)
        return Plan(batch=VllmPlanner().plan(state).batch, verdicts=verdicts)


def tell(scheduler, **question):
    instance = scheduler.vllm_config.instance_id
    return ask(address(instance, 0, "control"), question, timeout_s=10)


def told(scheduler, request_id):
    live = scheduler.slo.tracker.live[request_id]
    return live.verdict, live.is_set_aside


@pytest.fixture
def scheduler(build):
    scheduler = build(PromiseAll(), slo={"always_plan": False})
    scheduler.add_request(make_request("first", max_tokens=100, args={"slo_class": "chat"}))
    scheduler.schedule_all = Engine(scheduler)
    scheduler.schedule_all.step()
    assert told(scheduler, "first") == ("promised", False)
    return scheduler


def arrive(scheduler, name, slo_class):
    scheduler.add_request(make_request(name, max_tokens=100, args={"slo_class": slo_class}))
    scheduler.schedule_all.step()


def test_modes_of_classes_stand_beside_that_of_the_engine_until_it_changes() -> None:
    modes = Modes(engine="observe").changed("enforce", "chat")
    assert (modes.of("chat"), modes.of("coding"), modes.is_steering) == ("enforce", "observe", True)
    assert (modes.sets_aside("coding"), modes.sets_aside("chat")) == (True, False)
    assert not modes.changed(None, "chat").is_steering
    assert modes.changed("observe") == Modes(engine="observe")
    assert not Modes(engine="observe", by_class={"chat": "observe"}).sets_aside("chat")  # nobody is steered


@pytest.mark.parametrize(("mode", "slo_class"), [("loud", None), (None, None), ("loud", "chat"), (7, None)])
def test_a_mode_that_does_not_exist_is_an_error(mode, slo_class) -> None:
    with pytest.raises(ValueError, match="mode = "):
        Modes(engine="observe").changed(mode, slo_class)


def test_an_order_from_outside_is_carried_out_with_the_next_step_and_answered(scheduler) -> None:
    answer = tell(scheduler, mode="observe")
    assert (answer["mode"], answer["effective_mode"], answer["class_modes"]) == ("observe", "observe", {})
    arrive(scheduler, "second", "chat")
    assert told(scheduler, "second") == ("", False)
    assert scheduler.slo.tracker.live["second"].would_be == "promised"
    assert tell(scheduler, mode="enforce")["effective_mode"] == "enforce"
    arrive(scheduler, "third", "chat")
    assert told(scheduler, "third") == ("promised", False)
    scheduler.schedule_all.run()
    assert not scheduler.slo.faults.counts
    assert len(scheduler.schedule_all.finished) == 3


@pytest.mark.parametrize("question", [{}, {"mode": "loud"}, {"mode": "observe", "class": "nobody"}, {"mode": None}])
def test_a_bad_order_is_answered_with_an_error_and_changes_nothing(scheduler, question) -> None:
    assert "error" in tell(scheduler, **question)
    assert scheduler.slo.standing.modes == Modes(engine="enforce")
    assert tell(scheduler, mode="enforce")["mode"] == "enforce"


def test_a_class_that_observes_gets_no_promises_and_is_graded_all_the_same(scheduler) -> None:
    assert tell(scheduler, mode="observe", **{"class": "coding"})["class_modes"] == {"coding": "observe"}
    arrive(scheduler, "aside", "coding")
    arrive(scheduler, "promised", "chat")
    assert told(scheduler, "aside") == ("", True)
    assert told(scheduler, "promised") == ("promised", False)
    table = scheduler.slo.tracker.table
    assert table.rows["tier"][table.index("aside")] == Tier.BEST_EFFORT
    snapshot = scheduler.slo.snapshot()
    assert (snapshot["mode"], snapshot["class_modes"]) == ("enforce", {"coding": "observe"})
    scheduler.schedule_all.run()
    classes = scheduler.slo.promises.tally.classes
    assert classes["coding"].outcomes == {"met": 1}
    assert classes["coding"].num_promised == 0
    assert scheduler.schedule_all.finished["aside"].stop_reason == "slo:observe:met"


def test_one_class_can_be_enforced_on_an_engine_that_observes(build) -> None:
    scheduler = build(PromiseAll(), slo={"mode": "observe", "class_modes": {"chat": "enforce"}, "always_plan": False})
    scheduler.schedule_all = Engine(scheduler)
    arrive(scheduler, "chat", "chat")
    arrive(scheduler, "coding", "coding")
    assert scheduler.slo.effective_mode == "enforce"
    assert told(scheduler, "chat") == ("promised", False)
    assert told(scheduler, "coding") == ("", True)
    tell(scheduler, mode=None, **{"class": "chat"})
    assert scheduler.slo.effective_mode == "observe"


def test_a_promise_stands_when_its_class_is_switched_to_observe(scheduler) -> None:
    tell(scheduler, mode="observe", **{"class": "chat"})
    arrive(scheduler, "second", "chat")
    assert told(scheduler, "first") == ("promised", False)
    assert told(scheduler, "second") == ("", True)
    rows, index = scheduler.slo.tracker.table.rows, scheduler.slo.tracker.table.index
    assert rows["tier"][index("first")] == Tier.PROMISED
    assert rows["tpot_s"][index("first")] == pytest.approx(0.1)
    assert rows["tpot_s"][index("second")] == float("inf")


def test_requests_that_wait_are_planned_for_when_their_class_is_enforced_again(build) -> None:
    scheduler = build(PromiseAll(), slo={"class_modes": {"chat": "observe"}, "always_plan": False}, max_num_seqs=1)
    scheduler.schedule_all = Engine(scheduler)
    arrive(scheduler, "runs", "chat")
    arrive(scheduler, "waits", "chat")
    assert scheduler.slo.tracker.num_with_slo == 0
    tell(scheduler, mode="enforce")
    scheduler.schedule_all.step()
    assert told(scheduler, "waits") == ("promised", False)
    assert scheduler.slo.tracker.num_with_slo == 2
    scheduler.schedule_all.run()
    assert scheduler.slo.tracker.num_with_slo == 0


def test_nobody_answers_once_the_engine_is_gone(build) -> None:
    scheduler = build(PromiseAll())
    where = address(scheduler.vllm_config.instance_id, 0, "control")
    started = time.monotonic()
    scheduler.slo.housekeeper.stop()
    assert time.monotonic() - started < 3  # a stop does not wait for the next tick's question
    with pytest.raises(TimeoutError):
        ask(where, {"mode": "observe"}, timeout_s=0.1)


def test_an_engine_that_nobody_verified_is_not_switched_to_enforcing(scheduler) -> None:
    tell(scheduler, mode="observe")
    scheduler.slo.standing.may_enforce = False
    for question in ({"mode": "enforce"}, {"mode": "enforce", "class": "chat"}):
        assert "slos-serve verify" in tell(scheduler, **question)["error"]
    assert not scheduler.slo.standing.modes.is_steering


def test_an_engine_may_enforce_that_was_verified_or_started_so_or_runs_on_a_cpu(build, monkeypatch) -> None:
    from slos_serve.vllm_plugin.engine import view

    monkeypatch.setattr(view, "is_cpu", lambda: False)
    settings = ({"mode": "observe"}, {"mode": "enforce"}, {"mode": "observe", "may_enforce": True})
    assert [build(slo=one).slo.standing.may_enforce for one in settings] == [False, True, True]
