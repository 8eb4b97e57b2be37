"""What tokens take from the engine to the client is learnt and taken off the time that new requests have."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.http.delivery import KEPT_S, LEAST, LONGEST_S, Delivery

CHAT = "/v1/chat/completions"


def ask(client, vllm, hub, say, ttft_ms=0.0):
    """Send one streamed request, let the engine say when its first token was there; return how early its stamp is."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "slo": {"class": "chat"}, "stream": True}
    assert client.post(CHAT, json=body).status_code == 200
    told = vllm.seen[-1]["vllm_xargs"]
    hub.feed({"verdicts": [say.verdict(told["slo_id"])]})
    hub.feed({"finished": [say.finished(told["slo_id"], ttft_ms=ttft_ms)]})
    return hub.find(told["slo_id"])["arrival_s"] - told["slo_arrival_s"]


def test_a_slow_way_to_the_client_makes_newcomers_earlier(client, vllm, hub, say):
    vllm.seconds = 0.04
    assert ask(client, vllm, hub, say) == 0.0
    for _ in range(LEAST):
        ask(client, vllm, hub, say)
    assert 0.04 <= hub.delivery.expected_s(time.monotonic()) <= LONGEST_S
    lead_s = hub.delivery_lead_s
    assert lead_s == pytest.approx(hub.delivery.expected_s(time.monotonic()))
    assert ask(client, vllm, hub, say) == pytest.approx(lead_s, abs=1e-6)
    assert client.get("/v1/slo/status").json()["delivery_ms"] >= 40


def test_what_a_longer_guard_covers_is_not_taken_off_twice(client, vllm, hub, say):
    hub.configure(slo={"guard_ms": 200}, model="m")
    vllm.seconds = 0.04
    for _ in range(LEAST):
        ask(client, vllm, hub, say)
    assert hub.delivery_lead_s == 0.0


def test_time_that_the_engine_took_is_no_delivery(client, vllm, hub, say):
    vllm.seconds = 0.04
    for _ in range(LEAST):
        ask(client, vllm, hub, say, ttft_ms=60_000.0)
    assert hub.delivery.expected_s(time.monotonic()) == 0.0


@given(st.lists(st.floats(-10, 10), max_size=60))
def test_expectations_stay_in_bounds_and_are_forgotten(lags):
    delivery = Delivery()
    for i, lag in enumerate(lags):
        delivery.note(lag, 0.01 * i)
    assert 0.0 <= delivery.expected_s(1.0) <= LONGEST_S
    assert delivery.expected_s(2.0 + KEPT_S) == 0.0


def test_one_pause_does_not_count():
    delivery = Delivery()
    for i in range(100):
        delivery.note(0.09 if i == 50 else 0.002, 0.0)
    assert delivery.expected_s(0.0) == pytest.approx(0.002)
