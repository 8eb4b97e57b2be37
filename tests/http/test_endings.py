"""How a request ended is in the last thing that is said about it; one that expired is refused before its first byte."""

import json

import pytest

from slos_serve.config import SloClass, SloConfig

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ALIVE = {"effective_mode": "enforce", "steps": 1}
TTL = {
    "config": SloConfig(
        classes={**SloConfig().classes, "batch": SloClass(name="batch", ttft_ms=60_000, ttl_ms=20)}
    ).to_json()
}


def body(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **more}


def serve(vllm, hub, say, *, kind="promised", **ended):
    """Let the engine say its verdict at once, and how it ended just before the last chunk."""
    hub.feed({"snapshot": ALIVE})

    def on_request(xargs):
        verdict = say.verdict(xargs["slo_id"], kind, "" if kind == "promised" else "compute")
        hub.feed({"verdicts": [verdict], "finished": [say.finished(xargs["slo_id"], **ended)] if ended else []})

    vllm.on_request = on_request


@pytest.mark.parametrize("outcome", ["met", "missed"])
def test_the_outcome_is_in_the_body_and_in_the_last_chunk(client, vllm, hub, say, events, outcome):
    serve(vllm, hub, say, outcome=outcome)
    answer = client.post(CHAT, json=body(slo={"class": "chat"})).json()
    assert (answer["slo"]["verdict"], answer["slo"]["outcome"]) == ("promised", outcome)
    stream = client.post(CHAT, json=body(slo={"class": "chat"}, stream=True)).text
    assert events(stream)[-1]["slo"]["outcome"] == outcome


def test_an_outcome_that_nobody_told_in_time_is_left_out(client, vllm, hub, say):
    serve(vllm, hub, say)
    answer = client.post(CHAT, json=body(slo={"class": "chat"})).json()
    assert "outcome" not in answer["slo"]


def test_the_worst_of_several_choices_is_what_is_told(client, vllm, hub, say):
    hub.feed({"snapshot": ALIVE})

    def on_request(xargs):
        parts = [
            {**say.finished(xargs["slo_id"], outcome), "request_id": f"{i}"}
            for i, outcome in enumerate(["met", "missed", "met"])
        ]
        hub.feed({"verdicts": [say.verdict(xargs["slo_id"])], "finished": parts})

    vllm.on_request = on_request
    assert client.post(CHAT, json=body(slo={"class": "chat"}, n=3)).json()["slo"]["outcome"] == "missed"


def test_the_session_of_a_request_is_remembered(client, vllm, hub, say):
    serve(vllm, hub, say, outcome="met", session="trip")
    slo_id = client.post(CHAT, json=body(slo={"class": "chat"})).json()["slo"]["id"]
    assert client.get(f"/v1/slo/requests/{slo_id}").json()["session"] == "trip"


# -- expired waits ------------------------------------------------------------------------------------


def expire(vllm, hub, say, seconds=0.05):
    hub.configure(slo=TTL)
    hub.feed({"snapshot": {**ALIVE, "drain_s": 2.5}})
    vllm.seconds = seconds
    vllm.events = [
        say.event(id="x", choices=[say.choice("")]),
        say.event(id="x", choices=[say.choice("", "abort")]),
        "data: [DONE]\n\n",
    ]

    def on_request(xargs):
        hub.feed({"verdicts": [{**say.verdict(xargs["slo_id"], "best-effort", "compute"), "slo_class": "batch"}]})
        ended = {
            **say.finished(xargs["slo_id"], "rejected", reason="ttl-expired", promised=False),
            "slo_class": "batch",
        }
        hub.feed({"finished": [ended]})

    vllm.on_request = on_request


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_waited_too_long_is_a_429_with_its_reason_and_counted_once(
    client, vllm, hub, say, registry, stream
):
    expire(vllm, hub, say)
    response = client.post(CHAT, json=body(slo={"class": "batch"}, stream=stream))
    assert response.status_code == 429
    assert (response.headers["x-slo-verdict"], response.headers["x-slo-reason"]) == ("rejected", "ttl-expired")
    assert 3 <= int(response.headers["retry-after"]) <= 4
    assert "ttl_ms" in response.json()["error"]["message"]
    labels = {"class": "batch", "tenant": "acme", "outcome": "rejected"}
    assert registry.get_sample_value("slos_serve_requests_total", labels) == 1


def test_a_class_with_a_bound_is_served_like_any_other_when_it_begins_in_time(client, vllm, hub, say, events):
    hub.configure(slo=TTL)
    serve(vllm, hub, say, kind="best-effort", outcome="declined", promised=False)
    response = client.post(CHAT, json=body(slo={"class": "batch"}, stream=True))
    assert (response.status_code, response.headers["x-slo-verdict"]) == (200, "best-effort")
    assert events(response.text)[-1]["slo"]["outcome"] == "declined"


def test_a_default_class_with_a_bound_concerns_requests_that_say_nothing(client, vllm, hub, say):
    classes = {**SloConfig().classes, "best-effort": SloClass(name="best-effort", ttl_ms=20)}
    expire(vllm, hub, say)
    hub.configure(slo={"config": SloConfig(classes=classes).to_json()})
    assert client.post(CHAT, json=body()).status_code == 429


# -- the Responses API --------------------------------------------------------------------------------


def response_events():
    kinds = ["response.created", "response.output_text.delta", "response.completed"]
    payloads = [
        {"type": kinds[0], "response": {"id": "resp_1", "status": "in_progress"}},
        {"type": kinds[1], "delta": 'a "response.completed" in the text\n\nevent: response.completed\ndata: {}'},
        {"type": kinds[2], "sequence_number": 3, "response": {"id": "resp_1", "output": [], "service_tier": "auto"}},
    ]
    return [f"event: {kind}\ndata: {json.dumps(payload)}\n\n" for kind, payload in zip(kinds, payloads, strict=True)]


@pytest.mark.parametrize("cut", [None, 1, 7])
def test_a_responses_stream_carries_it_in_the_response_of_its_last_event(client, vllm, hub, say, cut):
    serve(vllm, hub, say, outcome="met")
    whole = "".join(response_events())
    vllm.events = response_events() if cut is None else [whole[i : i + cut] for i in range(0, len(whole), cut)]
    if cut == 1:
        vllm.events = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    text = client.post(RESPONSES, json=body(slo={"class": "chat"}, stream=True)).text
    assert text.startswith("".join(response_events()[:2]))
    last = json.loads(text.split("event: response.completed\ndata: ")[-1])
    assert last["response"]["slo"]["outcome"] == "met"
    assert last["response"]["service_tier"] == "default"
    assert (last["sequence_number"], last["response"]["id"]) == (3, "resp_1")


@pytest.mark.parametrize(
    "broken",
    ["event: response.completed\ndata: [1]\n\n", "event: response.completed\ndata: {\n\n", "event: response.completed"],
)
def test_a_responses_stream_that_is_not_understood_passes_unchanged(client, vllm, hub, say, broken):
    serve(vllm, hub, say, outcome="met")
    vllm.events = [response_events()[0], broken]
    text = client.post(RESPONSES, json=body(slo={"class": "chat"}, stream=True)).text
    assert text == "".join(vllm.events)
