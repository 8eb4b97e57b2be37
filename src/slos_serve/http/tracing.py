"""Spans around requests, through whatever exports spans in this process: vLLM does with `--otlp-traces-endpoint`.

vLLM makes a span of each request in its engine (`llm_request`), below the context in the request's headers. Ours stands
between the client's and that one: it lasts from the request's headers to the answer's last byte, and says what was
promised and what became of it. So the context that goes on inside is ours, over Ray too. A span ends with what its
engine has told; that may come a moment after the answer, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Scope, Send

from slos_serve.core.words import Outcome
from slos_serve.http import answers
from slos_serve.http.hub import Hub
from slos_serve.http.records import Record

OTEL = "opentelemetry.trace"
CONTEXT = frozenset({b"traceparent", b"tracestate"})  # what W3C's trace context travels in
PREFIX = "slos_serve."
TOLD = ("id", "request_id", "class", "tenant", "verdict", "reason", "outcome", "hops", "replica")
MEASURED = ("predicted_ttft_ms", "slack_ms", "ttft_ms", "tpot_ms", "num_prompt_tokens", "num_output_tokens")
LATEST_S = 1.0  # until a request's end is told, after its answer

_ENDING: set[asyncio.Task[None]] = set()


def process_tracer() -> Any:
    """Return what makes the spans of this process; None where nothing exports any."""
    trace = sys.modules.get(OTEL)
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else _tracer(provider)


@lru_cache(maxsize=1)
def _tracer(provider: Any) -> Any:
    return provider.get_tracer("slos_serve")


class RequestSpan:
    """The span of one request. `tracer` is OpenTelemetry's; the parent is the context in the request's headers."""

    def __init__(self, tracer: Any, scope: Scope, path: str) -> None:
        from opentelemetry.trace import SpanKind  # noqa: PLC0415 - comes with vLLM, needed only where it exports

        carrier = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"] if name in CONTEXT
        }
        method = scope["method"]
        self._status = 0
        self._span = tracer.start_span(
            f"{method} {path}",
            context=_propagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "http.route": path},
        )

    def passed_on(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return a request's headers with this span as the context of what is made inside."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        carrier: dict[str, str] = {}
        _propagator().inject(carrier, set_span_in_context(self._span))
        kept = [header for header in headers if header[0] not in CONTEXT]
        return kept + [(name.encode(), value.encode()) for name, value in carrier.items()]

    def watching(self, send: Send) -> Send:
        """Return a `send` that notes the status of the answer."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            await send(message)

        return noting

    def end(self, hub: Hub, slo_id: str, num_parts: int) -> None:
        """End the span now, with what is known of the request `slo_id` ("" for one without an SLO) in a moment."""
        task = asyncio.create_task(self._end(hub, slo_id, num_parts, time.time_ns()))
        _ENDING.add(task)
        task.add_done_callback(_ENDING.discard)

    async def _end(self, hub: Hub, slo_id: str, num_parts: int, ended_ns: int) -> None:
        if self._span.is_recording():
            if slo_id and hub.is_heard and self._status != HTTPStatus.TOO_MANY_REQUESTS:
                await hub.wait_end(slo_id, num_parts, LATEST_S)
            self._span.set_attributes(attributes(hub.find(slo_id) if slo_id else None))
            self._say_status()
        self._span.end(end_time=ended_ns)

    def _say_status(self) -> None:
        from opentelemetry.trace import StatusCode  # noqa: PLC0415

        if self._status:
            self._span.set_attribute("http.response.status_code", self._status)
        if self._status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._span.set_status(StatusCode.ERROR)


def attributes(record: Record | None) -> dict[str, Any]:
    """Return what a span says of a request: the words and numbers of its page, each under `slos_serve.`."""
    if record is None:
        return {}
    record = answers.told(record)
    said = {key: record.get(key) for key in (*TOLD, *MEASURED)}
    for several in ("promise", "asked", "least_slack_ms"):
        said |= {f"{several}.{key}": value for key, value in (record.get(several) or {}).items()}
    said["promise_kept"] = _is_kept(record)
    return {PREFIX + key: value for key, value in said.items() if value is not None and value != ""}


def _is_kept(record: Mapping[str, Any]) -> bool | None:
    """Tell whether a promise was kept; None where there was none, or nobody waited for it."""
    is_graded = record.get("outcome") in {Outcome.MET, Outcome.MISSED, Outcome.FAILED}
    is_promised = record["verdict"] in answers.PROMISED
    return record["outcome"] == Outcome.MET if is_graded and is_promised else None


@lru_cache(maxsize=1)
def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    return TraceContextTextMapPropagator()
