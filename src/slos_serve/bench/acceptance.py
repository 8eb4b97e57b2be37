"""What an acceptance run asks of a server: promises under a moderate load, throughput without any, greedy texts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slos_serve.bench.client import BenchRequest, TargetError, discover_model, offer, random_prompt
from slos_serve.bench.grade import entry, grade_run
from slos_serve.bench.http_json import get_json
from slos_serve.core.types import Slo

TOPICS = ("rain", "bread", "the sea", "a long train journey", "maps", "honey bees", "glass", "winter")
PROMPT_TOKENS = (32, 160)
RELAXED = Slo(ttft_s=5.0, tpot_s=0.5)  # a moderate load: promises that any engine worth verifying can give
TEXT_TOKENS = 32
MIN_BLOCKS = 5

Burst = Callable[[int], float]  # from a seed to output tokens per second
Pairs = list[tuple[float, float]]  # tokens per second of ours and of vLLM alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is asked. `num_requests` of `output_tokens` come at once, or over `load_s` seconds.

    At most `num_blocks` blocks of four bursts compare throughputs.
    """

    num_texts: int
    num_requests: int
    output_tokens: int
    load_s: float
    num_blocks: int


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What one server showed: greedy texts, one by one and all at once."""

    texts: list[str] = field(default_factory=list)
    batched: list[str] = field(default_factory=list)


def serve_promises(url: str, size: Size, *, seed: int, api_key: str | None = None) -> dict[str, Any]:
    """Offer requests with relaxed promises, evenly spread, and return the graded entry."""
    model = asyncio.run(discover_model(url, api_key=api_key))
    requests = _requests(size, seed, spread_s=size.load_s, slo=RELAXED)
    results = asyncio.run(offer(url, model, requests, api_key=api_key))
    return entry(grade_run(requests, results), system="slos-serve", scenario="verify", span_s=size.load_s)


def alternate(ours: Burst, stock: Burst, *, num_blocks: int, is_decided: Callable[[Pairs], bool]) -> Pairs:
    """Compare two servers that are both up: ours - stock - stock - ours, until that is decided or over.

    What else the machine does, and how that drifts over a block, meets both alike. The first burst of each, which
    may compile or fill caches, is not counted; no prompt of one that is counted came to that server before.
    """
    for burst in (ours, stock):
        burst(0)
    pairs: Pairs = []
    while len(pairs) < num_blocks and (len(pairs) < MIN_BLOCKS or not is_decided(pairs)):
        first, second = 2 * len(pairs) + 1, 2 * len(pairs) + 2
        rates = [ours(first), stock(first), stock(second), ours(second)]
        pairs.append((math.sqrt(rates[0] * rates[3]), math.sqrt(rates[1] * rates[2])))
    return pairs


def repeat(burst: Burst) -> list[float]:
    """Measure one server alone; its first burst is not counted."""
    return [burst(seed) for seed in range(2 * MIN_BLOCKS + 1)][1:]


def burst_of(url: str, size: Size, *, seed: int, api_key: str | None = None) -> Burst:
    """Return what offers requests without SLOs, all at once, and says how fast they were served."""
    model = asyncio.run(discover_model(url, api_key=api_key))

    def burst(number: int) -> float:
        requests = _requests(size, seed + number, spread_s=0.0, slo=Slo())
        started = time.perf_counter()
        results = asyncio.run(offer(url, model, requests, slo_form="none", api_key=api_key))
        took_s = time.perf_counter() - started
        failed = next((result.error for result in results if result.error), None)
        if failed:
            raise TargetError(f"{url}: a request failed: {failed}")
        return size.num_requests * size.output_tokens / took_s

    return burst


def take_texts(url: str, size: Size, *, slo: Mapping[str, Any] | None, api_key: str | None = None) -> Evidence:
    """Take greedy texts with the `slo` object in the body."""
    prompts = [f"Write a few sentences about {TOPICS[i % len(TOPICS)]}." for i in range(size.num_texts)]

    def text(prompt: str) -> str:
        return complete(url, prompt, slo=slo, tokens=TEXT_TOKENS, api_key=api_key)

    evidence = Evidence(texts=[text(prompt) for prompt in prompts])
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        evidence.batched = list(pool.map(text, prompts))
    return evidence


def complete(url: str, prompt: str, *, slo: Mapping[str, Any] | None, tokens: int, api_key: str | None = None) -> str:
    """Return one greedy completion of exactly `tokens` tokens."""
    base = url.rstrip("/").removesuffix("/v1")
    model = get_json(f"{base}/v1/models", api_key)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    answer = get_json(f"{base}/v1/completions", api_key, {**body, **({} if slo is None else {"slo": dict(slo)})})
    return str(answer["choices"][0]["text"])


def _requests(size: Size, seed: int, *, spread_s: float, slo: Slo) -> list[BenchRequest]:
    """Return requests of random prompts, `spread_s` seconds from the first to the last."""
    rng = np.random.default_rng(seed)
    return [
        BenchRequest(
            request_id=f"verify-{seed}-{i}",
            offset_s=i * spread_s / size.num_requests,
            prompt_token_ids=random_prompt(int(rng.integers(*PROMPT_TOKENS)), rng),
            output_tokens=size.output_tokens,
            hidden_max_tokens=4 * size.output_tokens,
            slo=slo,
            slo_class="best-effort" if slo.is_empty else "chat",
        )
        for i in range(size.num_requests)
    ]
