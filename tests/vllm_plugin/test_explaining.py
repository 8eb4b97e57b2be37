"""Why a request was not promised is found from its plan's own input, on a thread of its own."""

import itertools
import time
from types import SimpleNamespace

from tests.core.states import make_request, make_state

from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import RequestTable
from slos_serve.vllm_plugin import explaining
from slos_serve.vllm_plugin.explaining import MAX_KEPT, Explainer
from slos_serve.vllm_plugin.progress import MAX_POINTS, SPARE, TokenTimes


def refused(name="hard", **more):
    table = RequestTable()
    table.add(make_request("easy", ttft_s=2.0, tpot_s=0.1))
    table.add(make_request(name, **{"prompt": 6000, "ttft_s": 0.1, "tpot_s": 0.1, **more}))
    state = make_state(table)
    return state, SloPlanner().plan(state)


def found(explainer, name):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        answer = explainer.answer(name)
        if "pending" not in answer:
            return answer
        time.sleep(0.01)
    raise AssertionError("no explanation came")


def test_a_request_that_was_declined_is_explained_from_its_moment():
    explainer = Explainer(SloPlanner)
    state, plan = refused()
    explainer.keep(state, plan)
    state.requests.remove("hard")  # what comes later changes nothing
    explanation = found(explainer, "hard")["explanation"]
    assert explanation["binding"] == "compute"
    assert explanation["later_s"] > 0
    assert explainer.answer("hard") == {"explanation": explanation}


def test_what_was_promised_or_never_planned_is_not_kept():
    explainer = Explainer(SloPlanner)
    explainer.keep(*refused())
    assert "error" in explainer.answer("easy")
    assert "error" in explainer.answer("nobody")


def test_only_the_last_that_were_refused_are_kept(monkeypatch):
    seconds = itertools.count()  # nobody waits for their turn
    monkeypatch.setattr(explaining.time, "perf_counter", lambda: next(seconds) // 2 * 100.0)
    explainer = Explainer(SloPlanner)
    for i in range(MAX_KEPT + 10):
        explainer.keep(*refused(f"hard{i}"))
    assert len(explainer._kept) == MAX_KEPT
    assert "error" in explainer.answer("hard0")


def test_where_many_are_refused_at_once_keeping_takes_a_fiftieth_of_the_time(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(explaining.time, "perf_counter", lambda: now_s)
    copy = RequestTable.copy

    def slow_copy(table):
        nonlocal now_s
        now_s += 0.001
        return copy(table)

    monkeypatch.setattr(RequestTable, "copy", slow_copy)
    explainer = Explainer(SloPlanner)
    for i in range(100):
        explainer.keep(*refused(f"hard{i}"))
        now_s += 0.01
    assert len(explainer._kept) == 20  # of a millisecond each, in a second


def test_a_planner_that_fails_is_told_and_others_can_be_asked_about():
    class Broken:
        def plan(self, state):
            raise RuntimeError("it is broken")

    explainer = Explainer(Broken)
    explainer.keep(*refused())
    assert "broken" in found(explainer, "hard")["explanation"]["error"]
    assert explainer._asked is None


def live(name, count):
    return SimpleNamespace(
        request_id=name, arrival_s=0.0, grader=1, has_begun=True, request=SimpleNamespace(num_output_tokens=count)
    )


def test_points_of_a_request_stay_bounded_however_long_it_lasts():
    progress, one = TokenTimes(), live("a", 0)
    for second in range(100_000):
        one.request.num_output_tokens += 1
        progress.note([one], float(second))
    points = progress.take(one)
    assert 2 < len(points) <= MAX_POINTS
    assert [count for _, count in points] == sorted(count for _, count in points)
    assert progress.take(one) == []


def test_requests_whose_end_is_never_told_leave_nothing_behind():
    progress = TokenTimes()
    for number in range(1000):
        progress.note([live(f"{number}", 1)], 1.0)
    assert len(progress._points) <= SPARE + 2
