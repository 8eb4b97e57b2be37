"""The middleware around vLLM's OpenAI server: `--middleware slos_serve.http.middleware.SloMiddleware`.

Theory of operation. vLLM puts a `--middleware` outside everything else, its API key check included. So
nothing is read or decided before the server inside asks for the request's body, which it does only for a
client it lets in (`exchange`), and our own pages replace a 404 of the server inside. What is answered in its place
goes out with the headers of its own middlewares (CORS, request ids). Requests that say nothing about latency cost one
scan of their body.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slos_serve.http import answers, health, modes, openapi, replies
from slos_serve.http.broadcast import Broadcast
from slos_serve.http.exchange import Exchange
from slos_serve.http.headers import bodiless, dress, is_json, length_header, peer, without_length
from slos_serve.http.hub import HUB, Hub
from slos_serve.http.identity import RequestError
from slos_serve.http.live import LIVE
from slos_serve.http.records import Record
from slos_serve.http.routes import ROUTES
from slos_serve.http.stream import write_into
from slos_serve.http.tracing import RequestSpan, process_tracer

RESPONSES, OPENAPI = "/v1/responses", "/openapi.json"
MODE_PATH = replies.SLO_PREFIX + "mode"
MAX_BODY = 1 << 16  # of what is posted to us


class SloMiddleware:
    """Pure ASGI middleware; everything that is not about SLOs goes straight to `app`.

    `tracer` makes the spans of requests: OpenTelemetry's, by default that of the process.
    """

    def __init__(self, app: ASGIApp, hub: Hub = HUB, tracer: Any = None) -> None:
        self.app = app
        self.hub = hub
        self.tracer = tracer
        self.broadcast = Broadcast(hub)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "websocket" and not self._may_connect(scope):
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "this server serves known API keys only"})
            return
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            method = scope["method"]
            if method == "POST" and path in ROUTES:
                await self._exchange(path, scope, receive, send)
                return
            if (path.startswith(replies.SLO_PREFIX) or path.rstrip("/") == LIVE) and (
                method in {"GET", "HEAD"} or (method, path) == ("POST", MODE_PATH)
            ):
                await self._page(path.rstrip("/"), scope, receive, send)
                return
            if method == "GET" and path.startswith(RESPONSES + "/"):
                response_id = path.removeprefix(RESPONSES + "/")
                await self._rewritten(scope, receive, send, partial(self._with_slo, response_id, scope))
                return
            if method == "GET" and path == OPENAPI:
                await self._rewritten(scope, receive, send, partial(openapi.augmented, config=self.hub.config))
                return
            if path in health.PATHS:
                response = health.answer(self.hub, path, is_own=health.PROBE_HEADER in scope["headers"])
                if response is not None:
                    await response(scope, receive, send)
                    return
                if path == health.READY:
                    scope = {**scope, "path": "/health", "raw_path": b"/health"}
        await self.app(scope, receive, send)

    async def _exchange(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        tracer = self.tracer or process_tracer()
        span = None if tracer is None else RequestSpan(tracer, scope, path)
        if span is not None:
            scope, send = {**scope, "headers": span.passed_on(scope["headers"])}, span.watching(send)
        exchange = Exchange(self.app, scope, receive, send, hub=self.hub, route=ROUTES[path])
        try:
            await exchange.run()
        finally:
            if span is not None:
                span.end(self.hub, exchange.slo_id, exchange.num_choices)

    def _may_connect(self, scope: Scope) -> bool:
        """Tell whether somebody may talk over a WebSocket, which says nothing of an SLO and is served best-effort."""
        if self.hub.config.unknown_keys != "refuse":
            return True
        with contextlib.suppress(RequestError):
            return self.hub.operator.caller(scope["headers"], peer(scope)).is_known
        return False

    async def _page(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in place of the 404 of the server inside, so that its API key check guards our pages too."""
        replaced: list[Message] = []

        async def send_page(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == HTTPStatus.NOT_FOUND:
                replaced.append(message)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_page)
        if replaced:  # the server inside is done: a stream of ours is no long request of its
            response = await self._answer(path, scope, receive)
            dress(response, replaced[0]["headers"])
            await response(scope, receive, bodiless(send) if scope["method"] == "HEAD" else send)

    async def _answer(self, path: str, scope: Scope, receive: Receive) -> Response:
        try:
            caller = self.hub.operator.caller(scope["headers"], peer(scope))
        except RequestError as problem:
            return replies.bad_request(problem)
        if scope["method"] == "POST":
            refused = modes.refusal(self.hub, caller, scope["headers"])
            return refused or await modes.switch(self.hub, await _read(receive))
        if scope["method"] == "HEAD" and path == replies.EVENTS:
            return Response(media_type=replies.EVENT_STREAM)
        return await replies.page(self.hub, self.broadcast, path, caller)

    async def _rewritten(self, scope: Scope, receive: Receive, send: Send, rewrite: Callable[[bytes], bytes]) -> None:
        """Let the server inside answer, and change its JSON."""
        held: list[Message] = []

        async def send_rewritten(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == HTTPStatus.OK and is_json(message):
                    held.append(message)
                    return
            elif held:
                held.append(message)
                if message.get("more_body", False):
                    return
                body = rewrite(b"".join(one.get("body", b"") for one in held[1:]))
                await send({**held[0], "headers": [*without_length(held[0]["headers"]), length_header(body)]})
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self.app(scope, receive, send_rewritten)

    def _with_slo(self, response_id: str, scope: Scope, body: bytes) -> bytes:
        """Write into a stored response what its first answer said."""
        record = self._record_for(response_id, scope)
        return body if record is None else write_into(body, answers.annotation(record, tier=None))

    def _record_for(self, name: str, scope: Scope) -> Record | None:
        operator = self.hub.operator
        with contextlib.suppress(RequestError):
            caller = operator.caller(scope["headers"], peer(scope))
            return self.hub.find(name, lambda tenant: operator.identities.may_see(caller, tenant))
        return None


async def _read(receive: Receive) -> bytes:
    """Return the body of a request; nothing of one that is longer than any of ours."""
    body = b""
    while len(body) <= MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body if len(body) <= MAX_BODY else b""
