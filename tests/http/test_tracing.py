"""A request's span says what was promised and kept, stands in the client's trace, and is the parent of vLLM's."""

import asyncio

import pytest
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from tests.collector import attributes

from slos_serve.config import SloClass, SloConfig
from slos_serve.http import tracing
from slos_serve.http.middleware import SloMiddleware

pytest.importorskip("opentelemetry.sdk")  # comes with vLLM
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
ASKED = {"ttft_ms": 400.0, "tpot_ms": 50.0}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traced(vllm, hub, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with TestClient(vllm.app(Middleware(SloMiddleware, hub=hub, tracer=provider.get_tracer("test")))) as client:
        yield client
        client.portal.call(asyncio.sleep, 0.05)


def spans(traced, exporter):
    traced.portal.call(asyncio.sleep, 0.05)  # a span ends a moment after its answer
    return exporter.get_finished_spans()


def body(**more):
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "slo": {"class": "chat"}, **more}


def says(vllm, hub, say, outcome="met", **more):
    def on_request(xargs):
        hub.feed({"verdicts": [say.verdict(xargs["slo_id"], asked=ASKED, **more)], "snapshot": {"steps": 1}})
        end = say.finished(
            xargs["slo_id"], outcome, ttft_ms=371.0, tpot_ms=31.5, least_slack_ms={"prefill": 29.0, "answer": 3.5}
        )
        hub.feed({"finished": [end]})

    vllm.on_request = on_request


@pytest.mark.parametrize("stream", [True, False])
def test_a_span_says_what_was_promised_and_that_it_was_kept(traced, vllm, hub, say, exporter, stream):
    says(vllm, hub, say)
    hub.feed({"snapshot": {"steps": 0}})
    slo_id = traced.post(CHAT, json=body(stream=stream)).headers["x-slo-id"]
    (span,) = spans(traced, exporter)
    said = {key.removeprefix("slos_serve."): value for key, value in span.attributes.items()}
    assert (span.name, span.kind, said["http.response.status_code"]) == (f"POST {CHAT}", SpanKind.SERVER, 200)
    assert (said["id"], said["class"], said["verdict"], said["outcome"]) == (slo_id, "chat", "promised", "met")
    assert (said["promise.ttft_ms"], said["least_slack_ms.prefill"], said["least_slack_ms.answer"]) == (
        400.0,
        29.0,
        3.5,
    )
    assert said["promise_kept"] is True


def test_a_broken_promise_is_a_promise_that_was_not_kept(traced, vllm, hub, say, exporter):
    hub.feed({"snapshot": {"steps": 0}})
    says(vllm, hub, say, "missed")
    traced.post(CHAT, json=body())
    assert spans(traced, exporter)[0].attributes["slos_serve.promise_kept"] is False


def test_what_was_never_promised_was_neither_kept_nor_broken(traced, vllm, hub, say, exporter):
    hub.feed({"snapshot": {"steps": 0}})
    says(vllm, hub, say, "declined", kind="best-effort", reason="compute", slack_ms=None)
    traced.post(CHAT, json=body())
    said = spans(traced, exporter)[0].attributes
    assert (said["slos_serve.reason"], said["slos_serve.asked.ttft_ms"]) == ("compute", 400.0)
    assert "slos_serve.promise_kept" not in said


def test_a_span_is_in_the_clients_trace_and_vllm_is_given_it_as_parent(traced, vllm, exporter):
    traced.post(CHAT, json=body(), headers=CONTEXT)
    (span,) = spans(traced, exporter)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    inside = vllm.headers[0]
    assert inside["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert inside["tracestate"] == "vendor=1"


@pytest.mark.parametrize("context", ["", "nonsense", f"00-{TRACE}", f"00-{'0' * 32}-{PARENT}-01", "ü" * 300])
def test_a_client_without_a_context_or_with_a_bad_one_begins_a_trace(traced, vllm, exporter, context):
    headers = {"traceparent": context.encode()} if context else {}
    assert traced.post(CHAT, json=body(), headers=headers).status_code == 200
    (span,) = spans(traced, exporter)
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" in vllm.headers[0]["traceparent"]


def test_a_trace_that_is_not_sampled_is_passed_on_and_exports_nothing(traced, vllm, exporter):
    traced.post(CHAT, json=body(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert not spans(traced, exporter)
    assert vllm.headers[0]["traceparent"].startswith(f"00-{TRACE}-")
    assert vllm.headers[0]["traceparent"].endswith("-00")


def test_a_request_that_asks_for_nothing_has_a_span_without_an_slo(traced, exporter):
    traced.post(CHAT, json={"model": "m", "messages": []})
    (span,) = spans(traced, exporter)
    assert not [key for key in span.attributes if key.startswith("slos_serve.")]


def test_a_refusal_and_a_bad_request_have_spans_that_say_so(traced, vllm, hub, say, exporter):
    voice = SloClass(name="voice", ttft_ms=300, on_unattainable="reject")
    hub.configure(slo={"config": SloConfig(classes={**SloConfig().classes, "voice": voice}).to_json()})
    vllm.on_request = lambda xargs: hub.feed(
        {"verdicts": [say.verdict(xargs["slo_id"], "best-effort", "compute", slo_class="voice")]}
    )
    assert traced.post(CHAT, json=body(slo={"class": "voice"})).status_code == 429
    assert traced.post(CHAT, json=body(slo={"clas": "voice"})).status_code == 400
    refused, malformed = spans(traced, exporter)
    said = refused.attributes
    assert (said["http.response.status_code"], said["slos_serve.outcome"]) == (429, "rejected")
    assert malformed.attributes["http.response.status_code"] == 400


def test_an_error_of_the_server_inside_is_an_error_of_the_span(traced, vllm, exporter):
    vllm.status = 500
    traced.post(CHAT, json=body())
    assert not spans(traced, exporter)[0].status.is_ok


def test_where_nothing_exports_spans_headers_stay_as_they_are(client, vllm):
    assert tracing.process_tracer() is None
    client.post(CHAT, json=body(), headers=CONTEXT)
    assert vllm.headers[0]["traceparent"] == CONTEXT["traceparent"]


def test_a_real_collector_receives_the_span_with_its_attributes(vllm, hub, say, collector):
    """The exporter is the one that vLLM makes for `--otlp-traces-endpoint`."""
    exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporters.OTLPSpanExporter(collector.url, insecure=True)))
    hub.feed({"snapshot": {"steps": 0}})
    says(vllm, hub, say)
    try:
        tracer = provider.get_tracer("slos_serve")
        with TestClient(vllm.app(Middleware(SloMiddleware, hub=hub, tracer=tracer))) as client:
            client.post(CHAT, json=body(), headers=CONTEXT)
            client.portal.call(asyncio.sleep, 0.05)
        provider.force_flush()
        ((scope, span),) = collector.spans
    finally:
        provider.shutdown()
    assert (scope, span.name) == ("slos_serve", f"POST {CHAT}")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    said = attributes(span)
    assert (said["promise_kept"], said["least_slack_ms.prefill"], said["class"]) == (True, 29.0, "chat")
