"""A small OpenAI-compatible server on a simulated engine: real HTTP, real streams, step times from a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slos_serve.core.perf import PerfModel

MODEL = PerfModel.from_terms(
    [{"per_token_s": 2e-5, "per_request_s": 5e-5, "per_context_token_s": 1e-7, "per_pair_s": 1e-9, "fixed_s": 1e-3}]
)


@dataclass
class Live:
    """One request inside the engine."""

    prompt_tokens: int
    max_tokens: int
    computed: int = 0
    produced: int = 0
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)


@dataclass
class FakeEngine:
    """Decode first, chunked prefill, first come first served; writes step records as the plug-in does."""

    record: Path | None = None
    budget: int = 256
    requests: list[Live] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    slo_of: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _: None
    usage: str = "continuous"  # or "final" or "none"
    status: int = 200
    break_after: int | None = None
    num_steps: int = 0

    async def run(self) -> None:
        while True:
            if not self.requests:
                await asyncio.sleep(0.001)
                continue
            await self.step()

    async def step(self) -> None:
        room, context, pairs, batch = self.budget, 0, 0.0, []
        for live in sorted(self.requests, key=lambda live: live.produced == 0):
            chunk = 1 if live.produced else min(room, live.prompt_tokens - live.computed)
            if chunk <= 0:
                continue
            room -= chunk
            if live.produced:
                context += live.computed
            else:
                pairs += chunk * (live.computed + chunk / 2)
            batch.append((live, chunk))
        num_tokens = self.budget - room
        seconds = MODEL.seconds(num_tokens, len(batch), context_tokens=context, attention_pairs=pairs)
        await asyncio.sleep(seconds)
        self.write(num_tokens, len(batch), context, pairs, seconds)
        for live, chunk in batch:
            live.computed += chunk
            if live.computed >= live.prompt_tokens:
                live.produced += 1
                live.tokens.put_nowait(1)
            if live.produced == live.max_tokens:
                self.requests.remove(live)

    def write(self, num_tokens: int, num_requests: int, context: int, pairs: float, seconds: float) -> None:
        self.num_steps += 1
        if self.record is None:
            return
        line = {
            "step": self.num_steps, "t": 0.0, "num_tokens": num_tokens, "num_requests": num_requests,
            "context_tokens": context, "draft_steps": 0, "attention_pairs": pairs, "has_prefill": int(pairs > 0),
            "seconds": seconds, "planned_s": None, "predicted_s": None,
        }  # fmt: skip
        with self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 4096}]})

    async def completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        said = self.slo_of(body)
        headers = {"content-type": "text/event-stream"}
        if said:
            headers["x-slo-verdict"] = said["verdict"]
        response = web.StreamResponse(headers=headers)
        live = Live(len(body.get("prompt") or body["messages"][0]["content"].split()), body["max_tokens"])
        self.requests.append(live)
        await response.prepare(http)
        try:
            await self.stream(response, live, said)
        finally:
            if live in self.requests:
                self.requests.remove(live)
        return response

    async def stream(self, response: web.StreamResponse, live: Live, said: dict[str, Any] | None) -> None:
        sent = 0
        while sent < live.max_tokens:
            count = await live.tokens.get()
            while not live.tokens.empty():
                count += live.tokens.get_nowait()
            sent += count
            if self.break_after is not None and sent >= self.break_after:
                await send(response, {"error": {"message": "engine died", "code": 500}})
                return
            last = sent == live.max_tokens
            chunk: dict[str, Any] = {"choices": [{"text": " x", "finish_reason": "length" if last else None}]}
            if self.usage == "continuous":
                chunk["usage"] = {"prompt_tokens": live.prompt_tokens, "completion_tokens": sent}
            if last and said:
                chunk["slo"] = said
            await send(response, chunk)
        if self.usage != "none":
            usage = {"prompt_tokens": live.prompt_tokens, "completion_tokens": sent}
            await send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")


async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[str]:
    """Serve the engine on a free port and give its URL."""
    app = web.Application()
    app.router.add_get("/v1/models", engine.models)
    app.router.add_post("/v1/completions", engine.completions)
    app.router.add_post("/v1/chat/completions", engine.completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    loop = asyncio.create_task(engine.run())
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.cancel()
        await runner.cleanup()


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def serve():
    return serving


@pytest.fixture
def true_model():
    return MODEL
