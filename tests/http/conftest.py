"""A server that answers the way vLLM's does, and a middleware with a hub of its own around it."""

import asyncio
import json

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.http.middleware import SloMiddleware
from slos_serve.http.routes import ROUTES


def verdict(slo_id, kind="promised", reason="", **more):
    more = {"slack_ms": 12.5, "predicted_ttft_ms": 183.4, **more}
    return {"slo_id": slo_id, "request_id": f"chatcmpl-{slo_id}-0a1b2c3d", "slo_class": "chat", "tenant": ""} | {
        "verdict": kind,
        "reason": reason,
        **more,
    }


def finished(slo_id, outcome="met", **more):
    return {
        "slo_id": slo_id,
        "request_id": f"chatcmpl-{slo_id}-0a1b2c3d",
        "slo_class": "chat",
        "tenant": "acme",
        "outcome": outcome,
        "promised": True,
        "stages": {"prefill": "met", "thinking": "", "answer": "met"},
        **more,
    }


def event(**chunk):
    return f"data: {json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}\n\n"


def choice(text="", finish=None, index=0):
    return {"index": index, "delta": {"content": text}, "finish_reason": finish}


class FakeVllm:
    """Remembers what arrived; `on_request(xargs)` may feed the hub, `events` is what a stream says."""

    def __init__(self, hub):
        self.hub = hub
        self.seen = []
        self.headers = []
        self.on_request = lambda xargs: None
        self.is_closed = False
        self.events = [
            event(id="x", choices=[choice("Hé")]),
            event(id="x", choices=[choice("llo")]),
            event(id="x", choices=[choice("", "stop")]),
            "data: [DONE]\n\n",
        ]
        self.document = {"id": "chatcmpl-1", "choices": [{"message": {"content": "Héllo"}}], "service_tier": None}
        self.status = 200
        self.seconds = 0.0

    async def complete(self, request):
        try:
            body = json.loads(await request.body())
            body["model"]
        except (KeyError, RecursionError, TypeError, ValueError):
            return JSONResponse({"error": {"message": "bad json", "code": 400}}, status_code=400)
        self.seen.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return JSONResponse({"error": {"message": "no such model", "code": self.status}}, status_code=self.status)
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        self.on_request(body.get("vllm_xargs") or {})
        generating = asyncio.create_task(self.generate())
        leaving = asyncio.create_task(request.receive())
        await asyncio.wait((generating, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (generating, leaving):
            task.cancel()
        self.is_closed = not generating.done()
        return JSONResponse(generating.result() if generating.done() else None)

    async def generate(self):
        await asyncio.sleep(self.seconds)
        return self.document

    async def stream(self, body):
        """Reach the engine only when read, as vLLM's generators do."""
        try:
            self.on_request(body.get("vllm_xargs") or {})
            await asyncio.sleep(self.seconds)
            for item in self.events:
                await asyncio.sleep(0.005)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True

    async def health(self, request):
        return Response(status_code=200)

    def app(self, *middleware):
        async def not_found(request, error):
            return JSONResponse({"error": {"message": "Not Found", "code": 404}}, status_code=404)

        routes = [
            *(Route(path, self.health) for path in ("/health", "/ping")),
            Route("/v1/responses/{response_id}", lambda request: JSONResponse(self.document)),
            Route("/v1/models", lambda request: JSONResponse({"object": "list"})),
            *(Route(path, self.complete, methods=["POST"]) for path in (*ROUTES, "/v1/embeddings")),
        ]
        return Starlette(routes=routes, middleware=middleware, exception_handlers={404: not_found})


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def hub(registry):
    return Hub(SloMetrics(registry))


@pytest.fixture
def vllm(hub):
    return FakeVllm(hub)


@pytest.fixture
def app(vllm, hub):
    return vllm.app(Middleware(SloMiddleware, hub=hub))


@pytest.fixture
def client(app):
    with TestClient(app) as client:
        yield client


@pytest.fixture
def say():
    """Builders of the engine's messages."""

    class Say:
        verdict = staticmethod(verdict)
        finished = staticmethod(finished)
        event = staticmethod(event)
        choice = staticmethod(choice)

    return Say


def data_events(text):
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


@pytest.fixture
def events():
    return data_events
