"""What a client of the OpenAI API sees, and what reaches the server inside."""

import asyncio
import contextlib
import json
import time

import pytest
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.testclient import TestClient

from slos_serve.config import ApiKey, SloClass, SloConfig
from slos_serve.http import health, seal
from slos_serve.http.middleware import SloMiddleware

CHAT = "/v1/chat/completions"
VOICE = SloClass(name="voice", ttft_ms=300, on_unattainable="reject")
IMPATIENT = SloClass(name="voice", ttft_ms=1, on_unattainable="reject")
REJECTING = {"config": SloConfig(classes={**SloConfig().classes, "voice": VOICE}, max_best_effort_queue=2).to_json()}
BUSY = {
    "effective_mode": "enforce",
    "num_best_effort": 5,
    "num_waiting": 5,
    "headroom_tokens_per_s": 0.0,
    "drain_s": 3.2,
}


def body(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "Hé 🌍"}], **more}


def promise(vllm, hub, say, kind="promised", reason="", **more):
    vllm.on_request = lambda xargs: hub.feed({"verdicts": [say.verdict(xargs["slo_id"], kind, reason, **more)]})


# -- what reaches the server inside ---------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_the_wish_becomes_xargs_and_nothing_else_changes(client, vllm, path):
    before = time.time()
    sent = body(slo={"class": "chat", "ttft_ms": 400}, vllm_xargs={"mine": 1, "slo_id": "forged", "slo_class": "tool"})
    assert client.post(path, json=sent, headers={"x-slo-tenant": "acme"}).status_code == 200
    (seen,) = vllm.seen
    xargs = seen.pop("vllm_xargs")
    assert before <= (arrival_s := xargs.pop("slo_arrival_s")) <= time.time()
    assert seal.is_sealed({"slo_id": xargs["slo_id"], "slo_arrival_s": arrival_s, "slo_seal": xargs.pop("slo_seal")})
    assert len(xargs.pop("slo_id")) == 32
    assert xargs == {"mine": 1, "slo_class": "chat", "slo_ttft_ms": 400, "slo_stage": "final"}
    del sent["vllm_xargs"]
    assert seen == sent


def test_a_request_that_says_nothing_arrives_byte_for_byte_and_is_answered_byte_for_byte(client, vllm, hub):
    raw = json.dumps(body(), indent=3).encode()
    response = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert vllm.seen == [json.loads(raw)]
    assert vllm.headers[0]["content-length"] == str(len(raw))
    assert response.json() == vllm.document
    assert not [name for name in response.headers if name.startswith("x-slo")]
    assert not hub._records
    streamed = client.post(CHAT, json=body(stream=True)).text
    assert streamed == "".join(vllm.events)


def test_the_clients_own_xargs_pass_even_when_they_make_no_sense(client, vllm):
    own = {"slo_class": "gold", "slo_ttft_ms": -5, "other": "x", "slo_arrival_s": 1}
    assert client.post(CHAT, json=body(vllm_xargs=own)).status_code == 200
    xargs = vllm.seen[0]["vllm_xargs"]
    assert xargs | {"slo_class": "gold", "slo_ttft_ms": -5, "other": "x"} == xargs
    assert xargs["slo_arrival_s"] != 1


def test_a_tenant_alone_is_told_to_the_engine_and_changes_no_answer(client, vllm, hub):
    hub.configure(slo={"config": SloConfig(api_keys={"acme": ApiKey(key_sha256=ApiKey.digest("sk-1"))}).to_json()})
    response = client.post(CHAT, json=body(), headers={"authorization": "Bearer sk-1"})
    assert set(vllm.seen[0]["vllm_xargs"]) == {"slo_tenant", "slo_id", "slo_arrival_s", "slo_seal"}
    assert response.json() == vllm.document
    assert not [name for name in response.headers if name.startswith("x-slo")]


@pytest.mark.parametrize("xargs", ["slo_class", [1], 5])
def test_xargs_that_are_not_an_object_are_left_for_vllm_to_refuse(client, vllm, xargs):
    client.post(CHAT, json=body(slo={"class": "chat"}, vllm_xargs=xargs))
    assert vllm.seen[0]["vllm_xargs"] == xargs


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"slo": {"class": "chat"}', b"\xff\xfe{", b'"slo"', b"[" * 100_000 + b'"slo']
)
def test_what_is_not_json_is_left_for_vllm_to_refuse(client, vllm, raw):
    with contextlib.suppress(RecursionError):
        client.post(CHAT, content=raw)
    assert not [seen for seen in vllm.seen if isinstance(seen, dict)]


def test_a_huge_body_in_many_pieces_arrives_whole(client, vllm):
    text = "ü🌍" * 1_000_000
    raw = json.dumps(body(prompt=text, slo={"class": "chat"}), ensure_ascii=False).encode()
    pieces = (raw[i : i + 65_536] for i in range(0, len(raw), 65_536))
    assert client.post(CHAT, content=pieces, headers={"content-type": "application/json"}).status_code == 200
    assert vllm.seen[0]["prompt"] == text
    assert vllm.seen[0]["vllm_xargs"]["slo_class"] == "chat"


def test_a_body_in_another_unicode_encoding_is_understood(client, vllm):
    for encoding in ("utf-16", "utf-8-sig"):
        client.post(CHAT, content=json.dumps(body(slo={"class": "chat"})).encode(encoding))
        assert vllm.seen[-1]["vllm_xargs"]["slo_class"] == "chat"


def test_other_paths_and_methods_pass_straight_through(client, vllm):
    assert client.get("/v1/models").json() == {"object": "list"}
    client.post("/v1/embeddings", json=body(slo={"class": "nonsense"}))
    assert "vllm_xargs" not in vllm.seen[0]
    assert client.get(CHAT).status_code == 405
    assert client.get("/nowhere").status_code == 404


def test_the_root_path_is_no_part_of_the_path(vllm, hub):
    with TestClient(SloMiddleware(vllm.app(), hub), root_path="/proxy") as client:
        assert client.post("/proxy" + CHAT, json=body(slo={"class": "nonsense"})).status_code == 400


# -- what the client gets -------------------------------------------------------------------------


def test_a_promise_is_in_headers_and_body(client, vllm, hub, say):
    promise(vllm, hub, say)
    response = client.post(CHAT, json=body(slo={"class": "chat"}))
    assert response.headers["x-slo-verdict"] == "promised"
    assert response.headers["x-slo-predicted-ttft-ms"] == "183"
    assert "x-slo-reason" not in response.headers
    assert int(response.headers["content-length"]) == len(response.content)
    slo_id = vllm.seen[0]["vllm_xargs"]["slo_id"]
    slo = {
        "id": slo_id,
        "class": "chat",
        "verdict": "promised",
        "reason": "",
        "predicted_ttft_ms": 183.4,
        "slack_ms": 12.5,
    }
    assert response.json() == {**vllm.document, "slo": slo, "service_tier": "default"}


@pytest.mark.parametrize(
    ("kind", "reason", "tier", "used"),
    [
        ("best-effort", "compute", "priority", "flex"),
        ("promised", "", "priority", "priority"),
        ("promoted", "", "auto", "default"),
    ],
)
def test_the_tier_that_was_used_is_told(client, vllm, hub, say, kind, reason, tier, used):
    promise(vllm, hub, say, kind, reason, predicted_ttft_ms=float("inf"), slack_ms=None)
    hub.configure(slo={"config": SloConfig(default_class="chat", priority_class="coding").to_json()})
    response = client.post(CHAT, json=body(service_tier=tier))
    assert response.headers["x-slo-verdict"] == kind
    assert response.headers.get("x-slo-reason", "") == reason
    assert "x-slo-predicted-ttft-ms" not in response.headers
    assert response.json()["service_tier"] == used
    assert "predicted_ttft_ms" not in response.json()["slo"]


def test_flex_is_best_effort_as_requested_without_asking_the_engine(client):
    response = client.post(CHAT, json=body(service_tier="flex", stream=True))
    assert (response.headers["x-slo-verdict"], response.headers["x-slo-reason"]) == ("best-effort", "requested")


def test_a_stream_carries_the_verdict_in_its_headers_and_its_last_chunk(client, vllm, hub, say, events):
    promise(vllm, hub, say)
    response = client.post(CHAT, json=body(slo={"class": "chat"}, stream=True))
    assert response.headers["x-slo-verdict"] == "promised"
    assert response.text.startswith("".join(vllm.events[:2]))
    assert response.text.endswith("data: [DONE]\n\n")
    last = events(response.text)[-1]
    assert last["slo"]["verdict"] == "promised"
    assert last["service_tier"] == "default"
    assert last["choices"] == [say.choice("", "stop")]


def test_a_demotion_after_the_headers_shows_in_the_last_chunk(client, vllm, hub, say, events):
    def on_request(xargs):
        hub.feed({"verdicts": [say.verdict(xargs["slo_id"])]})
        vllm.on_end = lambda: hub.feed({"verdicts": [say.verdict(xargs["slo_id"], "best-effort", "memory")]})

    vllm.on_request = on_request
    original = vllm.stream

    async def stream(request):
        async for item in original(request):
            if "stop" in item:
                vllm.on_end()
            yield item

    vllm.stream = stream
    response = client.post(CHAT, json=body(slo={"class": "chat"}, stream=True))
    assert response.headers["x-slo-verdict"] == "promised"
    assert events(response.text)[-1]["slo"]["reason"] == "memory"
    assert events(response.text)[-1]["service_tier"] == "flex"


def test_without_an_engine_that_plans_the_verdict_stays_pending_and_no_tier_is_claimed(client, vllm, events):
    response = client.post(CHAT, json=body(slo={"ttft_ms": 400}, stream=True))
    assert response.headers["x-slo-verdict"] == "pending"
    last = events(response.text)[-1]
    assert (last["slo"]["class"], last["slo"]["verdict"]) == ("custom", "pending")
    assert "service_tier" not in last
    assert client.post(CHAT, json=body(slo={"ttft_ms": 400})).json()["service_tier"] is None


def test_several_choices_finish_before_the_stream_is_annotated(client, vllm, hub, say, events):
    promise(vllm, hub, say)
    vllm.events[2:2] = [say.event(id="x", choices=[say.choice("", "length", 1)])]
    response = client.post(CHAT, json=body(slo={"class": "chat"}, stream=True, n=2))
    assert [("slo" in event) for event in events(response.text)] == [False, False, False, True]
    vllm.events[2:2] = [say.event(choices=[{"text": "", "finish_reason": "length"}])] * 4
    response = client.post(
        "/v1/completions", json=body(slo={"class": "chat"}, stream=True, n=2, prompt=["a", "b", "c"])
    )
    assert [("slo" in event) for event in events(response.text)].count(True) == 1


def test_an_error_of_the_server_inside_is_passed_on_as_it_is(client, vllm):
    vllm.status = 404
    for stream in (False, True):
        response = client.post(CHAT, json=body(slo={"class": "chat"}, stream=stream))
        assert response.status_code == 404
        assert response.json()["error"]["message"] == "no such model"
        assert "x-slo-verdict" not in response.headers
        assert len(response.headers["x-slo-id"]) == 32


def test_an_exception_before_the_first_chunk_is_a_500_because_nothing_was_sent_yet(app, vllm, hub):
    vllm.events.insert(0, RuntimeError("engine died"))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post(CHAT, json=body(slo={"class": "chat"}, stream=True)).status_code == 500
    assert hub.num_waiting == 0
    with pytest.raises(RuntimeError, match="engine died"), TestClient(app) as client:
        client.post(CHAT, json=body(slo={"class": "chat"}, stream=True))


@pytest.mark.parametrize("more", [{"stream": True}, {}])
@pytest.mark.parametrize(
    ("changes", "headers", "param", "value"),
    [
        ({"slo": {"class": "gold"}}, {}, "slo.class", "'gold'"),
        ({"slo": {"ttft_ms": -5}}, {}, "slo.ttft_ms", "-5"),
        ({"slo": {"ttft_ms": 5, "ttft_slowdown": 3}}, {}, "slo.ttft_slowdown", "3"),
        ({}, {"x-slo-ttft-ms": "fast"}, "x-slo-ttft-ms", "'fast'"),
    ],
)
def test_a_malformed_wish_is_a_400_in_vllms_words_and_never_reaches_the_engine(
    client, vllm, changes, headers, param, value, more
):
    response = client.post(CHAT, json=body(**changes, **more), headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)
    assert error["message"].startswith(f"{param} = {value}: expected ")
    assert vllm.seen == []


# -- refusals -------------------------------------------------------------------------------------


def test_a_full_best_effort_queue_refuses_before_the_engine(client, vllm, hub):
    hub.configure(slo=REJECTING)
    hub.feed({"snapshot": BUSY})
    for sent in (body(), body(service_tier="flex"), body(stream=True)):
        response = client.post(CHAT, json=sent)
        assert response.status_code == 429
        assert 4 <= int(response.headers["retry-after"]) <= 6  # not all come back at once
        assert response.headers["x-slo-reason"] == "queue-full"
        assert (response.json()["error"]["type"], response.json()["error"]["code"]) == ("Too Many Requests", 429)
    assert vllm.seen == []
    assert client.post(CHAT, json=body(slo={"class": "chat"})).status_code == 200


def test_a_class_that_asks_for_it_is_refused_when_nothing_is_left_to_promise(client, vllm, hub, registry):
    hub.configure(slo=REJECTING)
    hub.feed({"snapshot": BUSY})
    response = client.post(CHAT, json=body(slo={"class": "voice"}))
    assert (response.status_code, response.headers["x-slo-reason"]) == (429, "compute")
    assert vllm.seen == []
    labels = {"class": "voice", "tenant": "", "outcome": "rejected"}
    assert registry.get_sample_value("slos_serve_requests_total", labels) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_such_a_class_is_also_refused_when_the_planner_says_no(app, vllm, hub, say, stream):
    hub.configure(slo=REJECTING)
    vllm.seconds = 0.5
    threading_feed(hub, say, "best-effort", "memory")
    with TestClient(app) as client:
        started = time.monotonic()
        response = client.post(CHAT, json=body(slo={"class": "voice"}, stream=stream))
        assert time.monotonic() - started < 0.4
    assert (response.status_code, response.headers["x-slo-reason"]) == (429, "memory")
    assert hub.find(next(iter(hub._records)))["outcome"] == "rejected"
    assert vllm.is_closed


@pytest.mark.parametrize(("kind", "reason"), [("promised", ""), ("best-effort", "observe")])
def test_such_a_class_is_served_when_promised_or_only_observed(client, vllm, hub, say, kind, reason):
    hub.configure(slo=REJECTING)
    for stream in (True, False):
        promise(vllm, hub, say, kind, reason)
        response = client.post(CHAT, json=body(slo={"class": "voice"}, stream=stream))
        assert (response.status_code, response.headers["x-slo-verdict"]) == (200, kind)


def threading_feed(hub, say, kind, reason):
    """Give the next request its verdict 30 ms after it was opened, from another thread."""
    import threading

    opened = hub.open

    def opening(slo_id, **more):
        opened(slo_id, **more)
        threading.Timer(0.03, lambda: hub.feed({"verdicts": [say.verdict(slo_id, kind, reason)]})).start()

    hub.open = opening


# -- time: driven without a client library, which would wait for the whole answer -------------------


class Wire:
    """One connection: what was sent and when, and a client that can leave."""

    def __init__(self, app, sent, path=CHAT, headers=()):
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "query_string": b""}
        self.scope |= {"http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
        self.app, self.raw, self.got, self.times = app, json.dumps(sent).encode(), [], []
        self.gone, self.was_read = asyncio.Event(), False
        self.task = asyncio.create_task(self.run())

    async def run(self):
        await self.app(self.scope, self.receive, self.send)

    async def receive(self):
        if not self.was_read:
            self.was_read = True
            return {"type": "http.request", "body": self.raw, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.got.append(message)
        self.times.append(time.monotonic())

    @property
    def headers(self):
        return dict(self.got[0]["headers"])


async def test_the_headers_of_a_stream_come_with_the_verdict_before_the_first_chunk(app, vllm, hub, say):
    first = asyncio.Event()
    original = vllm.stream

    async def stream(request):
        vllm.on_request(request["vllm_xargs"])
        await first.wait()
        async for item in original(request):
            yield item

    vllm.stream = stream
    vllm.on_request = lambda xargs: None
    wire = Wire(app, body(slo={"class": "chat"}, stream=True))
    await asyncio.sleep(0.05)
    assert wire.got == []
    hub.feed({"verdicts": [say.verdict(vllm.seen[0]["vllm_xargs"]["slo_id"])]})
    await asyncio.sleep(0.05)
    assert [message["type"] for message in wire.got] == ["http.response.start"]
    assert wire.headers[b"x-slo-verdict"] == b"promised"
    first.set()
    await wire.task
    assert wire.got[-1]["more_body"] is False


async def test_the_headers_wait_no_longer_than_the_deadline(app, vllm, hub):
    async def stream(request):
        await asyncio.sleep(0.6)
        yield "data: [DONE]\n\n"

    vllm.stream = stream
    started = time.monotonic()
    wire = Wire(app, body(slo={"ttft_ms": 100}, stream=True))
    await wire.task
    assert 0.09 < wire.times[0] - started < 0.5
    assert wire.headers[b"x-slo-verdict"] == b"pending"


async def test_the_headers_come_with_the_first_chunk_at_the_latest(app, vllm):
    wire = Wire(app, body(slo={"class": "chat"}, stream=True))
    await wire.task
    assert wire.headers[b"x-slo-verdict"] == b"pending"
    assert wire.times[1] - wire.times[0] < 0.05


@pytest.mark.parametrize("slo", [{"class": "chat"}, {"class": "voice"}])
async def test_a_client_that_leaves_stops_the_server_inside_and_leaves_nothing_waiting(app, vllm, hub, say, slo):
    hub.configure(slo=REJECTING)
    vllm.events = [say.event(choices=[say.choice("x")])] * 1000
    for moment in (0.0, 0.03):
        wire = Wire(app, body(slo=slo, stream=True))
        await asyncio.sleep(moment)
        wire.gone.set()
        await asyncio.wait_for(wire.task, 1)
        await asyncio.sleep(0.01)
        assert hub.num_waiting == 0
    assert vllm.is_closed
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.wait(others, timeout=1) if others else None
    assert not [task for task in others if not task.done()]


async def test_a_client_that_leaves_while_sending_is_no_request(app, vllm, hub):
    messages = [{"type": "http.request", "body": b'{"slo":', "more_body": True}, {"type": "http.disconnect"}]
    wire = Wire(app, body())
    wire.receive = lambda: asyncio.sleep(0, messages.pop(0))
    with contextlib.suppress(Exception):
        await wire.task
    assert vllm.seen == []
    assert not hub._records


async def test_a_refusal_reaches_servers_that_expect_an_error_from_send(vllm, hub, say):
    hub.configure(slo=REJECTING)
    threading_feed(hub, say, "best-effort", "compute")
    ended = []

    async def inner(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            for _ in range(100):
                await asyncio.sleep(0.01)
                if _ > 20:
                    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        except OSError:
            ended.append("told")

    wire = Wire(SloMiddleware(inner, hub), body(slo={"class": "voice"}, stream=True))
    wire.scope["asgi"]["spec_version"] = "2.4"
    await wire.task
    assert ended == ["told"]
    assert wire.got[0]["status"] == 429


async def test_an_ordinary_chunk_is_passed_on_unchanged_and_at_once(vllm, hub, say):
    chunks = [say.event(choices=[say.choice(str(i))]).encode() for i in range(50)]
    sent = []

    async def inner(scope, receive, send):
        message = await receive()
        hub.feed({"verdicts": [say.verdict(json.loads(message["body"])["vllm_xargs"]["slo_id"])]})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            sent.append(len(wire.got))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    wire = Wire(SloMiddleware(inner, hub), body(slo={"class": "chat"}, stream=True))
    await wire.task
    assert sent == list(range(2, 52))
    assert all(message["body"] is chunk for message, chunk in zip(wire.got[1:-1], chunks, strict=True))


# -- pages ----------------------------------------------------------------------------------------


def test_pages_say_what_can_be_asked_and_what_came_of_it(client, vllm, hub, say):
    hub.configure(slo={"mode": "observe", "config": SloConfig(tenants={"acme": "chat"}).to_json()}, model="m")
    classes = client.get("/v1/slo/classes").json()
    assert [item["id"] for item in classes["data"]][:2] == ["chat", "coding"]
    assert "acme" not in json.dumps(classes)
    status = client.get("/v1/slo/status").json()
    assert (status["mode"], status["model"], status["snapshot"]) == ("observe", "m", None)
    hub.feed({"snapshot": {**BUSY, "drain_s": float("inf"), "nested": [float("nan")]}})
    status = client.get("/v1/slo/status").json()
    assert (status["effective_mode"], status["snapshot"]["drain_s"]) == ("enforce", None)
    promise(vllm, hub, say)
    slo_id = client.post(CHAT, json=body(slo={"class": "chat"})).json()["slo"]["id"]
    record = client.get(f"/v1/slo/requests/{slo_id}").json()
    assert (record["verdict"], record["object"]) == ("promised", "slo.request")
    assert client.get(f"/v1/slo/requests/chatcmpl-{slo_id}").json()["id"] == slo_id
    assert client.get("/v1/slo/requests/nobody").status_code == 404
    assert client.get("/v1/slo/status/").json()["model"] == "m"
    head = client.head("/v1/slo/status")
    assert (head.status_code, head.content, int(head.headers["content-length"]) > 0) == (200, b"", True)
    assert "requests/ID" in client.get("/v1/slo/else").json()["error"]["message"]


def test_pages_and_bodies_stay_behind_the_servers_own_key_check(vllm, hub):
    inner = vllm.app()

    async def guarded(scope, receive, send):
        if (b"authorization", b"Bearer sk-1") in scope["headers"]:
            return await inner(scope, receive, send)
        await send({"type": "http.response.start", "status": 401, "headers": [(b"access-control-allow-origin", b"*")]})
        return await send({"type": "http.response.body", "body": b"{}"})

    app = SloMiddleware(guarded, hub)
    client = TestClient(app)
    for path in ("classes", "status", "requests/x"):
        assert client.get(f"/v1/slo/{path}").status_code == 401
    assert client.get("/v1/slo/classes", headers={"authorization": "Bearer sk-1"}).status_code == 200
    assert client.post(CHAT, json=body(slo={"class": "gold"})).status_code == 401
    assert not hub._records


@pytest.mark.parametrize("path", ["/health", "/ping", "/readyz"])
def test_a_server_that_is_being_profiled_lives_and_is_not_ready(client, hub, tmp_path, path):
    hub.configure(slo={"profile": str(tmp_path / "p.json")})
    assert (client.get(path).status_code, client.get(path).json()) == (503, {"status": "profiling"})
    alive = client.get("/livez")
    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    hub.feed({"snapshot": {"profile": {"r2": 0.99}}})
    assert client.get(path).status_code == 200
    assert client.head("/livez").status_code == 200


@pytest.mark.parametrize("kind", ["new", "all"])
def test_a_server_that_its_operator_has_paused_lives_and_is_not_ready(client, hub, kind):
    hub.feed({"snapshot": {"paused": kind, "num_running": 3, "steps": 7}})
    hub._snapshots._worked_s -= 3600
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (503, {"status": "paused"})
    assert client.get("/livez").status_code == client.get("/health").status_code == 200
    hub.feed({"snapshot": {"paused": "", "num_running": 3, "steps": 8}})
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_server_whose_engine_is_hung_does_not_live(client, hub, path):
    hub.feed({"snapshot": {"num_running": 1, "steps": 7}})
    assert client.get(path).status_code == 200
    hub._snapshots._worked_s -= health.STALLED_S + 1
    assert (client.get(path).status_code, client.get(path).json()) == (503, {"status": "stalled"})
    hub.feed({"snapshot": {"num_running": 0, "steps": 7}})
    assert client.get(path).status_code == 200  # idle: it makes no steps
    hub._snapshots._taken_s -= health.SILENT_S + 1
    assert (client.get(path).status_code, client.get(path).json()) == (503, {"status": "silent"})
    hub.is_front = True
    assert client.get(path).status_code == 200  # replicas are watched by others


def test_nobody_needs_a_key_to_ask_whether_the_server_lives(vllm, hub):
    class Locked:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            refused = scope["type"] == "http" and scope["path"].startswith("/v1")
            await (Response(status_code=401) if refused else self.app)(scope, receive, send)

    with TestClient(vllm.app(Middleware(SloMiddleware, hub=hub), Middleware(Locked))) as client:
        assert client.get("/v1/slo/status").status_code == 401
        assert [client.get(path).status_code for path in ("/livez", "/readyz", "/health")] == [200, 200, 200]


def test_health_is_not_ready_before_the_profile_except_for_our_own_probe(client, hub, tmp_path):
    assert client.get("/health").status_code == 200
    hub.configure(slo={"profile": str(tmp_path / "p.json")})
    response = client.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "profiling"})
    assert client.get("/health", headers={"x-slos-serve-probe": "1"}).status_code == 200
    hub.feed({"snapshot": {"profile": {"r2": 0.99}}})
    assert client.get("/health").status_code == 200


async def test_other_kinds_of_connections_pass(hub):
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["type"])

    app = SloMiddleware(inner, hub)
    for kind in ("lifespan", "websocket"):
        await app({"type": kind, "path": CHAT}, None, None)
    assert seen == ["lifespan", "websocket"]


def test_every_request_is_counted_once(client, vllm, hub, say, registry):
    hub.configure(slo=REJECTING)

    def on_request(xargs):
        slo_id = xargs["slo_id"]
        hub.feed({"verdicts": [say.verdict(slo_id)], "finished": [say.finished(slo_id, tenant="t")]})

    vllm.on_request = on_request
    for _ in range(5):
        client.post(CHAT, json=body(slo={"class": "chat"}))
    for _ in range(4):
        client.post(CHAT, json=body(slo={"class": "gold"}))
    hub.feed({"snapshot": BUSY})
    for _ in range(3):
        client.post(CHAT, json=body(slo={"class": "voice"}))
    samples = [s for m in registry.collect() for s in m.samples if s.name == "slos_serve_requests_total" and s.value]
    assert sorted((s.labels["outcome"], s.value) for s in samples) == [("met", 5), ("rejected", 3)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_verdict_that_is_slower_than_its_tokens_still_makes_the_end_of_the_response(
    client, vllm, hub, say, events, stream
):
    hub.feed({"snapshot": {"effective_mode": "enforce"}})
    vllm.events = vllm.events[-2:]
    threading_feed(hub, say, "promised", "")
    response = client.post(CHAT, json=body(slo={"class": "chat"}, stream=stream))
    last = events(response.text)[-1] if stream else response.json()
    assert (last["slo"]["verdict"], last["service_tier"]) == ("promised", "default")


@pytest.mark.parametrize("stream", [True, False])
def test_a_no_that_is_slower_than_the_first_token_still_refuses(client, vllm, hub, say, stream):
    hub.configure(slo={"config": SloConfig(classes={**SloConfig().classes, "voice": IMPATIENT}).to_json()})
    hub.feed({"snapshot": {"effective_mode": "enforce"}})
    threading_feed(hub, say, "best-effort", "deadline-passed")
    response = client.post(CHAT, json=body(slo={"class": "voice"}, stream=stream))
    assert (response.status_code, response.headers["x-slo-reason"]) == (429, "deadline-passed")
