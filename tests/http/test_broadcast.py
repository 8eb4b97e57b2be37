"""What live pages are sent: one encoding for all who may see the same, nothing queued, nothing of others."""

import asyncio
import json
import time

import pytest

from slos_serve.http import broadcast
from slos_serve.http.broadcast import Broadcast

SNAPSHOT = {"effective_mode": "enforce", "mode": "enforce", "num_promised": 1, "steps": 1, "replica": {"secret": 1}}


@pytest.fixture
def hub(hub, monkeypatch):
    monkeypatch.setattr(broadcast, "PERIOD_S", 0.05)
    hub.feed({"snapshot": SNAPSHOT})
    return hub


def opened(hub, say, slo_id, tenant="", outcome="met"):
    hub.open(slo_id, slo_class="chat", tenant=tenant, arrival_s=time.time())
    hub.feed({"verdicts": [say.verdict(slo_id)]})
    hub.feed({"finished": [say.finished(slo_id, outcome)]})


def read(event):
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


async def test_a_page_gets_the_whole_and_then_what_changed(hub, say):
    opened(hub, say, "first")
    events = Broadcast(hub).events(None)
    whole = read(await anext(events))
    assert whole["whole"]
    assert [one["id"] for one in whole["requests"]] == ["first"]
    assert whole["totals"]["chat"]["met"] == 1
    assert "replica" not in whole["status"]["snapshot"]
    opened(hub, say, "second", outcome="missed")
    changes = [read(await anext(events)) for _ in range(2)]
    told = {one["id"]: one["state"] for change in changes for one in change["requests"]}
    assert told["second"] == "broken"
    assert not any(change["whole"] for change in changes)
    assert read(await anext(events))["requests"] == []
    await events.aclose()


async def test_two_hundred_pages_share_one_encoding(hub, say, monkeypatch):
    made = []
    document = broadcast.Audience._document
    monkeypatch.setattr(broadcast.Audience, "_document", lambda self, *a: made.append(1) or document(self, *a))
    pages = Broadcast(hub)
    streams, seen = [pages.events(None) for _ in range(200)], set()
    for _ in range(5):
        told = [read(text) for text in await asyncio.gather(*(anext(stream) for stream in streams))]
        seen |= {(one["tick"], one["whole"]) for one in told}
    assert len(made) == len(seen), "one whole, one change a tick"
    for stream in streams:
        await stream.aclose()


async def test_a_page_that_reads_slowly_skips_and_gets_the_whole(hub, say):
    events = Broadcast(hub).events(None)
    channel_reader = Broadcast(hub)
    slow, fast = channel_reader.events(None), channel_reader.events(None)
    first = read(await anext(slow))
    for _ in range(4):
        read(await anext(fast))
    late = read(await anext(slow))
    assert late["tick"] > first["tick"] + 1
    assert late["whole"]
    for stream in (events, slow, fast):
        await stream.aclose()


async def test_a_tenant_sees_its_own_requests_and_no_load(hub, say):
    opened(hub, say, "mine", "acme")
    opened(hub, say, "theirs", "other")
    document = json.loads(Broadcast(hub).document("acme"))
    assert [one["id"] for one in document["requests"]] == ["mine"]
    assert "buckets" not in document
    assert "snapshot" not in document["status"]


async def test_a_stream_ends_where_the_engine_is_silent_so_that_a_server_can_shut_down(hub, monkeypatch):
    monkeypatch.setattr(type(hub), "is_heard", property(lambda self: False))
    assert [event async for event in Broadcast(hub).events(None)] == []


async def test_of_many_requests_those_in_trouble_are_told_before_others_crowd_them_out(hub, say):
    for i in range(5):
        opened(hub, say, f"late{i}", outcome="missed")
    for i in range(300):
        opened(hub, say, f"fine{i}")
    document = json.loads(Broadcast(hub).document(None))
    states = [one["state"] for one in document["requests"]]
    assert states.count("broken") == 5
    assert states.count("met") == 100


async def test_the_pages_answer_over_http_and_a_head_of_the_stream_ends(client, hub):
    answer = client.get("/v1/slo/live")
    assert answer.json()["status"]["object"] == "slo.status"
    assert client.head("/v1/slo/events").status_code == 200
