"""`/v1/slo/mode`: an operator switches, everybody sees what holds."""

import pytest
from prometheus_client import CollectorRegistry
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.http.middleware import SloMiddleware

PATH = "/v1/slo/mode"


class FakeEngine:
    """Takes orders as the engine does, and publishes what holds then."""

    def __init__(self, hub):
        self.hub = hub
        self.orders = []
        self.facts = {"mode": "enforce", "class_modes": {}, "effective_mode": "enforce", "reason": ""}
        self.failure = None
        hub.controls.append(self.control)

    def control(self, order):
        if self.failure is not None:
            raise self.failure
        self.orders.append(order)
        if order["class"] is None:
            self.facts |= {"mode": order["mode"], "effective_mode": order["mode"], "class_modes": {}}
        else:
            self.facts["class_modes"] = {order["class"]: order["mode"]}
        self.hub.feed({"snapshot": self.facts})
        return self.facts


@pytest.fixture
def client(app):
    with TestClient(app, client=("127.0.0.1", 50000), headers={"content-type": "application/json"}) as client:
        yield client


@pytest.fixture
def engine(hub):
    return FakeEngine(hub)


def test_the_whole_engine_is_switched_and_status_and_gauge_show_it(client, hub, engine, registry):
    response = client.post(PATH, json={"mode": "observe"})
    assert response.status_code == 200
    assert response.json() == {"object": "slo.mode", **engine.facts}
    assert engine.orders == [{"mode": "observe", "class": None}]
    status = client.get("/v1/slo/status").json()
    assert (status["mode"], status["effective_mode"], status["class_modes"]) == ("observe", "observe", {})
    assert client.get(PATH).json() == response.json()
    assert registry.get_sample_value("slos_serve_mode") == 1


def test_one_class_is_switched_and_shown_as_what_differs(client, engine, registry):
    client.post(PATH, json={"mode": "observe", "class": "chat"})
    assert client.get("/v1/slo/status").json()["class_modes"] == {"chat": "observe"}
    assert registry.get_sample_value("slos_serve_mode") == 2
    assert registry.get_sample_value("slos_serve_class_mode", {"class": "chat"}) == 1
    client.post(PATH, json={"mode": "enforce"})
    assert registry.get_sample_value("slos_serve_class_mode", {"class": "chat"}) == 2


def test_a_class_can_go_back_to_what_the_engine_does(client, engine):
    assert client.post(PATH, json={"mode": None, "class": "custom"}).status_code == 200
    assert engine.orders == [{"mode": None, "class": "custom"}]


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'"observe"', "body"),
        (b"\xff\xfe\xfd", "body"),
        (b"[" * 50_000, "body"),
        (b"{}", "mode"),
        (b'{"mode": "loud"}', "mode"),
        (b'{"mode": ["observe"]}', "mode"),
        (b'{"mode": null}', "mode"),
        (b'{"class": "chat"}', "mode"),
        (b'{"mode": "observe", "class": "nobody"}', "class"),
        (b'{"mode": "observe", "class": "best-effort"}', "class"),
        (b'{"mode": "observe", "class": 7}', "class"),
        (b'{"mode": "observe", "force": true}', "force"),
        (b" " * 100_000 + b'{"mode": "observe"}', "body"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_field_and_changes_nothing(client, engine, raw, param):
    response = client.post(PATH, content=raw)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "BadRequestError")
    assert "expected" in error["message"]
    assert engine.orders == []


def test_an_engine_that_does_not_answer_or_is_not_ours_is_a_503(client, hub, engine):
    engine.failure = TimeoutError("the engine did not answer within 2 s")
    response = client.post(PATH, json={"mode": "observe"})
    assert (response.status_code, response.json()["error"]["message"]) == (503, "the engine did not answer within 2 s")
    hub.controls.clear()
    assert client.post(PATH, json={"mode": "observe"}).status_code == 503


def test_what_the_engine_refuses_is_a_400(client, hub):
    hub.controls.append(lambda _order: {"error": "class = 'chat': expected one of ..."})
    assert client.post(PATH, json={"mode": "observe", "class": "chat"}).status_code == 400


def test_every_engine_behind_a_server_is_told(client, hub):
    engines = [FakeEngine(hub) for _ in range(3)]
    client.post(PATH, json={"mode": "observe"})
    assert [len(engine.orders) for engine in engines] == [1, 1, 1]


@pytest.mark.parametrize("failure", [TimeoutError("the engine did not answer within 2 s"), None])
def test_where_one_engine_is_not_switched_none_is(client, hub, failure):
    engines = [FakeEngine(hub) for _ in range(3)]
    for one in engines:
        one.facts["class_modes"] = {"chat": "observe"}
    hub.feed({"snapshot": engines[0].facts})
    if failure is None:
        hub.controls[1] = lambda _order: {"error": "expected observe, until slos-serve verify has passed"}
    engines[1].failure = failure
    response = client.post(PATH, json={"mode": "observe"})
    assert response.status_code == (503 if failure else 400)
    assert "have switched" not in response.json()["error"]["message"]
    for one in (engines[0], engines[2]):
        assert (one.facts["mode"], one.facts["class_modes"]) == ("enforce", {"chat": "observe"})


def test_engines_that_never_said_what_held_stay_switched_and_that_is_told(client, hub):
    engines = [FakeEngine(hub) for _ in range(2)]
    engines[1].failure = TimeoutError("the engine did not answer within 2 s")
    message = client.post(PATH, json={"mode": "observe"}).json()["error"]["message"]
    assert message.endswith("(1 of 2 engines have switched)")


def test_the_switch_stays_behind_the_servers_own_key_check(vllm, hub, engine):
    class Locked:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http" and (b"authorization", b"Bearer k") not in scope["headers"]:
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    app = vllm.app(Middleware(SloMiddleware, hub=hub), Middleware(Locked))
    with TestClient(app, client=("127.0.0.1", 5)) as client:
        assert client.post(PATH, json={"mode": "observe"}).status_code == 401
        assert engine.orders == []
        assert client.post(PATH, json={"mode": "observe"}, headers={"authorization": "Bearer k"}).status_code == 200


# -- several servers, several engines -----------------------------------------------------------------


def test_several_servers_of_one_engine_count_each_request_once(say):
    registries = [CollectorRegistry() for _ in range(3)]
    hubs = [Hub(SloMetrics(registry)) for registry in registries]
    for client, hub in enumerate(hubs):
        hub.configure(client=client)
    message = {
        "verdicts": [{**say.verdict("a"), "client": 1}],
        "finished": [{**say.finished("a"), "client": 1}, {**say.finished("b"), "client": 2}],
        "snapshot": {"effective_mode": "enforce", "best_effort_preemptions": 5, "planner_faults": {"plan": 2}},
        "plan_s": [0.001],
    }
    for hub in hubs:
        hub.feed(message)

    def total(name, **labels):
        return [registry.get_sample_value(name, labels) or 0 for registry in registries]

    labels = {"class": "chat", "tenant": "acme", "outcome": "met"}
    assert total("slos_serve_requests_total", **labels) == [0, 1, 1]
    assert total("slos_serve_verdicts_total", **{"class": "chat", "verdict": "promised", "reason": ""}) == [0, 1, 0]
    assert total("slos_serve_best_effort_preemptions_total") == [5, 0, 0]
    assert total("slos_serve_planner_faults_total", kind="plan") == [2, 0, 0]
    assert total("slos_serve_plan_seconds_count") == [1, 0, 0]
    assert total("slos_serve_mode") == [2, 2, 2]
    assert [hub.find("a")["outcome"] for hub in hubs] == ["met"] * 3


def test_several_engines_behind_one_server_add_up(hub, registry):
    one = {"effective_mode": "enforce", "num_promised": 3, "steps": 5, "profile": {}, "drain_s": 1.0, "reason": ""}
    other = {**one, "num_promised": 4, "drain_s": 7.0}
    hub.feed({"engine": 0, "snapshot": one})
    hub.feed({"engine": 1, "snapshot": other})
    assert hub.snapshot["num_promised"] == 7
    assert hub.retry_after_s == 7
    assert registry.get_sample_value("slos_serve_promised_requests") == 7
    assert registry.get_sample_value("slos_serve_mode") == 2
    hub.feed({"engine": 0, "snapshot": {**one, "effective_mode": "observe", "reason": "planner faults"}})
    assert (hub.snapshot["effective_mode"], hub.snapshot["reason"]) == ("observe", "planner faults")
    assert registry.get_sample_value("slos_serve_mode") == 1
