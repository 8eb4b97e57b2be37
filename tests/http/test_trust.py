"""What a client says of itself is not believed, on whatever route and however it is spelled."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from slos_serve.config import ApiKey, SloClass, SloConfig, short
from slos_serve.http import seal
from slos_serve.http.middleware import SloMiddleware
from slos_serve.http.routes import ROUTES

CHAT = "/v1/chat/completions"
CARRYING = [path for path, route in ROUTES.items() if route.place]
SILENT = [path for path, route in ROUTES.items() if not route.place]
FORGED = {"slo_id": "victim", "slo_arrival_s": 1.0, "slo_tenant": "gold", "slo_seal": "0" * 64, "slo_more": "x" * 9999}
VOICE = SloClass(name="voice", ttft_ms=300, on_unattainable="reject")
ACME_KEY = {"authorization": "Bearer sk-1"}


def configure(hub, **config):
    hub.configure(slo={"config": SloConfig(**config).to_json()}, model="m")


def body(path=CHAT, xargs=None, **more):
    sent = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}
    if xargs is not None and path == "/inference/v1/generate":
        return {**sent, "sampling_params": {"max_tokens": 5, "extra_args": xargs}}
    return sent if xargs is None else {**sent, "vllm_xargs": xargs}


def told(seen, path=CHAT):
    """Return what the engine would hear."""
    return ROUTES[path].arguments(seen) or {}


@pytest.fixture
def spelled():
    """Spell keys as a client may that hopes not to be read."""

    def spelled(document):
        raw = json.dumps(document)
        for word in ("vllm_xargs", "extra_args", "slo_id", "slo_arrival_s", "slo_tenant", "slo_seal"):
            raw = raw.replace(f'"{word}"', f'"\\u{ord(word[0]):04x}{word[1:]}"')
        return raw

    return spelled


@pytest.mark.parametrize("path", CARRYING)
def test_what_an_edge_alone_may_say_is_taken_out_of_every_routes_body(client, vllm, path):
    assert client.post(path, json=body(path, {**FORGED, "mine": 1})).status_code == 200
    assert told(vllm.seen[0], path) == {"mine": 1}


@pytest.mark.parametrize("path", CARRYING)
def test_a_wish_is_heard_on_every_route_and_sealed(client, vllm, path):
    xargs = {**FORGED, "mine": 1}
    assert client.post(path, json=body(path, xargs), headers={"x-slo-class": "coding"}).status_code == 200
    heard = told(vllm.seen[0], path)
    assert (heard["mine"], heard["slo_class"], heard["slo_id"] != "victim") == (1, "coding", True)
    assert "slo_more" not in heard
    assert "slo_tenant" not in heard
    assert seal.is_sealed(heard)
    assert vllm.seen[0]["model"] == "m"


@pytest.mark.parametrize("path", CARRYING)
def test_escapes_hide_nothing(client, vllm, spelled, path):
    client.post(path, content=spelled(body(path, FORGED)), headers={"content-type": "application/json"})
    assert told(vllm.seen[0], path) == {}


def test_a_clients_own_arguments_are_class_and_numbers_and_short(client, vllm):
    client.post(CHAT, json=body(xargs={"slo_class": "x" * 5000, "slo_ttft_ms": 400, **FORGED}))
    heard = told(vllm.seen[0])
    assert seal.is_sealed(heard)
    assert set(heard) == {"slo_class", "slo_ttft_ms", "slo_id", "slo_arrival_s", "slo_seal"}
    assert all(len(str(value)) <= 128 for value in heard.values())


@pytest.mark.parametrize("path", SILENT)
def test_a_route_that_carries_no_promise_says_so_to_who_asks_for_one(client, vllm, hub, path):
    form = {"content-type": "multipart/form-data; boundary=x", "x-slo-class": "chat"}
    assert client.post(path, content=b"--x\r\n\r\n--x--", headers=form).status_code == 400
    assert client.post(path, json=body(slo={"class": "chat"})).json()["error"]["param"] == "slo"
    assert vllm.seen == []
    configure(hub, max_best_effort_queue=1)
    hub.feed({"snapshot": {"effective_mode": "enforce", "num_best_effort": 5, "num_waiting": 5}})
    assert client.post(path, json=body()).status_code == 429


@pytest.mark.parametrize("path", ROUTES)
def test_the_operators_key_to_class_mapping_has_no_side_door(client, vllm, hub, path):
    keys = {"free": ApiKey(key_sha256=ApiKey.digest("sk-1"), slo_class="best-effort")}
    configure(hub, api_keys=keys, unknown_keys="refuse")
    sent = body(path, {"slo_class": "chat", "slo_ttft_ms": 5})
    assert client.post(path, json=sent).status_code == 401
    twice = [("authorization", "Bearer sk-1"), ("authorization", "Bearer junk")]
    assert client.post(path, json=sent, headers=twice).status_code == 400
    assert vllm.seen == []
    assert client.post(path, json=sent, headers={"authorization": "Bearer sk-1"}).status_code == 200
    if path in CARRYING:
        heard = told(vllm.seen[0], path)
        assert (heard["slo_class"], heard["slo_tenant"], "slo_ttft_ms" in heard) == ("best-effort", "free", False)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    xargs=st.dictionaries(
        st.sampled_from(["slo_id", "slo_tenant", "slo_arrival_s", "slo_seal", "slo_class", "slo_x", "other"]),
        st.one_of(st.text(max_size=300), st.floats(), st.integers(), st.lists(st.text()), st.none(), st.booleans()),
    ),
    ascii_only=st.booleans(),
    wish=st.sampled_from([{}, {"slo": {"class": "chat"}}, {"service_tier": "flex"}]),
)
def test_no_body_makes_the_engine_believe_a_client(client, vllm, hub, xargs, ascii_only, wish):
    vllm.seen.clear()
    try:
        raw = json.dumps(body(xargs=xargs, **wish), ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return  # half of a surrogate pair is no text
    client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    for seen in vllm.seen:
        heard = told(seen)
        assert not [key for key in heard if key.startswith("slo_")] or seal.is_sealed(heard)
        assert heard.get("slo_tenant") is None
        assert heard.get("slo_id") is None or len(heard["slo_id"]) == 32


def test_a_seal_is_for_one_request_of_one_start(monkeypatch):
    told = seal.sealed({"slo_id": "a", "slo_arrival_s": 5.25, "slo_tenant": "acme", "slo_class": "chat"})
    assert seal.is_sealed(told)
    assert seal.is_sealed({**told, "slo_class": "coding"})  # any client may say that
    for key in ("slo_id", "slo_tenant"):
        assert not seal.is_sealed({**told, key: "other"})
    assert not seal.is_sealed({**told, "slo_arrival_s": 5.26})
    for bad in ("", "é", 5, None, ["x"], "0" * 64):
        assert not seal.is_sealed({**told, "slo_seal": bad})
    monkeypatch.setenv(seal.ENVIRONMENT, "another start")
    assert not seal.is_sealed(told)


# -- time -----------------------------------------------------------------------------------------


def test_a_slow_sender_has_not_waited(client, vllm, hub):
    raw = json.dumps(body(slo={"class": "chat"})).encode()

    def trickle():
        yield raw[:10]
        time.sleep(0.2)
        yield raw[10:]

    before = time.time()
    client.post(CHAT, content=trickle(), headers={"content-type": "application/json"})
    heard = told(vllm.seen[0])
    assert heard["slo_arrival_s"] >= before + 0.2
    assert hub.find(heard["slo_id"])["upload_ms"] >= 200


# -- size -----------------------------------------------------------------------------------------


def test_a_body_beyond_the_operators_limit_is_a_413_and_not_read_on(client, vllm, hub):
    configure(hub, max_body_bytes=1000)
    num_read = 0

    def endless():
        nonlocal num_read
        while num_read < 1000:
            num_read += 1
            yield b"x" * 500

    response = client.post(CHAT, content=endless())
    assert (response.status_code, response.json()["error"]["code"]) == (413, 413)
    assert vllm.seen == []
    assert client.post(CHAT, json=body()).status_code == 200


def test_names_are_short_and_stay_different():
    one, other = "x" * 500 + "1", "x" * 500 + "2"
    assert short("abc") == "abc"
    assert len(short(one)) == 128
    assert short(one) != short(other)


HALF = "\\ud800"  # of a surrogate pair, as JSON can say it and no encoding holds it


@pytest.mark.parametrize(
    "slo",
    [
        f'{{"{HALF}": 1}}',
        f'{{"class": "{HALF}"}}',
        f'{{"stage": "{HALF}"}}',
        f'{{"class": "chat", "tenant": "{HALF}"}}',
    ],
)
@pytest.mark.parametrize("path", CARRYING)
def test_what_no_encoding_holds_is_refused_in_words_that_hold_it(client, vllm, path, slo):
    raw = f'{{"model": "m", "messages": [], "slo": {slo}}}'
    refused = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("slo")
    assert vllm.seen == []


@pytest.mark.parametrize(
    "order", [f'{{"{HALF}": 1}}', f'{{"mode": "{HALF}"}}', f'{{"mode": "observe", "class": "{HALF}"}}']
)
def test_an_order_that_no_encoding_holds_is_refused_too(client, hub, order):
    configure(hub, api_keys=KEYS)
    headers = {**OPS, "content-type": "application/json"}
    assert client.post("/v1/slo/mode", content=order, headers=headers).status_code == 400


def test_a_name_that_no_encoding_holds_closes_no_page(client, hub):
    raw = f'{{"model": "m", "messages": [], "slo": {{"class": "chat"}}, "request_id": "{HALF}"}}'
    assert client.post(CHAT, content=raw, headers={"content-type": "application/json"}).status_code == 200
    for page in ("/v1/slo/requests", "/v1/slo/status", "/metrics"):
        assert client.get(page).status_code in {200, 404}


@pytest.fixture
def usual_depth():
    """Python's own limit of frames, which libraries of other tests raise."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("usual_depth")
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b'{"model": "m", "x": ' + b"[" * 5000]
)
def test_what_is_nested_too_deeply_for_anybody_is_a_400_and_goes_no_further(client, vllm, path, raw):
    refused = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "body")
    assert vllm.seen == []


def test_many_brackets_are_no_deep_nesting(client, vllm):
    prompts = [[1, 2, 3]] * 2000
    deep = json.loads("[" * 50 + "]" * 50)
    for _ in range(2):
        assert (
            client.post("/v1/completions", json={"model": "m", "prompt": prompts, "metadata": deep}).status_code == 200
        )
    assert vllm.seen[0]["prompt"] == prompts


# -- a gateway's address --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "10.0.0.5",
        "1.2.3.4, 10.0.0.5",
        "10.0.0.5, 1.2.3.4",
        "10.0.0.5:80",
        "::ffff:10.0.0.5",
        "[::ffff:10.0.0.5]:1",
        " 10.0.0.5 ",
    ],
)
@pytest.mark.parametrize("peer", ["10.0.0.5", "::ffff:10.0.0.5"])
def test_an_address_that_a_header_says_is_no_gateways(app, hub, vllm, peer, said):
    configure(hub, trusted_proxies=("10.0.0.0/8",))
    with TestClient(app, client=(peer, 0)) as client:
        headers = [("x-forwarded-for", "9.9.9.9"), ("x-forwarded-for", said), ("x-slo-tenant", "gold")]
        assert client.post(CHAT, json=body(slo={"class": "chat"}), headers=headers).status_code == 200
    assert "slo_tenant" not in told(vllm.seen[0])


def test_a_gateway_that_says_for_whom_it_asks_is_believed(app, hub, vllm):
    configure(hub, trusted_proxies=("10.0.0.0/8",))
    with TestClient(app, client=("10.0.0.5", 4711)) as client:
        headers = {"x-forwarded-for": "1.2.3.4, 10.1.1.1", "x-slo-tenant": "gold"}
        client.post(CHAT, json=body(slo={"class": "chat"}), headers=headers)
    assert told(vllm.seen[0])["slo_tenant"] == "gold"


@pytest.mark.parametrize(
    ("unknown_keys", "headers", "enters"), [("refuse", {}, False), ("refuse", ACME_KEY, True), ("default", {}, True)]
)
def test_a_websocket_is_no_side_door_for_strangers(hub, unknown_keys, headers, enters):
    async def echo(scope, receive, send):
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})

    configure(hub, api_keys={"acme": ApiKey(key_sha256=ApiKey.digest("sk-1"))}, unknown_keys=unknown_keys)
    client = TestClient(SloMiddleware(echo, hub))
    if enters:
        with client.websocket_connect("/v1/realtime", headers=headers):
            return
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime", headers=headers):
        pass


# -- a tenant's share -----------------------------------------------------------------------------


def together(client, count, headers, **more):
    """Send requests at the same time; return their statuses, in order of size."""
    with ThreadPoolExecutor(count) as threads:
        asked = [threads.submit(client.post, CHAT, json=body(**more), headers=headers) for _ in range(count)]
        return sorted(one.result().status_code for one in asked)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tenant_has_so_many_answers_under_way_and_the_next_is_refused(client, vllm, hub, registry, stream):
    configure(hub, api_keys=KEYS, max_requests_per_tenant=2)
    vllm.seconds = 0.5
    with ThreadPoolExecutor(2) as threads:
        of_acme = threads.submit(together, client, 3, ACME, stream=stream)
        of_beta = threads.submit(together, client, 2, BETA, stream=stream)
        assert (of_acme.result(), of_beta.result()) == ([200, 200, 429], [200, 200])
    assert together(client, 2, ACME, stream=stream) == [200, 200]  # room is given back
    assert not hub._under_way
    rejected = {"class": "best-effort", "outcome": "rejected", "tenant": "acme"}
    assert registry.get_sample_value("slos_serve_requests_total", rejected) == 1


def test_several_answers_to_one_request_count_as_several(client, vllm, hub):
    configure(hub, api_keys=KEYS, max_requests_per_tenant=4)
    assert client.post(CHAT, json=body(n=4), headers=ACME).status_code == 200
    too_many = client.post("/v1/completions", json={"model": "m", "prompt": ["a", "b", "c"], "n": 2}, headers=ACME)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
    assert hub.admit("acme", 2)  # somebody's, under way
    refused = client.post(CHAT, json=body(n=3), headers=ACME)
    assert (refused.status_code, refused.headers["x-slo-reason"]) == (429, "tenant-full")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert client.post(CHAT, json=body(n=2), headers=ACME).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
def test_strangers_share_one_share_on_every_route_whatever_they_call_themselves(client, vllm, hub, path):
    configure(hub, max_requests_per_tenant=1)
    assert hub.admit("", 1)
    refused = client.post(path, json=body(path), headers={"x-slo-tenant": "gold"} if path in CARRYING else {})
    assert (refused.status_code, vllm.seen) == (429, [])


def test_what_goes_wrong_on_the_way_gives_its_room_back(client, vllm, hub):
    configure(hub, max_requests_per_tenant=1)
    vllm.status = 404
    assert [client.post(CHAT, json=body()).status_code for _ in range(3)] == [404] * 3
    vllm.status = 200
    vllm.events = [RuntimeError("engine died")]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="engine died"):
            client.post(CHAT, json=body(stream=True))
    assert not hub._under_way


# -- one's own requests ---------------------------------------------------------------------------


ACME, BETA, OPS = ({"authorization": f"Bearer {key}"} for key in ("sk-1", "sk-2", "sk-3"))
KEYS = {
    "acme": ApiKey(key_sha256=ApiKey.digest("sk-1")),
    "beta": ApiKey(key_sha256=ApiKey.digest("sk-2")),
    "ops": ApiKey(key_sha256=ApiKey.digest("sk-3"), admin=True),
}


def test_a_tenant_sees_its_own_requests_alone_and_its_operator_all(client, vllm, hub):
    configure(hub, api_keys=KEYS)
    client.post(CHAT, json=body(slo={"class": "chat"}), headers={**ACME, "x-request-id": "abc"})
    slo_id = told(vllm.seen[0])["slo_id"]
    for name in (slo_id, "abc"):
        page = f"/v1/slo/requests/{name}"
        assert [client.get(page, headers=who).status_code for who in (ACME, BETA, {}, OPS)] == [200, 404, 404, 200]
    recent = [client.get("/v1/slo/requests", headers=who).json()["data"] for who in (ACME, BETA, {}, OPS)]
    assert [[one["id"] for one in page] for page in recent] == [[slo_id], [], [], [slo_id]]
    hub.feed({"snapshot": {"effective_mode": "enforce", "num_promised": 3}})
    assert "snapshot" not in client.get("/v1/slo/status", headers=ACME).json()
    assert client.get("/v1/slo/status", headers=OPS).json()["snapshot"]["num_promised"] == 3
    assert client.get("/v1/slo/classes", headers=[*ACME.items(), *BETA.items()]).status_code == 400


def test_why_a_request_was_not_promised_is_told_without_the_others_but_to_operators(client, vllm, hub, say):
    configure(hub, api_keys=KEYS)
    vllm.on_request = lambda xargs: hub.feed(
        {"verdicts": [say.verdict(xargs["slo_id"], "best-effort", "compute", tenant="acme")]}
    )
    client.post(CHAT, json=body(slo={"class": "chat"}), headers={**ACME, "x-request-id": "abc"})
    page = "/v1/slo/requests/abc/explanation"
    assert "no engine" in client.get(page, headers=ACME).json()["note"]

    def silent(order):
        raise TimeoutError("it does not answer")

    hub.controls.append(silent)
    assert client.get(page, headers=ACME).json()["note"] == "it does not answer"
    answers = [{"pending": True}, *[{"explanation": {"binding": "compute", "without": ["beta"], "num_at_risk": 2}}] * 2]
    hub.controls.append(lambda order: answers.pop(0))
    assert client.get(page, headers=ACME).json()["explanation"] == {"binding": "compute"}
    assert client.get(page, headers=OPS).json()["explanation"]["without"] == ["beta"]
    assert client.get(page, headers=BETA).status_code == 404


def test_nobody_takes_another_tenants_name_for_a_request(client, vllm, hub):
    configure(hub, api_keys=KEYS)
    for who in (BETA, ACME, BETA):
        client.post(CHAT, json=body(slo={"class": "chat"}), headers={**who, "x-request-id": "same"})
    assert client.get("/v1/slo/requests/same", headers=ACME).json()["id"] == told(vllm.seen[1])["slo_id"]
    assert client.get("/v1/slo/requests/same", headers=BETA).json()["id"] == told(vllm.seen[2])["slo_id"]


def test_one_tenants_requests_do_not_push_out_anothers(hub):
    hub.open("mine", slo_class="chat", tenant="acme", arrival_s=0.0)
    for i in range(5000):
        hub.open(f"junk{i}", slo_class="chat", tenant="beta", arrival_s=0.0, client_id=f"x{i}")
    assert hub.find("mine")["tenant"] == "acme"
    assert len(hub._records) == 4096
    assert hub.find("junk0") is None
    assert hub.find("x0") is None
    assert hub.find("x4999")["id"] == "junk4999"


def test_pages_can_be_for_operators_or_for_nobody(client, hub):
    configure(hub, api_keys=KEYS, pages="admin")
    codes = [client.get("/v1/slo/status", headers=who).status_code for who in ({}, ACME, OPS)]
    assert codes == [404, 404, 200]
    configure(hub, api_keys=KEYS, pages="off")
    assert client.get("/v1/slo/status", headers=OPS).status_code == 404
    assert client.post("/v1/slo/mode", json={"mode": "observe"}, headers=OPS).status_code == 404


def test_tenants_that_the_operator_names_keep_their_labels_however_many_others_come(hub):
    configure(hub, api_keys=KEYS, tenants={"gold": "chat"})
    for i in range(200):
        hub.metrics.count_outcome("chat", f"user{i}", "met")
    assert [hub.metrics.tenant(name) for name in ("", "acme", "gold", "user0", "user199")] == [
        *("", "acme", "gold", "user0", "other")
    ]


# -- what is answered in the place of the server inside --------------------------------------------


@pytest.fixture
def browser(vllm, hub):
    cors = Middleware(CORSMiddleware, allow_origins=["*"], expose_headers=["x-theirs"])
    with TestClient(vllm.app(Middleware(SloMiddleware, hub=hub), cors)) as client:
        client.headers["origin"] = "https://app.example"
        yield client


@pytest.mark.parametrize("stream", [True, False])
def test_our_own_answers_wear_the_headers_of_the_servers_middlewares(browser, hub, stream):
    configure(hub, classes={**SloConfig().classes, "voice": VOICE}, max_best_effort_queue=1)
    hub.feed({"snapshot": {"effective_mode": "enforce", "headroom_tokens_per_s": 0.0}})
    bad = browser.post(CHAT, json=body(slo={"class": "nobody"}, stream=stream))
    refused = browser.post(CHAT, json=body(slo={"class": "voice"}, stream=stream))
    served = browser.post(CHAT, json=body(slo={"class": "chat"}, stream=stream))
    assert [one.status_code for one in (bad, refused, served)] == [400, 429, 200]
    for response in (bad, refused, served, browser.get("/v1/slo/status")):
        assert response.headers["access-control-allow-origin"] == "*"
        exposed = response.headers["access-control-expose-headers"]
        assert exposed.startswith("x-theirs, ")
        assert {"x-slo-verdict", "x-slo-reason", "retry-after"} <= set(exposed.split(", "))
    assert refused.headers["x-slo-class"] == "voice"
    assert served.headers["x-slo-id"] == browser.get(f"/v1/slo/requests/{served.headers['x-slo-id']}").json()["id"]


def test_an_attempt_that_is_made_again_is_refused_again_and_counted_once(client, hub, registry):
    configure(hub, classes={**SloConfig().classes, "voice": VOICE})
    hub.feed({"snapshot": {"effective_mode": "enforce", "headroom_tokens_per_s": 0.0}})
    for count in ("0", "1", "2"):
        response = client.post(CHAT, json=body(slo={"class": "voice"}), headers={"x-stainless-retry-count": count})
        assert response.status_code == 429
    labels = {"class": "voice", "tenant": "", "outcome": "rejected"}
    assert registry.get_sample_value("slos_serve_requests_total", labels) == 1


def test_a_class_that_asks_to_be_refused_cannot_be_answered_before_its_verdict(client, vllm, hub):
    configure(hub, classes={**SloConfig().classes, "voice": VOICE})
    response = client.post("/v1/responses", json=body(slo={"class": "voice"}, background=True))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "background")
    assert vllm.seen == []
    assert client.post("/v1/responses", json=body(slo={"class": "chat"}, background=True)).status_code == 200


def test_a_stored_response_says_what_its_first_answer_said(client, vllm, hub, say):
    vllm.document = {"id": "resp_1", "status": "completed", "service_tier": "auto"}
    vllm.on_request = lambda xargs: hub.feed(
        {
            "verdicts": [say.verdict(xargs["slo_id"], request_id="resp_1_0-0a1b2c3d")],
            "finished": [say.finished(xargs["slo_id"], request_id="resp_1_0-0a1b2c3d")],
        }
    )
    client.post("/v1/responses", json=body(slo={"class": "chat"}))
    stored = client.get("/v1/responses/resp_1").json()
    assert (stored["slo"]["verdict"], stored["slo"]["outcome"], stored["service_tier"]) == (
        "promised",
        "met",
        "default",
    )
    assert "slo" not in client.get("/v1/responses/resp_2").json()


def test_a_stream_of_messages_is_annotated_in_its_last_event(client, vllm, hub, say):
    vllm.on_request = lambda xargs: hub.feed({"verdicts": [say.verdict(xargs["slo_id"])]})
    vllm.events = ['event: message_start\ndata: {"type":"message_start"}\n\n']
    vllm.events += ['event: message_stop\ndata: {"type":"message_stop"}\n\n']
    response = client.post("/v1/messages", json=body(stream=True), headers={"x-slo-class": "chat"})
    assert response.headers["x-slo-verdict"] == "promised"
    start, stop, _ = response.text.split("\n\n")
    assert start == vllm.events[0].strip()
    data = json.loads(stop.partition("data: ")[2])
    assert (data["type"], data["slo"]["verdict"], "service_tier" in data) == ("message_stop", "promised", False)


def test_an_end_within_a_text_ends_no_stream(say):
    text = say.event(choices=[say.choice("data: [DONE]\n\nevent: message_stop\n")]).encode()
    for path in CARRYING:
        tail = ROUTES[path].tail(dict, 1)
        assert not tail.ends_in(text)
    assert ROUTES[CHAT].tail(dict, 1).ends_in(text + b"data: [DONE]\n\n")
    assert ROUTES["/v1/messages"].tail(dict, 1).ends_in(text + b"event: message_stop\ndata: {}\n\n")


# -- who may switch -------------------------------------------------------------------------------

MODE = "/v1/slo/mode"


@pytest.fixture
def orders(hub):
    taken = []
    hub.controls.append(lambda order: taken.append(order) or {"mode": order["mode"], "effective_mode": order["mode"]})
    return taken


def post(app, peer=("127.0.0.1", 5), **options):
    with TestClient(app, client=peer) as client:
        return client.post(MODE, **{"json": {"mode": "observe"}, **options}).status_code


def test_without_an_admin_only_this_machine_switches(app, orders):
    assert post(app, ("203.0.113.9", 5)) == 403
    for name in ("origin", "x-forwarded-for", "forwarded", "via", "x-real-ip"):
        assert post(app, headers={name: "https://evil.example"}) == 403
    assert orders == []
    assert [post(app), post(app, ("::1", 5)), post(app, None)] == [200, 200, 200]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/json"]
)
def test_what_a_browser_posts_without_asking_is_no_order(app, orders, kind):
    assert post(app, json=None, content=b'{"mode": "observe"}', headers={"content-type": kind}) == 415
    assert orders == []


def test_where_there_is_an_admin_its_key_alone_switches_from_anywhere(app, hub, orders):
    configure(hub, api_keys=KEYS)
    for headers in ({}, ACME, {"authorization": "Bearer x"}):
        assert post(app, headers=headers) == 403
    assert orders == []
    assert post(app, ("203.0.113.9", 5), headers=OPS) == 200


def test_engines_are_asked_at_once_and_the_switched_are_counted(app, hub, orders):
    def silent(order):
        raise TimeoutError("the engine did not answer within 2 s")

    hub.controls.append(silent)
    with TestClient(app, client=("127.0.0.1", 5)) as client:
        response = client.post(MODE, json={"mode": "observe"})
    assert response.status_code == 503
    assert response.json()["error"]["message"].endswith("(1 of 2 engines have switched)")


def test_on_an_open_server_a_clients_name_is_on_its_own_page_and_nowhere_else(client, vllm, hub):
    slo = {"class": "chat", "tenant": "acme"}
    slo_id = client.post(CHAT, json=body(slo=slo)).json()["slo"]["id"]
    assert client.get(f"/v1/slo/requests/{slo_id}").json()["tenant"] == "acme"
    assert "slo_tenant" not in told(vllm.seen[0])
    configure(hub, tenants={"acme": "coding"})
    slo_id = client.post(CHAT, json=body(slo=slo)).json()["slo"]["id"]
    assert client.get(f"/v1/slo/requests/{slo_id}").json()["tenant"] == ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([*ROUTES, "/v1/slo/status", "/v1/slo/mode", "/v1/slo/requests/x"]),
    headers=st.lists(
        st.tuples(
            st.sampled_from(["x-slo-class", "x-slo-ttft-ms", "x-slo-tenant", "authorization", "x-api-key", "x-slo-x"]),
            st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=200),
        ),
        max_size=4,
    ),
    raw=st.one_of(st.binary(max_size=200), st.from_regex(rb'\{"slo": ?\{"(class|ttft_ms|stage)": ?.{0,20}\}\}')),
)
def test_whatever_is_sent_is_answered_and_leaves_nothing_waiting(client, vllm, hub, path, headers, raw):
    sent = [(name, value.encode("latin-1")) for name, value in headers]
    response = client.post(path, content=raw, headers=[*sent, ("content-type", b"application/json")])
    assert response.status_code < 500
    assert hub.num_waiting == 0
    assert len(response.content) < 2000
