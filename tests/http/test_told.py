"""A client is told what it was promised, in one set of words, and a scraper sees the first broken promise."""

import json
from enum import StrEnum
from urllib.parse import quote

import pytest

from slos_serve.config import OVERRIDES, SloClass, SloConfig
from slos_serve.core import words
from slos_serve.core.words import MEANINGS, Outcome, Reason, Said

CHAT = "/v1/chat/completions"
ASKED = {"ttft_ms": 400.0, "tpot_ms": 50.0, "e2e_ms": 9000.0}
VOICE = SloClass(name="voice", ttft_ms=300, on_unattainable="reject")
CLASSES = {**SloConfig().classes, "voice": VOICE}


def body(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "slo": {"class": "chat"}, **more}


def says(vllm, hub, say, kind="promised", reason="", **more):
    def on_request(xargs):
        verdict = say.verdict(xargs["slo_id"], kind, reason, asked=ASKED, **more)
        hub.feed({"verdicts": [verdict], "finished": [say.finished(xargs["slo_id"], ttft_ms=371.0, tpot_ms=31.5)]})

    vllm.on_request = on_request


def value(registry, name, **labels):
    return registry.get_sample_value(f"slos_serve_{name}_total", {key.strip("_"): text for key, text in labels.items()})


@pytest.mark.parametrize("stream", [True, False])
def test_what_was_promised_is_in_headers_body_and_page(client, vllm, hub, say, events, stream):
    says(vllm, hub, say)
    response = client.post(CHAT, json=body(stream=stream))
    slo = (events(response.text)[-1] if stream else response.json())["slo"]
    page = client.get(f"/v1/slo/requests/{slo['id']}").json()
    arrival_s = page["arrival_s"]
    due = {
        "first_token_s": pytest.approx(arrival_s + 0.4, abs=2e-3),
        "last_token_s": pytest.approx(arrival_s + 9, abs=2e-3),
    }
    for told in (slo, page):
        assert (told["promise"], told["deadlines"], told["outcome"]) == (ASKED, due, "met")
        assert "asked" not in told
    assert slo["measured"] == {"ttft_ms": 371.0, "tpot_ms": 31.5}
    headers = response.headers
    assert (headers["x-slo-class"], headers["x-slo-id"]) == ("chat", slo["id"])
    assert [headers[f"x-slo-{key}-ms"] for key in ("ttft", "tpot", "e2e")] == ["400", "50", "9000"]
    assert float(headers["x-slo-first-token-deadline-s"]) == due["first_token_s"]


def test_what_was_asked_and_not_promised_is_no_promise_and_has_no_slack(client, vllm, hub, say):
    says(vllm, hub, say, "best-effort", "too-tight", slack_ms=None)
    response = client.post(CHAT, json=body())
    slo = response.json()["slo"]
    assert (slo["asked"], slo["reason"]) == (ASKED, "too-tight")
    assert not {"promise", "deadlines", "slack_ms"} & set(slo)
    assert "x-slo-ttft-ms" not in response.headers


def test_a_refusal_that_no_retry_can_help_says_so(client, vllm, hub, say):
    hub.configure(slo={"config": SloConfig(classes=CLASSES).to_json()})
    says(vllm, hub, say, "best-effort", "too-tight")
    response = client.post(CHAT, json=body(slo={"class": "voice"}))
    assert (response.status_code, response.headers["x-should-retry"]) == (429, "false")
    assert "try again" not in response.json()["error"]["message"]


def test_one_word_for_a_refusal_in_header_page_and_both_counters(client, vllm, hub, say, registry):
    hub.configure(slo={"config": SloConfig(classes=CLASSES).to_json()})
    says(vllm, hub, say, "best-effort", "memory", slo_class="voice")
    response = client.post(CHAT, json=body(slo={"class": "voice"}))
    assert response.headers["x-slo-verdict"] == "rejected"
    assert client.get(f"/v1/slo/requests/{response.headers['x-slo-id']}").json()["verdict"] == "rejected"
    assert value(registry, "verdicts", class_="voice", verdict="rejected", reason="memory") == 1
    assert value(registry, "verdicts", class_="voice", verdict="best-effort", reason="memory") == 0


def test_a_priority_that_nobody_has_defined_is_told(client, vllm, hub, say):
    response = client.post(CHAT, json=body(slo=None, service_tier="priority"))
    assert (response.headers["x-slo-verdict"], response.headers["x-slo-reason"]) == ("best-effort", "no-priority-class")
    assert response.json()["service_tier"] == "flex"
    hub.configure(slo={"config": SloConfig(default_class="chat").to_json()})
    says(vllm, hub, say)
    assert client.post(CHAT, json=body(slo=None, service_tier="priority")).json()["service_tier"] == "default"


def test_what_can_be_counted_is_there_at_zero_before_anything_happens(hub, registry):
    hub.configure(slo={"config": SloConfig(classes=CLASSES).to_json()})
    for name in ("chat", "voice", "custom"):
        assert value(registry, "promises", class_=name, result="broken") == 0
        assert value(registry, "requests", class_=name, tenant="", outcome="rejected") == 0
        assert value(registry, "stage_slo", class_=name, stage="prefill", outcome="missed") == 0
    assert value(registry, "planner_faults", kind="plan") == 0


def test_verdicts_that_plans_would_give_are_counters_by_class_that_survive_an_engine(hub, registry):
    for snapshot in ({"chat": {"promised": 3}}, {"chat": {"promised": 5, "best-effort": 1}}, {"chat": {"promised": 1}}):
        hub.feed({"snapshot": {"would_be_by_class": snapshot}})
    assert value(registry, "would_be", class_="chat", verdict="promised") == 6
    assert value(registry, "would_be", class_="chat", verdict="best-effort") == 1


def test_every_word_has_a_meaning():
    lists = [
        one for one in vars(words).values() if isinstance(one, type) and issubclass(one, StrEnum) and one is not StrEnum
    ]
    assert lists == [Said, Reason, Outcome] == list(MEANINGS)
    for one in lists:
        assert list(MEANINGS[one]) == list(one)
    assert json.loads(json.dumps(Said.BEST_EFFORT)) == "best-effort"


def test_openapi_knows_slo_its_headers_and_the_pages(hub):
    from slos_serve.http.openapi import augmented

    schema = {"type": "object", "properties": {"model": {"type": "string"}}}
    post = {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Chat"}}}}}
    inside = {"openapi": "3.1.0", "paths": {CHAT: {"post": post}}, "components": {"schemas": {"Chat": schema}}}
    document = json.loads(augmented(json.dumps(inside).encode(), SloConfig(classes=CLASSES)))
    assert document["components"]["schemas"]["Chat"]["properties"]["slo"]["anyOf"][0]["$ref"].endswith("/Slo")
    said = document["components"]["schemas"]["Slo"]["properties"]
    assert set(said) == {"class", *OVERRIDES} | {*("stage", "tenant")}
    assert said["class"]["enum"] == list(CLASSES)
    assert document["components"]["schemas"]["SloAnswer"]["properties"]["reason"]["enum"] == list(Reason)
    operation = document["paths"][CHAT]["post"]
    assert {one["name"] for one in operation["parameters"]} >= {"x-slo-class", "x-slo-ttft-ms", "x-slo-max-gap-ms"}
    assert "429" in operation["responses"]
    assert "post" in document["paths"]["/v1/slo/mode"]
    for other in (b"{", b"[]", b"{}", b'{"paths": 5}'):
        assert augmented(other, SloConfig()) == other


def test_the_servers_openapi_page_is_the_augmented_one(vllm, hub):
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from slos_serve.http.middleware import SloMiddleware

    app = vllm.app()
    app.routes.append(Route("/openapi.json", lambda request: JSONResponse({"openapi": "3.1.0", "paths": {}})))
    response = TestClient(SloMiddleware(app, hub)).get("/openapi.json")
    assert "/v1/slo/status" in response.json()["paths"]
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize("name", ["mine", "a/b", "Zürich-1", "x" * 300, "with a space", "a?b&c"])
def test_a_request_is_found_by_whatever_its_client_called_it(client, vllm, hub, say, name):
    says(vllm, hub, say)
    response = client.post(CHAT, json=body(), headers={"x-request-id": name.encode()})
    page = client.get(f"/v1/slo/requests/{quote(name, safe='')}")
    assert page.json()["id"] == response.headers["x-slo-id"]


@pytest.mark.parametrize(("key", "value"), [("slo_class", "chat"), ("slo_ttft_ms", 400), ("slo_stage", "loop")])
def test_what_stands_beside_slo_instead_of_in_it_is_refused_with_the_right_place(client, key, value):
    response = client.post(CHAT, json={"model": "m", "messages": [], key: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, key)
    assert f'{{"slo": {{"{key.removeprefix("slo_")}": ...}}}}' in response.json()["error"]["message"]


@pytest.mark.parametrize("others", [{"x-slo-ttft-s": "1"}, {"x-slo-ttft-us": "500000"}])
def test_one_number_in_two_units_is_refused(client, others):
    response = client.post(CHAT, json=body(slo=None), headers={"x-slo-ttft-ms": "500", **others})
    assert (response.status_code, response.json()["error"]["param"]) == (400, *others)


def test_a_gateways_own_number_beside_the_clients_yields(client, vllm, hub, say):
    says(vllm, hub, say)
    headers = {"x-slo-ttft-ms": "500", "x-llm-d-slo-ttft-ms": "900"}
    assert client.post(CHAT, json=body(slo=None), headers=headers).status_code == 200
    assert vllm.seen[0]["vllm_xargs"]["slo_ttft_ms"] == 500
