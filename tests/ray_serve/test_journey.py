import asyncio
import contextlib
import json

import pytest
from parts import FakeStream, arrival, note, stats

from slos_serve.core.routing.routers import make_router
from slos_serve.ray_serve import journey
from slos_serve.ray_serve.hops import FINISHED, VERDICT
from slos_serve.ray_serve.journey import Journey, LostError, RefusedError, RoutedRequest

FAULT = ConnectionError("the replica died")
REFUSAL = {"verdict": "best-effort", "reason": "compute"}
DONE = ["data: [DONE]\n\n"]


class Cluster:
    """Two replicas that answer each hop with what a test wrote down for them."""

    def __init__(self, fleet, clocks, *answers):
        fleet.use(make_router("slo"))
        fleet.update({"a": stats(clocks.now), "b": stats(clocks.now)})
        fleet.is_better_elsewhere = lambda hop, replica_id: self.better == "everywhere"
        self.better = "nowhere"
        self.fleet = fleet
        self.answers = list(answers)
        self.hops = []
        self.places = []
        self.streams = []
        self.told = []
        self.counts = []

    def send(self, hop):
        self.hops.append(hop)
        self.places.append(self.fleet.choose(hop, ["a", "b"])[0])
        self.streams.append(FakeStream(*self.answers.pop(0)))
        return self.streams[-1]

    def journey(self, **more):
        options = {"slo_id": "s", "slo_class": "chat", **more}
        routed = RoutedRequest(
            arrival=arrival(),
            send=self.send,
            tell=lambda one, hops: self.told.append((one.kind, one.replica_id, hops)),
            is_fault=lambda error: isinstance(error, ConnectionError),
            count=self.counts.append,
            **options,
        )
        return Journey(routed, self.fleet, monotonic=self.fleet._monotonic)

    async def run(self, **more):
        return [item async for item in self.journey(**more).items()]


@pytest.fixture
def cluster(fleet, clocks):
    return lambda *answers: Cluster(fleet, clocks, *answers)


async def test_chunks_pass_and_notes_do_not(cluster):
    replicas = cluster([note(VERDICT, verdict="promised"), "one", "two", note(FINISHED, outcome="met"), DONE])
    assert await replicas.run() == ["one", "two", DONE]
    assert replicas.told == [(VERDICT, "a", 0), (FINISHED, "a", 0)]
    assert replicas.counts == ["served"]
    assert not replicas.streams[0].is_cancelled


async def test_a_refused_request_goes_where_it_would_be_promised_with_its_first_arrival(cluster):
    replicas = cluster([note(VERDICT, "a", **REFUSAL), "never"], [note(VERDICT, "b", verdict="promised"), "one", DONE])
    replicas.better = "everywhere"
    assert await replicas.run() == ["one", DONE]
    assert replicas.hops[1].arrival.tried == ("a",)
    assert replicas.hops[1].arrival.arrival_s == replicas.hops[0].arrival.arrival_s
    assert replicas.places == ["a", "b"]
    assert replicas.told == [(VERDICT, "b", 1)]
    assert replicas.counts == ["passed", "served"]
    assert replicas.streams[0].is_cancelled


async def test_an_undecided_request_goes_where_it_would_be_promised(cluster, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster([3600], [note(VERDICT, "b", verdict="promised"), "one", DONE])
    replicas.better = "everywhere"
    assert await replicas.run() == ["one", DONE]
    assert replicas.places == ["a", "b"]
    assert replicas.streams[0].is_cancelled


@pytest.mark.parametrize("answer", [[note(VERDICT, "a", verdict="promised"), 0.05, "one"], ["one", 0.05, "two"]])
async def test_what_is_promised_or_has_begun_is_never_taken_back(cluster, monkeypatch, answer):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster(answer)
    replicas.better = "everywhere"
    await replicas.run()
    assert replicas.places == ["a"]


async def test_a_refused_request_that_stayed_is_not_taken_back_later(cluster, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    answer = object()
    replicas = cluster([note(VERDICT, "a", **REFUSAL), 0.1, answer])
    items = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    replicas.better = "everywhere"
    assert await items == [answer]
    assert replicas.places == ["a"]


async def test_it_is_not_passed_on_more_often_than_the_policy_wants(cluster):
    refusal = note(VERDICT, **REFUSAL)
    replicas = cluster(*([refusal, "one"] for _ in range(4)))
    replicas.better = "everywhere"
    assert await replicas.run() == ["one"]
    assert len(replicas.hops) == 1 + replicas.fleet.num_hops


@pytest.mark.parametrize("more", [{"slo_id": ""}, {"best_effort": True}])
async def test_a_request_that_wants_no_promise_stays_where_it_is(cluster, more):
    replicas = cluster([note(VERDICT, "a", **REFUSAL), "one"])
    replicas.better = "everywhere"
    assert await replicas.run(**more) == ["one"]


async def test_where_no_replica_is_better_a_class_that_rejects_is_refused(cluster):
    replicas = cluster([note(VERDICT, "a", **REFUSAL), "never"])
    with pytest.raises(RefusedError, match="compute"):
        await replicas.run(rejects=True)
    assert replicas.streams[0].is_cancelled
    assert not replicas.told


async def test_where_no_replica_is_better_any_other_class_is_served_as_best_effort(cluster):
    replicas = cluster([note(VERDICT, "a", **REFUSAL), "one"])
    assert await replicas.run() == ["one"]
    assert replicas.told == [(VERDICT, "a", 0)]


async def test_whoever_stops_reading_at_the_end_of_the_answer_has_been_served(cluster):
    answer = object()
    replicas = cluster([answer])
    items = replicas.journey().items()
    assert await anext(items) is answer
    await items.aclose()
    assert replicas.counts == ["served"]
    assert not replicas.streams[0].is_cancelled


async def test_a_replica_that_dies_before_the_first_chunk_costs_a_hop_and_nothing_else(cluster):
    replicas = cluster([note(VERDICT, verdict="promised"), FAULT], ["one", DONE])
    assert await replicas.run() == ["one", DONE]
    assert replicas.places == ["a", "b"]
    assert replicas.counts == ["lost", "served"]


async def test_a_replica_that_dies_after_the_first_chunk_ends_the_stream_with_an_error_and_is_never_retried(cluster):
    replicas = cluster(["one", FAULT])
    first, last = await replicas.run()
    assert first == "one"
    event, done, _ = last.split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503
    assert done == "data: [DONE]"
    assert len(replicas.hops) == 1
    assert replicas.counts == ["broken"]


async def test_a_replica_that_falls_silent_before_the_first_chunk_is_given_up(cluster, clocks, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster([3600], ["one"])
    task = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    assert not task.done()
    replicas.fleet.update({"a": stats(clocks.now + 1, silent_s=60.0), "b": stats(clocks.now + 1)})
    assert await task == ["one"]
    assert replicas.places == ["a", "b"]
    assert replicas.streams[0].is_cancelled


async def test_a_replica_that_falls_silent_in_the_middle_ends_the_stream_with_an_error(cluster, clocks, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster(["one", 3600])
    task = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    replicas.fleet.update({"a": stats(clocks.now + 1, silent_s=60.0), "b": stats(clocks.now + 1)})
    items = await task
    assert items[0] == "one"
    assert "stopped answering" in items[1]


async def test_a_slow_replica_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster([0.1, "one", 0.1, "two"])
    assert await replicas.run() == ["one", "two"]


async def test_a_request_that_kills_two_replicas_is_not_given_a_third(cluster):
    replicas = cluster([FAULT], [FAULT])
    with pytest.raises(LostError, match="no replica could serve"):
        await replicas.run()
    assert replicas.counts == ["lost"] * 2


async def test_without_any_replica_a_request_waits_for_one_and_then_gives_up(cluster, clocks, monkeypatch):
    monkeypatch.setattr(journey, "WATCH_S", 0.01)
    replicas = cluster([3600])
    replicas.fleet.update({})
    task = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    assert not task.done()
    clocks.now += journey.UNPLACED_S + 1
    with pytest.raises(LostError):
        await task


async def test_an_error_that_any_replica_would_give_is_not_retried(cluster):
    replicas = cluster([ValueError("too long")])
    with pytest.raises(ValueError, match="too long"):
        await replicas.run()
    assert replicas.streams[0].is_cancelled


@pytest.mark.parametrize("answer", [[3600], ["one", 3600]])
async def test_a_client_that_leaves_takes_its_request_along(cluster, answer):
    replicas = cluster(answer)
    task = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert replicas.streams[0].is_cancelled
    assert replicas.fleet.where(replicas.hops[0].key) is None


async def test_a_client_that_leaves_between_two_hops_leaves_nothing_behind(cluster):
    replicas = cluster([note(VERDICT, "a", **REFUSAL)], [3600])
    replicas.better = "everywhere"
    task = asyncio.ensure_future(replicas.run())
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert len(replicas.hops) == 2
    assert [stream.is_cancelled for stream in replicas.streams] == [True, True]


async def test_closing_the_stream_early_gives_the_request_up_at_its_replica(cluster):
    replicas = cluster(["one", "two"])
    items = replicas.journey().items()
    assert await anext(items) == "one"
    await items.aclose()
    assert replicas.streams[0].is_cancelled


def test_an_error_about_one_request_is_no_lost_replica():
    from ray.exceptions import RayTaskError

    from slos_serve.ray_serve.ingress import is_fault

    def raised(name):
        cause = type(name, (Exception,), {})("x")
        return RayTaskError("f", "traceback", cause)

    assert [is_fault(raised(name)) for name in ("EngineDeadError", "EngineLostError", "EngineGenerateError")] == [
        *(True, True, False)
    ]


def test_what_no_engine_can_do_is_refused_and_calls_for_no_replica():
    from slos_serve.ray_serve.hops import is_refusal

    assert is_refusal({"verdict": "best-effort", "reason": "too-tight"})
