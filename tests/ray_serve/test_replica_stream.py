import asyncio

import pytest
from parts import arrival
from prometheus_client import CollectorRegistry

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.ray_serve.hops import FINISHED, VERDICT, Hop, Note, is_last
from slos_serve.ray_serve.replica_stream import EngineLostError, alive, told

DONE = ["data: [DONE]\n\n"]


@pytest.fixture
def hub():
    return Hub(SloMetrics(CollectorRegistry()))


def hop(**more):
    return Hop(key="k", arrival=arrival(), slo_id="s", slo_class="chat", **more)


def verdict(hub, verdict, reason=""):
    item = {"slo_id": "s", "request_id": "e", "slo_class": "chat", "verdict": verdict, "reason": reason}
    hub.feed({"verdicts": [item]})


def finished(hub, outcome="met"):
    hub.feed({"finished": [{"slo_id": "s", "request_id": "e", "slo_class": "chat", "outcome": outcome}]})


class Engine:
    """What vLLM yields, step by step; `is_closed` once it was told to stop."""

    def __init__(self, *items, wait=None):
        self.items = items
        self.wait = wait or asyncio.Event()
        self.is_closed = False

    async def stream(self):
        try:
            await self.wait.wait()
            for item in self.items:
                yield item
        finally:
            self.is_closed = True


async def started(engine, hub, one):
    """Begin to read, and let the engine's side be reached."""
    items = told(engine.stream(), one, hub, "a")
    task = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)
    return items, task


async def test_a_promise_is_told_before_the_first_chunk(hub):
    engine = Engine(["one"], DONE)
    items, task = await started(engine, hub, hop())
    verdict(hub, "promised")
    first = await task
    assert (first.kind, first.replica_id, first.record["verdict"]) == (VERDICT, "a", "promised")
    engine.wait.set()
    assert await anext(items) == ["one"]


@pytest.mark.parametrize("reason", ["compute", "memory", "deadline-passed", "observe", "requested", "invalid"])
async def test_a_refusal_is_told_and_the_request_is_kept(hub, reason):
    engine = Engine(["one"], DONE)
    _, task = await started(engine, hub, hop())
    verdict(hub, "best-effort", reason)
    first = await task
    assert (first.kind, first.record["reason"]) == (VERDICT, reason)
    assert not engine.is_closed


async def test_a_refusal_after_the_first_token_is_told_too(hub):
    engine = Engine(["one"], DONE)
    engine.wait.set()
    items = told(engine.stream(), hop(), hub, "a")
    assert await anext(items) == ["one"]
    verdict(hub, "best-effort", "compute")
    rest = [item async for item in items]
    assert [item.kind for item in rest if isinstance(item, Note)] == [VERDICT]
    assert rest[-1] == DONE


async def test_how_it_ended_is_told_before_the_last_chunk(hub):
    engine = Engine(["one"], DONE)
    engine.wait.set()
    items = told(engine.stream(), hop(), hub, "a")
    assert await anext(items) == ["one"]
    verdict(hub, "promised")
    finished(hub)
    rest = [item async for item in items]
    assert [getattr(item, "kind", item) for item in rest] == [VERDICT, FINISHED, DONE]
    assert rest[1].record["outcome"] == "met"


async def test_a_request_without_a_promise_to_ask_for_passes_without_notes(hub):
    engine = Engine(["one"], DONE)
    engine.wait.set()
    plain = Hop(key="k", arrival=arrival())
    assert [item async for item in told(engine.stream(), plain, hub, "a")] == [["one"], DONE]


async def test_a_caller_that_leaves_stops_the_engine(hub):
    engine = Engine(["one"], DONE)
    items, task = await started(engine, hub, hop())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await items.aclose()
    assert engine.is_closed
    assert hub.num_waiting == 0


async def test_the_death_of_the_engine_is_raised_instead_of_told_as_an_answer():
    engine = Engine(["one"], ['data: {"error": {"message": "EngineCore died"}}\n\n'])
    engine.wait.set()
    items = alive(engine.stream(), lambda: True)
    assert await anext(items) == ["one"]
    with pytest.raises(EngineLostError):
        await anext(items)
    assert engine.is_closed


async def test_an_error_of_a_living_engine_is_an_answer():
    event = ['data: {"error": {"message": "bad parameter"}}\n\n']
    engine = Engine(event)
    engine.wait.set()
    assert [item async for item in alive(engine.stream(), lambda: False)] == [event]


def test_the_last_item_is_the_one_with_the_end_in_it_or_a_whole_answer():
    assert is_last(DONE)
    assert is_last(object())
    assert not is_last(["data: {}\n\n"])
