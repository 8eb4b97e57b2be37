"""One request around the server inside, and its response: read, stamped, answered with what was decided.

The request's body is read when the server inside asks for it, checked and handed on with `vllm_xargs` written into it.
What a refused client gets replaces the server's own complaint about the empty body it is given instead.

On the way back a streamed response's headers wait for the verdict, or for the first chunk, or for the
deadline, whichever comes first; vLLM submits a request only when its stream is first read, so the server
inside is never made to wait. A class whose wait is bounded (`ttl_ms`) may still be refused until it
begins, so its headers wait for its first chunk. The last data event carries `slo` and `service_tier`, every other
byte passes untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slos_serve.config import short
from slos_serve.core.words import Reason, Said
from slos_serve.http import answers, replies, routes, seal
from slos_serve.http.headers import RawHeaders, dress, exposed, peer, without_length
from slos_serve.http.hub import Hub
from slos_serve.http.identity import RequestError, UnknownKeyError, text
from slos_serve.http.records import Record
from slos_serve.http.routes import SILENT, Endpoint
from slos_serve.http.slo import SloRequest
from slos_serve.http.stream import EventTail, StreamTail, write_into

MANY_BRACKETS, FRAMES_INSIDE = 400, 200
LARGE_BODY = 1 << 20  # such bodies are parsed beside the event loop
INVALID_BODY = b"{"
LAST_WAIT_S = 0.1


class Exchange:
    """One request and its response."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, *, hub: Hub, route: Endpoint) -> None:
        self._app = app
        self._hub = hub
        self._route = route
        self._scope = dict(scope)
        self._client_receive = receive
        self._client_send = send
        self._received_s = self._arrival_s = time.time()
        self._entered_s = time.monotonic()
        self._body_was_read = False
        self.slo_id = ""
        self._request = SloRequest(slo_class="")
        self.num_choices = 1
        self._num_admitted = 0
        self._may_stop_early = False
        self._is_background = False
        self._start: Message | None = None
        self._is_started = False
        self._was_sent = False  # the first chunk of a stream
        self._reply: Response | None = None  # in place of what the server inside answers
        self._is_answered = False
        self._refused = asyncio.Event()
        self._starting = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._tail: StreamTail | EventTail | None = None
        self._document: list[bytes] | None = None

    async def run(self) -> None:
        """Let the server inside answer."""
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            if self._watch is not None:
                self._watch.cancel()
            if self._num_admitted:
                self._hub.leave(self._request.tenant, self._num_admitted)
            if self._reply is not None:
                await self._reply_with(())

    # -- the request ------------------------------------------------------------------------------

    async def _receive(self) -> Message:
        if self._body_was_read:
            return await self._receive_more()
        chunks, size, limit = [], 0, self._hub.config.max_body_bytes
        while True:
            message = await self._client_receive()
            if message["type"] != "http.request":
                return message  # the client left while it was still sending
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit or not message.get("more_body", False):
                break
        self._body_was_read = True
        # Only now: whoever sends slowly has not waited, and gains no seniority.
        self._arrival_s, self._entered_s = time.time(), time.monotonic()
        raw = b"".join(chunks)
        chunks.clear()
        body = await (self._prepared(raw) if size <= limit else self._answer(replies.too_large(limit)))
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

    async def _prepared(self, raw: bytes) -> bytes:
        """Return the body for the server inside; refuses what is malformed or has no room."""
        hub, headers = self._hub, self._scope["headers"]
        if _is_too_deep(raw):
            expected = "JSON that is not nested so deeply"
            return await self._answer(
                replies.bad_request(RequestError(param="body", value=raw[:20].decode("latin-1"), expected=expected))
            )
        if not hub.operator.concerns(headers, raw):
            reason = hub.refusal(best_effort=True, rejects=False)
            return raw if reason is None else await self._refuse(reason)
        try:
            document = await asyncio.to_thread(json.loads, raw) if len(raw) > LARGE_BODY else json.loads(raw)
        except (ValueError, RecursionError):
            document = None
        if self._route is SILENT:
            document = document if isinstance(document, dict) else {}  # a form with a recording in it
        if not isinstance(document, dict) or (not document and self._route is not SILENT):
            return raw  # the server inside says what is wrong with it
        own = self._route.arguments(document)
        try:
            request = hub.operator.read(headers, {**document, routes.VLLM_XARGS[0]: own}, peer(self._scope))
            self._check(request, document)
        except RequestError as problem:
            return await self._answer(replies.bad_request(problem))
        except UnknownKeyError as problem:
            return await self._answer(replies.error(HTTPStatus.UNAUTHORIZED, str(problem)))
        self._request = request
        reason = hub.refusal(best_effort=request.best_effort, rejects=request.rejects) or self._no_room(document)
        if reason is not None:
            return await self._refuse(reason)
        if self._route is SILENT or not isinstance(own, dict | None):
            return raw
        return self._stamped(raw, document, own or {})

    def _no_room(self, document: Mapping[str, Any]) -> str | None:
        """Take room among what its tenant has under way; return why there is none."""
        if self._hub.config.max_requests_per_tenant is None:
            return None
        count = routes.num_parts(document)
        if not self._hub.admit(self._request.tenant, count):
            return Reason.TENANT_FULL
        self._num_admitted = count
        return None

    def _check(self, request: SloRequest, document: Mapping[str, Any]) -> None:
        """Refuse what could not be kept to."""
        if self._route is SILENT and self._hub.operator.wishes(self._scope["headers"], document):
            raise RequestError(param="slo", value="(asked)", expected="nothing on this route: it promises no latency")
        most = self._hub.config.max_requests_per_tenant
        if most and (count := routes.num_parts(document)) > most:
            expected = f"at most {most} answers to one request (max_requests_per_tenant)"
            raise RequestError(param="n", value=count, expected=expected)
        if request.rejects and document.get("background"):
            expected = "false for a class that asks to be refused: the answer comes before the verdict"
            raise RequestError(param="background", value=True, expected=expected)

    def _stamped(self, raw: bytes, document: Mapping[str, Any], own: Mapping[str, Any]) -> bytes:
        """Return the body with what the engine is told, and nothing of that by anybody else."""
        request = self._request
        kept = {key: value for key, value in own.items() if not key.startswith("slo_")}
        session = {"session_id": request.session} if request.session and "session_id" not in own else {}
        if not (request.asked or request.xargs):
            changed = {**kept, **session}
            return raw if changed == own else self._route.written(raw, document, changed)
        slo_id = uuid.uuid4().hex
        stamped_s = self._arrival_s - self._hub.delivery_lead_s
        xargs = {**request.xargs, "slo_id": slo_id, "slo_arrival_s": stamped_s}
        if request.asked:
            self.slo_id = slo_id
            self._hub.open(
                slo_id,
                slo_class=request.slo_class,
                tenant=request.tenant,
                arrival_s=self._arrival_s,
                best_effort=request.best_effort,
                reason=request.reason,
                shown_tenant=request.shown_tenant,
                client_id=_client_id(self._scope["headers"], document),
                upload_ms=round((self._arrival_s - self._received_s) * 1000, 1),
                _stamped_s=stamped_s,
            )
            self.num_choices = routes.num_parts(document)
            self._may_stop_early = bool(document.get("stop"))
            self._is_background = bool(document.get("background"))
            if request.rejects:
                self._watch = asyncio.create_task(self._await_verdict())
        return self._route.written(raw, document, {**kept, **session, **seal.sealed(xargs)})

    # -- the response -----------------------------------------------------------------------------

    async def _send(self, message: Message) -> None:
        if self._reply is not None:
            if message["type"] == "http.response.start":
                await self._reply_with(message["headers"])
            elif self._start is not None and self._scope.get("asgi", {}).get("spec_version", "2.0") >= "2.4":
                raise OSError("the request was refused")  # how such servers say that the client has left
        elif not self.slo_id:
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
            named = [(b"x-slo-id", self.slo_id.encode())]  # an answer that is none can be asked about all the same
            await self._client_send({**message, "headers": exposed([*message["headers"], *named])})
            return
        self._start = message
        if kind.startswith(b"text/event-stream"):
            self._tail = self._route.tail(self._extra, self.num_choices)
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
            await self._settle(ended=not self._is_background)
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
        if self._reply is None:
            await self._client_send({"type": "http.response.body", "body": data, "more_body": more})
            if self._tail is not None and not self._was_sent:
                self._was_sent = True
                self._hub.annotate(self.slo_id, _sent_s=time.time())

    async def _was_sent_away(self) -> bool:
        """Refuse a request that the engine ended because it had waited too long; tell whether it did."""
        ttl_s = self._request.ttl_s
        if ttl_s is None or self._is_started or self._reply or time.time() - self._arrival_s < ttl_s:
            return False
        await self._hub.wait_end(self.slo_id, self.num_choices, LAST_WAIT_S)
        if not self._hub.was_sent_away(self.slo_id):
            return False
        await self._answer(replies.refusal(Reason.TTL_EXPIRED, self._hub.retry_after_s))
        return True

    async def _settle(self, *, ended: bool) -> None:
        """Wait a moment for what is on its way, where it cannot be told or acted on later.

        That is the verdict, and of a request that has `ended` how it went. One that stops at a text of the
        client's ends here before the engine hears of it: that one is not waited for.
        """
        if not self._hub.is_heard:
            return
        if ended and not self._may_stop_early:
            await self._hub.wait_end(self.slo_id, self.num_choices, LAST_WAIT_S)
            return
        if self._watch is not None and not self._watch.done():
            await asyncio.wait((self._watch,), timeout=LAST_WAIT_S)
        else:
            await self._hub.wait_verdict(self.slo_id, LAST_WAIT_S)

    async def _begin(self, content_length: int | None = None) -> None:
        """Send the response's start with what is known by now, once."""
        if self._is_started:
            return
        async with self._starting:
            if self._start is None or self._is_started or self._reply is not None:
                return
            headers = list(self._start["headers"])
            if content_length is not None:
                headers = [*without_length(headers), (b"content-length", str(content_length).encode())]
            headers = exposed([*headers, *answers.headers(self._record())])
            await self._client_send({**self._start, "headers": headers})
            self._is_started = True

    async def _await_verdict(self) -> None:
        left_s = self._request.hold_s - (time.monotonic() - self._entered_s)
        verdict = await self._hub.wait_verdict(self.slo_id, left_s)
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
        self.slo_id = slo_id = self.slo_id or uuid.uuid4().hex
        is_retry = replies.is_retry(
            dict(self._scope["headers"]).get(replies.RETRIES_HEADER.encode(), b"").decode("latin-1")
        )
        self._hub.reject(slo_id, slo_class=slo_class, tenant=request.tenant, reason=reason, is_retry=is_retry)
        wait_s = self._hub.retry_after_s
        return await self._answer(replies.refusal(reason, wait_s, slo_id=slo_id, slo_class=slo_class))

    async def _answer(self, response: Response) -> bytes:
        """Answer in place of the server inside, as soon as its headers are known; returns a body it will not act on."""
        self._reply = response
        self._refused.set()
        if self._start is not None:
            await self._reply_with(self._start["headers"])
        return INVALID_BODY

    async def _reply_with(self, headers: RawHeaders) -> None:
        """Send the reply, once, with what the middlewares of the server inside wrote beside its own answer."""
        if self._is_answered or self._reply is None:
            return
        self._is_answered = True
        dress(self._reply, headers)
        await self._reply(self._scope, self._client_receive, self._client_send)

    def _record(self) -> Record:
        unknown = {"id": self.slo_id, "class": self._request.slo_class, "verdict": "pending", "reason": ""}
        return self._hub.find(self.slo_id) or unknown

    def _extra(self) -> Mapping[str, Any]:
        return answers.annotation(self._record(), tier=self._request.tier, has_tier=self._route.has_tier)


def _is_too_deep(raw: bytes) -> bool:
    """Tell whether JSON is nested too deeply to be read by the server inside, which has fewer frames left for it."""
    if raw.count(b"[") + raw.count(b"{") < MANY_BRACKETS:
        return False
    try:
        with contextlib.suppress(ValueError):
            json.loads(b"[" * FRAMES_INSIDE + raw + b"]" * FRAMES_INSIDE)
    except RecursionError:
        return True
    return False


def _is_no(verdict: Record) -> bool:
    return bool(verdict["verdict"] == Said.BEST_EFFORT and verdict["reason"] != Reason.OBSERVE)


def _is_yes(verdict: Record | None) -> bool:
    return verdict is not None and verdict["verdict"] in answers.PROMISED


def _client_id(headers: RawHeaders, document: Mapping[str, Any]) -> str:
    """Return what a client calls its request."""
    named = next((text(value) for name, value in headers if name == b"x-request-id"), None)
    given = named or document.get("request_id")
    return short(given) if isinstance(given, str) else ""
