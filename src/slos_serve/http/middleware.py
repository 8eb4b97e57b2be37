"""The middleware around vLLM's OpenAI server: `--middleware slos_serve.http.middleware.SloMiddleware`.

Theory of operation. vLLM puts a `--middleware` outside everything else, its API key check included. So
nothing is read or decided before the server inside asks for the request's body, which it does only for a
client it lets in; then the body is read, checked and handed on with `vllm_xargs` written into it. What a
refused client gets replaces the server's own complaint about the empty body it is given instead.

On the way back a streamed response's headers wait for the verdict, or for the first chunk, or for the
deadline, whichever comes first; vLLM submits a request only when its stream is first read, so the server
inside is never made to wait. A class whose wait is bounded (`ttl_ms`) may still be refused until it begins, so
its headers wait for its first chunk. The last data event carries `slo` and `service_tier`, every other byte
passes untouched. Requests that say nothing about latency cost one scan of their body.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slos_serve.http import modes, replies
from slos_serve.http.hub import HUB, Hub, Record
from slos_serve.http.slo import RequestError, SloRequest
from slos_serve.http.stream import ResponsesTail, StreamTail, append_member, write_into

RESPONSES = "/v1/responses"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", RESPONSES})
MODE_PATH = replies.SLO_PREFIX + "mode"
MAX_BODY = 1 << 16  # of what is posted to us
PROBE_HEADER = (b"x-slos-serve-probe", b"1")
INVALID_BODY = b"{"
XARGS = "vllm_xargs"
LAST_WAIT_S = 0.1


class SloMiddleware:
    """Pure ASGI middleware; everything that is not about SLOs goes straight to `app`."""

    def __init__(self, app: ASGIApp, hub: Hub = HUB) -> None:
        self.app = app
        self.hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            method = scope["method"]
            if method == "POST" and path in PATHS:
                await _Exchange(self.app, self.hub, scope, receive, send).run()
                return
            if (method == "GET" and path.startswith(replies.SLO_PREFIX)) or (method == "POST" and path == MODE_PATH):
                await self._page(path, scope, receive, send)
                return
            if path == "/health" and self.hub.is_profiling and PROBE_HEADER not in scope["headers"]:
                await replies.profiling()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _page(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in place of the 404 of the server inside, so that its API key check guards our pages too."""
        replaced = False

        async def send_page(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 404:
                replaced = True
                response = await self._answer(path, scope["method"], receive)
                response.raw_headers += [h for h in message["headers"] if h[0].startswith(b"access-control-")]
                await response(scope, receive, send)
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_page)

    async def _answer(self, path: str, method: str, receive: Receive) -> Response:
        if method == "POST":
            return await modes.switch(self.hub, await _read(receive))
        return modes.show(self.hub) if path == MODE_PATH else replies.page(self.hub, path)


class _Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, hub: Hub, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._hub = hub
        self._scope = dict(scope)
        self._client_receive = receive
        self._client_send = send
        self._arrival_s = time.time()
        self._entered_s = time.monotonic()
        self._body_was_read = False
        self._slo_id = ""
        self._request = SloRequest(slo_class="")
        self._num_choices = 1
        self._may_stop_early = False
        self._start: Message | None = None
        self._is_started = False
        self._is_refused = False
        self._refused = asyncio.Event()
        self._starting = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._tail: StreamTail | ResponsesTail | None = None
        self._document: list[bytes] | None = None

    async def run(self) -> None:
        """Let the server inside answer."""
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            if self._watch is not None:
                self._watch.cancel()

    # -- the request ------------------------------------------------------------------------------

    async def _receive(self) -> Message:
        if self._body_was_read:
            return await self._receive_more()
        chunks = []
        while True:
            message = await self._client_receive()
            if message["type"] != "http.request":
                return message  # the client left while it was still sending
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self._body_was_read = True
        body = await self._prepared(b"".join(chunks))
        headers = [h for h in self._scope["headers"] if h[0] != b"content-length"]
        self._scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        return {"type": "http.request", "body": body, "more_body": False}

    async def _receive_more(self) -> Message:
        """Wait for the client to leave; a request that was refused meanwhile counts as gone."""
        if not self._request.rejects:
            return await self._client_receive()
        client = asyncio.ensure_future(self._client_receive())
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            await asyncio.wait((client, refused), return_when=asyncio.FIRST_COMPLETED)
            return client.result() if client.done() else {"type": "http.disconnect"}
        finally:
            client.cancel()
            refused.cancel()

    async def _prepared(self, body: bytes) -> bytes:
        """Return the body for the server inside; refuses what is malformed or has no room."""
        hub, headers = self._hub, self._scope["headers"]
        if not hub.operator.concerns(headers, body):
            reason = hub.refusal(best_effort=True, rejects=False)
            return body if reason is None else await self._refuse(reason)
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return body  # the server inside says what is wrong with it
        if not isinstance(document, dict) or not document:
            return body
        try:
            request = hub.operator.read(headers, document)
        except RequestError as problem:
            return await self._answer(replies.bad_request(problem))
        self._request = request
        reason = hub.refusal(best_effort=request.best_effort, rejects=request.rejects)
        if reason is not None:
            return await self._refuse(reason)
        own = document.get(XARGS) or {}
        if not isinstance(own, dict) or not (request.asked or request.xargs):
            return body
        keep = own if request.keeps_own else {key: own[key] for key in own if not key.startswith("slo_")}
        slo_id = uuid.uuid4().hex
        xargs = {**keep, **request.xargs, "slo_id": slo_id, "slo_arrival_s": self._arrival_s}
        if request.asked:
            self._slo_id = slo_id
            hub.open(
                self._slo_id,
                slo_class=request.slo_class,
                tenant=request.tenant,
                arrival_s=self._arrival_s,
                best_effort=request.best_effort,
            )
            self._num_choices = _num_choices(document)
            self._may_stop_early = bool(document.get("stop"))
            if request.rejects:
                self._watch = asyncio.create_task(self._await_verdict())
        if json.detect_encoding(body) == "utf-8":
            return append_member(body, XARGS, xargs)
        return write_into(body, {XARGS: xargs})

    # -- the response -----------------------------------------------------------------------------

    async def _send(self, message: Message) -> None:
        if self._is_refused:
            if self._scope.get("asgi", {}).get("spec_version", "2.0") >= "2.4":
                raise OSError("the request was refused")  # how such servers say that the client has left
        elif not self._slo_id:
            await self._client_send(message)
        elif message["type"] == "http.response.start":
            await self._take_start(message)
        elif message["type"] == "http.response.body":
            await self._take_body(message)
        else:
            await self._begin()
            await self._client_send(message)

    async def _take_start(self, message: Message) -> None:
        headers = dict(message["headers"])
        kind = headers.get(b"content-type", b"")
        if message["status"] != 200 or b"content-encoding" in headers:
            self._is_started = True
            await self._client_send(message)
            return
        self._start = message
        if kind.startswith(b"text/event-stream"):
            is_responses = self._scope["path"].endswith(RESPONSES)
            self._tail = ResponsesTail(self._extra) if is_responses else StreamTail(self._extra, self._num_choices)
            if self._watch is None or self._watch.done():
                self._watch = asyncio.create_task(self._await_verdict())
        elif kind.startswith(b"application/json"):
            self._document = []

    async def _take_body(self, message: Message) -> None:
        data: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        if self._document is not None:
            self._document.append(data)
            if more:
                return
            await self._settle(ended=True)
            if await self._was_sent_away():
                return
            data = write_into(b"".join(self._document), self._extra())
            await self._begin(content_length=len(data))
        elif self._tail is not None:
            ended = self._tail.ends_in(data)
            if ended or (self._request.rejects and not self._is_started):
                await self._settle(ended=ended)
            if await self._was_sent_away():
                return
            await self._begin()
            data = self._tail.feed(data)
            if not more:
                data += self._tail.close()
            elif not data:
                return
        else:
            await self._begin()
        if not self._is_refused:
            await self._client_send({"type": "http.response.body", "body": data, "more_body": more})

    async def _was_sent_away(self) -> bool:
        """Refuse a request that the engine ended because it had waited too long; tell whether it did."""
        ttl_s = self._request.ttl_s
        if ttl_s is None or self._is_started or self._is_refused or time.time() - self._arrival_s < ttl_s:
            return False
        await self._hub.wait_end(self._slo_id, self._num_choices, LAST_WAIT_S)
        if not self._hub.was_sent_away(self._slo_id):
            return False
        await self._answer(replies.refusal("ttl-expired", self._hub.retry_after_s))
        return True

    async def _settle(self, *, ended: bool) -> None:
        """Wait a moment for what is on its way, where it cannot be told or acted on later.

        That is the verdict, and of a request that has `ended` how it went. One that stops at a text of the
        client's ends here before the engine hears of it: that one is not waited for.
        """
        if not self._hub.is_heard:
            return
        if ended and not self._may_stop_early:
            await self._hub.wait_end(self._slo_id, self._num_choices, LAST_WAIT_S)
            return
        if self._watch is not None and not self._watch.done():
            await asyncio.wait((self._watch,), timeout=LAST_WAIT_S)
        else:
            await self._hub.wait_verdict(self._slo_id, LAST_WAIT_S)

    async def _begin(self, content_length: int | None = None) -> None:
        """Send the response's start with what is known by now, once."""
        if self._is_started:
            return
        async with self._starting:
            if self._start is None or self._is_started or self._is_refused:
                return
            headers = [h for h in self._start["headers"] if content_length is None or h[0] != b"content-length"]
            if content_length is not None:
                headers.append((b"content-length", str(content_length).encode()))
            await self._client_send({**self._start, "headers": headers + _verdict_headers(self._record())})
            self._is_started = True

    async def _await_verdict(self) -> None:
        left_s = self._request.hold_s - (time.monotonic() - self._entered_s)
        verdict = await self._hub.wait_verdict(self._slo_id, left_s)
        with contextlib.suppress(OSError):  # the client has left
            if self._request.rejects and verdict is not None and _is_no(verdict):
                async with self._starting:
                    if not self._is_started:
                        await self._refuse(verdict["reason"])
            elif self._document is None and (self._request.ttl_s is None or _is_yes(verdict)):
                await self._begin()

    async def _refuse(self, reason: str) -> bytes:
        request = self._request
        slo_class = request.slo_class or self._hub.config.default_class
        slo_id = self._slo_id or uuid.uuid4().hex
        self._hub.reject(slo_id, slo_class=slo_class, tenant=request.tenant, reason=reason)
        return await self._answer(replies.refusal(reason, self._hub.retry_after_s))

    async def _answer(self, response: Response) -> bytes:
        """Answer in place of the server inside; returns a body that it will not act on."""
        self._is_refused = True
        self._refused.set()
        await response(self._scope, self._client_receive, self._client_send)
        return INVALID_BODY

    def _record(self) -> Record:
        return self._hub.find(self._slo_id) or {"class": self._request.slo_class, "verdict": "pending", "reason": ""}

    def _extra(self) -> Mapping[str, Any]:
        record = self._record()
        keys = ["class", "verdict", "reason", "predicted_ttft_ms", "hops"]
        if record.get("outcome") != "none":
            keys.append("outcome")
        if record["verdict"] not in {"pending", "best-effort"}:
            keys.append("slack_ms")
        extra: dict[str, Any] = {
            "slo": {"id": self._slo_id, **{k: record[k] for k in keys if _is_known(record.get(k))}}
        }
        if record["verdict"] == "best-effort":
            extra["service_tier"] = "flex"
        elif record["verdict"] != "pending":
            extra["service_tier"] = "priority" if self._request.tier == "priority" else "default"
        return extra


async def _read(receive: Receive) -> bytes:
    """Return the body of a request; nothing of one that is longer than any of ours."""
    body = b""
    while len(body) <= MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body if len(body) <= MAX_BODY else b""


def _is_no(verdict: Record) -> bool:
    return bool(verdict["verdict"] == "best-effort" and verdict["reason"] != "observe")


def _is_yes(verdict: Record | None) -> bool:
    return verdict is not None and verdict["verdict"] in {"promised", "promoted"}


def _is_known(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _verdict_headers(record: Record) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-slo-verdict", str(record["verdict"]).encode())]
    if record["reason"]:
        headers.append((b"x-slo-reason", str(record["reason"]).encode()))
    predicted = record.get("predicted_ttft_ms")
    if predicted is not None and math.isfinite(predicted):
        headers.append((b"x-slo-predicted-ttft-ms", str(round(predicted)).encode()))
    if "hops" in record:
        headers.append((b"x-slo-hops", str(record["hops"]).encode()))
    return headers


def _num_choices(document: Mapping[str, Any]) -> int:
    """Return how many choices a stream will finish: `n` of them for every prompt of a completion."""
    n, prompt = document.get("n"), document.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return prompts * n if isinstance(n, int) and n > 0 else prompts
