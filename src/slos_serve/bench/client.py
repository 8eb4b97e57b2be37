"""Open-loop load on any OpenAI-compatible URL: each request leaves at its time, whatever came before.

Lengths are exact. A prompt goes out as token ids (`/v1/completions`), and an output has its intended length
because the engine is told `ignore_eos` and `max_tokens`. `max_tokens` would then give the true length away,
which no client knows, so each request also carries `vllm_xargs: {"hidden_max_tokens": N}`, the limit
that a client of its class would have set. A scheduler that plans with lengths must read that instead of
`max_tokens`; ours does, and stock vLLM reads neither while it schedules.

Tokens are counted from the usage that comes with every chunk (`continuous_usage_stats`): a chunk may hold
several tokens, or none that shows as text. Servers without it get one token per chunk with text, and
`counted_by` says so. Times are seconds since the run's start, taken when bytes arrive.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.bench.wire import Wire, words
from slos_serve.core.types import Slo
from slos_serve.errors import MissingExtraError, SlosServeError

if TYPE_CHECKING:
    from typing import Self

    from aiohttp import ClientResponse, ClientSession

ENDPOINTS = ("completions", "chat")
SLO_FORMS = ("body", "xargs", "none")  # `slo` for our server, `vllm_xargs` for vLLM with our scheduler alone
FIRST_TOKEN_ID, LAST_TOKEN_ID = 1_000, 30_000  # plain tokens in every vocabulary of 32k and more
REFUSALS = (429, 503)


class TargetError(SlosServeError):
    """Say why a server could not be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """One request to offer. `offset_s` counts from the run's start; `output_tokens` is the true length.

    `hidden_max_tokens`: the limit that a client of this class would set. `slo` is what the request is
    graded by, and what it asks for where `slo_class` is not None. `extra` is put over the body's fields.
    """

    request_id: str
    offset_s: float
    prompt_token_ids: Sequence[int]
    output_tokens: int
    hidden_max_tokens: int
    slo: Slo = field(default_factory=Slo)
    slo_class: str = "best-effort"
    thinking_tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class StreamResult:
    """What came back for one request. Times in seconds since the run's start.

    `chunks` holds (time, output tokens so far). `headers` are those that start with `x-slo-`; `slo` is the
    object of that name in the stream. `error` is None where the stream ended by itself.
    """

    request_id: str
    sent_s: float
    lag_s: float = 0.0
    status: int = 0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    finished_s: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    counted_by: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    slo: dict[str, Any] | None = None
    service_tier: str | None = None
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens received."""
        return self.chunks[-1][1] if self.chunks else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` is the way back."""
        document = asdict(self)
        document["chunks"] = [[round(at, 5), tokens] for at, tokens in self.chunks]
        return document

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`."""
        return cls(**{**data, "chunks": [(at, tokens) for at, tokens in data["chunks"]]})


def random_prompt(num_tokens: int, rng: np.random.Generator) -> list[int]:
    """Return token ids that share no prefix with another prompt's."""
    ids: list[int] = rng.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, num_tokens).tolist()
    return ids


def request_body(request: BenchRequest, model: str, endpoint: str, slo_form: str) -> dict[str, Any]:
    """Return the JSON body of one request, with its class and its promises as numbers, in ms.

    `slo_form`: where they go, one of `SLO_FORMS`. Plain vLLM ignores either.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if endpoint == "chat":  # about one token a word
        body["messages"] = [{"role": "user", "content": words(len(request.prompt_token_ids))}]
    else:
        body["prompt"] = list(request.prompt_token_ids)
    asked: dict[str, Any] = {"class": request.slo_class}
    asked |= {f"{name.removesuffix('_s')}_ms": seconds * 1e3 for name, seconds in request.slo.items() if seconds}
    hidden = {"hidden_max_tokens": request.hidden_max_tokens}
    if slo_form == "body":
        body |= {"slo": asked, "vllm_xargs": hidden}
    elif slo_form == "xargs":
        body["vllm_xargs"] = {**{f"slo_{name}": value for name, value in asked.items()}, **hidden}
    return body | dict(request.extra)


async def discover_model(base_url: str, *, api_key: str | None = None) -> str:
    """Return the name of the first model that the server offers; `TargetError` where it does not answer."""
    return str((await list_models(base_url, api_key=api_key))[0]["id"])


async def max_model_length(base_url: str, *, api_key: str | None = None) -> int:
    """Return the longest context that the server takes, in tokens; 2048 where it does not say."""
    return int((await list_models(base_url, api_key=api_key))[0].get("max_model_len") or 2048)


async def list_models(
    base_url: str, *, api_key: str | None = None, headers: Mapping[str, str] = {}, timeout_s: float = 10.0
) -> list[dict[str, Any]]:
    """Return what the server says of its models, at least one; `TargetError` where it does not answer."""
    aiohttp = _aiohttp()
    headers = {**_auth(api_key), **headers}
    url = f"{_v1(base_url)}/models"
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
            session.get(url) as response,
        ):
            response.raise_for_status()
            models = [dict(one) for one in (await response.json())["data"]]
            _ = models[0]["id"]
            return models
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise TargetError(f"--target {url}: no model list ({reason}): is the server up?") from None


async def offer(
    base_url: str,
    model: str,
    requests: Sequence[BenchRequest],
    *,
    endpoint: str = "completions",
    slo_form: str = "body",
    api_key: str | None = None,
    drain_timeout_s: float = 120.0,
    on_result: Callable[[StreamResult], None] | None = None,
) -> list[StreamResult]:
    """Send every request at its `offset_s` and return what came back, in the order of `requests`.

    Streams that still run `drain_timeout_s` after the last send are cut and count as failed.
    """
    async with Client(base_url, model, endpoint=endpoint, slo_form=slo_form, api_key=api_key) as client:
        return await client.offer(requests, drain_timeout_s=drain_timeout_s, on_result=on_result)


class Client:
    """One client of one server; an async context manager. `start` is the run's time 0 (`perf_counter`)."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        endpoint: str = "completions",
        slo_form: str = "body",
        api_key: str | None = None,
        headers: Mapping[str, str] = {},
        wire: Wire | None = None,
        request_timeout_s: float = 600.0,
    ) -> None:
        self.url = f"{_v1(base_url)}/{'chat/completions' if endpoint == 'chat' else 'completions'}"
        self.model = model
        self.start = time.perf_counter()
        self._endpoint = endpoint
        self._slo_form = slo_form
        self._headers = {**_auth(api_key), "content-type": "application/json", **headers}
        self._wire = wire or Wire()
        self._timeout_s = request_timeout_s
        self._session: ClientSession

    async def __aenter__(self) -> Self:
        aiohttp = _aiohttp()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=3600, keepalive_timeout=60),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, connect=30),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def body(self, request: BenchRequest) -> bytes:
        """Return the bytes to send for a request, of what the server takes as far as that is known."""
        return json.dumps(self._wire.adapt(request_body(request, self.model, self._endpoint, self._slo_form))).encode()

    def now_s(self) -> float:
        """Return the time since the run's start."""
        return time.perf_counter() - self.start

    async def offer(
        self,
        requests: Sequence[BenchRequest],
        *,
        drain_timeout_s: float = 120.0,
        on_result: Callable[[StreamResult], None] | None = None,
    ) -> list[StreamResult]:
        """Start a run: send every request at its `offset_s`; see the function `offer`."""
        due = sorted(((request, self.body(request)) for request in requests), key=lambda pair: pair[0].offset_s)
        tasks: list[asyncio.Task[None]] = []
        results: dict[str, StreamResult] = {}
        self.start = time.perf_counter()
        try:
            for request, body in due:
                await asyncio.sleep(request.offset_s - self.now_s())
                result = StreamResult(request_id=request.request_id, sent_s=request.offset_s)
                results[request.request_id] = result
                tasks.append(asyncio.create_task(self.stream(body, result, on_result, request=request)))
            if tasks:
                await asyncio.wait(tasks, timeout=drain_timeout_s)
        finally:
            await cancel(tasks)
        return [results[request.request_id] for request in requests]

    async def stream(
        self,
        body: bytes,
        result: StreamResult,
        on_result: Callable[[StreamResult], None] | None = None,
        *,
        request: BenchRequest | None = None,
    ) -> None:
        """Send one request now and read its stream to the end; whatever goes wrong is noted in `result`.

        With `request` it is sent again, and counts from then, where the server refused a field of the body.
        """
        aiohttp = _aiohttp()
        due_s, generation = result.sent_s, self._wire.generation
        if request is not None and generation:
            body = self.body(request)
        try:
            while await self._exchange(body, result, due_s, generation) and request is not None:
                body, generation = self.body(request), self._wire.generation
        except asyncio.CancelledError:
            result.error = "cut off: still running at the end of the run"
            raise
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"
        finally:
            result.finished_s = self.now_s()
            if on_result is not None:
                on_result(result)

    async def _exchange(self, body: bytes, result: StreamResult, due_s: float, generation: int) -> bool:
        """Send a body and read what comes; tell whether it should be sent again with fewer fields."""
        result.sent_s = self.now_s()
        result.lag_s, result.error = result.sent_s - due_s, None
        async with self._session.post(self.url, data=body) as response:
            result.status = response.status
            result.headers = {k.lower(): v for k, v in response.headers.items() if k.lower().startswith("x-slo-")}
            if response.status == 200:
                await self.read_events(response, result)
                if result.error is None and result.finish_reason is None:
                    result.error = "the stream ended without a finish reason"
                return False
            answer = await response.text()
            result.error = f"HTTP {response.status}: {answer[:300]}"
            return self._wire.learn(response.status, answer, generation)

    async def read_events(self, response: ClientResponse, result: StreamResult) -> None:
        """Read server-sent events to the end."""
        rest = b""
        async for data in response.content.iter_any():
            now = self.now_s()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line[5:].strip() if line.startswith(b"data:") else b""
                if text and text != b"[DONE]":
                    take_event(json.loads(text), result, now)


async def cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def take_event(event: Mapping[str, Any], result: StreamResult, now_s: float) -> None:
    """Note what one server-sent event says."""
    if "error" in event:
        error = event["error"]
        result.error = str(error.get("message", error) if isinstance(error, Mapping) else error)
        return
    if isinstance(event.get("slo"), Mapping):
        result.slo = dict(event["slo"])
    result.service_tier = event.get("service_tier") or result.service_tier
    choices = event.get("choices") or [{}]
    choice = choices[0]
    result.finish_reason = choice.get("finish_reason") or result.finish_reason
    usage = event.get("usage")
    before = after = result.num_output_tokens
    if usage:
        result.prompt_tokens = usage.get("prompt_tokens") or result.prompt_tokens
        total = int(usage.get("completion_tokens") or 0)
        if result.counted_by == "chunks":
            _spread(result, total)
        else:
            after, result.counted_by = total, "usage"
    elif _has_text(choice):
        after, result.counted_by = before + 1, "chunks"
    if after > before:
        result.chunks.append((now_s, after))


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"))


def _spread(result: StreamResult, num_tokens: int) -> None:
    """Correct a count by chunks once the true total is known: every chunk gets its share."""
    counted = result.num_output_tokens
    if counted and num_tokens >= counted:
        result.chunks = [(at, max(1, tokens * num_tokens // counted)) for at, tokens in result.chunks]


def _v1(base_url: str) -> str:
    url = base_url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--target {base_url}: expected a URL such as http://127.0.0.1:8000")
    return url if url.endswith("/v1") else f"{url}/v1"


def _auth(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _aiohttp() -> Any:
    try:
        import aiohttp  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtraError(module="aiohttp", extra="bench") from None
    return aiohttp
