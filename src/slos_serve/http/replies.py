"""What this package answers by itself, in the shape of vLLM's own answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response, StreamingResponse

from slos_serve.core.words import Reason, Said
from slos_serve.http import answers
from slos_serve.http.broadcast import Broadcast, status
from slos_serve.http.explaining import explanation
from slos_serve.http.hub import Hub
from slos_serve.http.identity import Caller, RequestError
from slos_serve.http.live import LIVE, live
from slos_serve.http.slo import BODY_KEYS

SLO_PREFIX = "/v1/slo/"
LONGEST_WAIT_S = 30
NUM_RECENT = 100
RETRIES_HEADER = "x-stainless-retry-count"  # what the OpenAI and Anthropic SDKs count their attempts with
REFUSALS: dict[str, str] = {
    Reason.QUEUE_FULL: "the queue for requests without a promise is full",
    Reason.TENANT_FULL: "as many requests of this tenant are under way as the operator allows",
    Reason.TTL_EXPIRED: "the request waited longer than its class allows (ttl_ms) and was never begun",
    Reason.TOO_TIGHT: "it asks for more than this engine can do even when idle, and its class asks to be refused then",
}
REQUESTS_PREFIX, EXPLANATION = SLO_PREFIX + "requests/", "/explanation"
EVENTS, EVENT_STREAM = SLO_PREFIX + "events", "text/event-stream"
UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
PAGES = "classes, status, mode, live, events, requests, requests/ID, requests/ID/explanation"


class Json(Response):
    """An answer in JSON; what no encoding holds, such as half a surrogate pair out of a request, is escaped in it."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Return the body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


def error(status: HTTPStatus, message: str, *, param: str | None = None, headers: Mapping[str, str] = {}) -> Response:
    """Return an error as vLLM words it: `BadRequestError` for 400, else the status's own phrase."""
    kind = "BadRequestError" if status == HTTPStatus.BAD_REQUEST else status.phrase
    content = {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}
    return Json(content, status_code=status, headers=dict(headers))


def bad_request(problem: RequestError) -> Response:
    """Return the 400 for a request that says something malformed about its SLO."""
    return error(HTTPStatus.BAD_REQUEST, str(problem), param=problem.param)


def too_large(limit: int) -> Response:
    """Return the 413 of a body beyond the operator's limit."""
    message = f"the body is longer than the {limit} bytes that this server takes (max_body_bytes)"
    return error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


def refusal(reason: str, retry_after_s: int, *, slo_id: str = "", slo_class: str = "") -> Response:
    """Return the 429 of a request that cannot be served as its class wants.

    The time to wait is spread, so that not all who are refused now come back at once.
    """
    retry_after_s = min(LONGEST_WAIT_S, retry_after_s + random.randint(0, max(1, retry_after_s // 2)))
    headers = {"x-slo-verdict": Said.REJECTED.value, "x-slo-reason": reason, "retry-after": str(retry_after_s)}
    headers |= {name: value for name, value in (("x-slo-class", slo_class), ("x-slo-id", slo_id)) if value}
    message = REFUSALS.get(reason, f"no promise can be given now ({reason}) and this class asks to be refused then")
    if reason == Reason.TOO_TIGHT:
        headers |= {"retry-after": str(LONGEST_WAIT_S), "x-should-retry": "false"}
        return error(HTTPStatus.TOO_MANY_REQUESTS, message, headers=headers)
    return error(HTTPStatus.TOO_MANY_REQUESTS, f"{message}; try again in {retry_after_s} s", headers=headers)


def is_retry(count: str | None) -> bool:
    """Tell from `RETRIES_HEADER` whether a client makes an attempt again."""
    return bool((count or "").strip("0 "))


def metrics() -> Response:
    """Return this process's metrics as Prometheus reads them."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def page(hub: Hub, broadcast: Broadcast, path: str, caller: Caller) -> Response:
    """Answer GET of the live page and below /v1/slo/, as much of it as the caller may see."""
    identities = hub.operator.identities
    # Browsers bring no key before the live page, which holds no data, has asked for it.
    is_closed = hub.config.pages == "admin" and path != LIVE and not identities.may_operate(caller)
    if hub.config.pages == "off" or is_closed:
        return error(HTTPStatus.NOT_FOUND, "Not Found")
    may_see_all = identities.is_operator(caller)
    audience = None if may_see_all else caller.tenant

    def recent() -> dict[str, Any]:
        records = hub.recent(lambda tenant: identities.may_see(caller, tenant), NUM_RECENT)
        return {"object": "list", "data": [answers.told(record) for record in records]}

    documents: dict[str, Callable[[], Response]] = {
        LIVE: live,
        SLO_PREFIX + "classes": lambda: Json(classes(hub)),
        SLO_PREFIX + "mode": lambda: Json({"object": "slo.mode", **mode(hub.snapshot or {})}),
        SLO_PREFIX + "status": lambda: Json(answers.finite(status(hub, whole=may_see_all))),
        SLO_PREFIX + "live": lambda: Response(broadcast.document(audience), media_type="application/json"),
        EVENTS: lambda: StreamingResponse(broadcast.events(audience), media_type=EVENT_STREAM, headers=UNBUFFERED),
        REQUESTS_PREFIX.rstrip("/"): lambda: Json(answers.finite(recent())),
    }
    if path in documents:
        return documents[path]()
    if path.startswith(REQUESTS_PREFIX):
        return await _request(hub, path.removeprefix(REQUESTS_PREFIX), caller)
    return error(HTTPStatus.NOT_FOUND, f"{path[:100]} is not one of {PAGES} below {SLO_PREFIX}")


async def _request(hub: Hub, request_id: str, caller: Caller) -> Response:
    identities = hub.operator.identities
    name, is_why = request_id.removesuffix(EXPLANATION), request_id.endswith(EXPLANATION)
    record = hub.find(name, lambda tenant: identities.may_see(caller, tenant))
    if record is not None and is_why:
        document = await explanation(record, hub.controls, whole=identities.is_operator(caller))
        return Json(answers.finite(document))
    if record is not None:
        return Json(answers.finite({"object": "slo.request", **answers.told(record)}))
    message = f"nothing is known of request {name[:100]!r}: only recent requests with an SLO are kept"
    return error(HTTPStatus.NOT_FOUND, message, param="id")


def mode(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engine says of its mode."""
    return {key: facts.get(key) for key in ("mode", "class_modes", "effective_mode", "reason")}


def classes(hub: Hub) -> dict[str, Any]:
    """Return the configured classes; API keys and tenants stay private."""
    config = hub.config
    return {
        "object": "list",
        "default_class": config.default_class,
        "priority_class": config.priority_class,
        "ttft_floor_ms": config.ttft_floor_ms,
        "ttft_allowance_ms": config.ttft_allowance_ms,
        "max_best_effort_queue": config.max_best_effort_queue,
        "request_keys": list(BODY_KEYS),
        "data": [{"object": "slo.class", "id": name, **item.to_json()} for name, item in config.classes.items()],
    }
