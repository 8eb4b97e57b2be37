"""Measure a running engine: drive it through steps of well-spread shapes and fit the recorded times.

A shape is what bears on the time of a step (see `core.perf`): prompts of many lengths alone, prompts that
continue at a context, decode batches of 1 to 32 at several contexts, and prompts beside decodes. Every
shape comes several times, so that its first sight (which compiles, allocates, warms caches) can be left
out. Rounds are repeated in random order until the time is used up: on a fast engine that is many rounds,
on a slow one at least one, with the dearest shapes left out. The engine writes what each step computed and
took (`--record`); only steps recorded after the start count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.bench.client import (
    BenchRequest,
    Client,
    StreamResult,
    TargetError,
    cancel,
    max_model_length,
    random_prompt,
)
from slos_serve.cache import write_json
from slos_serve.core.fit import FitReport, fit_perf_model, from_records
from slos_serve.records.profile import profile_document, read_records

MAX_ROUNDS = 12
DECODE_SHAPES = (
    (1, 64),
    (2, 256),
    (4, 64),
    (3, 640),
    (8, 64),
    (8, 256),
    (16, 48),
    (32, 32),
    (1, 1024),
)  # batch, context
DECODE_TOKENS = 24
MANY = 16  # decodes of the longest contexts, where the engine is fast enough
MIXED_BATCHES = (2, 8, 20)
FLUSH_TIMEOUT_S = 10.0

Item = Callable[[], Coroutine[Any, Any, None]]


def profile_server(
    base_url: str,
    record_path: Path,
    out_path: Path,
    model: str,
    *,
    key: Mapping[str, Any] | str,
    api_key: str | None = None,
    seed: int = 0,
    budget_s: float = 45.0,
    on_progress: Callable[[float], None] | None = None,
) -> FitReport:
    """Drive the server at `base_url`, which records its steps to `record_path`; write the profile; return the fit.

    `on_progress` is told the share of the time that is used. Raises `TargetError` where the server does not
    answer or records nothing.
    """
    start = record_path.stat().st_size if record_path.exists() else 0
    driver = asyncio.run(
        _drive(base_url, model, api_key=api_key, seed=seed, budget_s=budget_s, on_progress=on_progress)
    )
    records = _wait_for_records(record_path, start)
    if not records:
        raise TargetError(
            f"{record_path}: no steps were recorded: the server must be started with --record {record_path}"
        )
    report = fit_perf_model(from_records(records), rng=np.random.default_rng(seed))
    largest = int(max(record["num_tokens"] for record in records))
    # No prompt was as long as the budget: what was seen is the longest prompt.
    budget = largest if driver.longest_prompt > largest else max(largest, driver.max_model_len)
    write_json(profile_document(report, key=key, max_num_batched_tokens=budget), out_path)
    return report


def _wait_for_records(path: Path, start: int) -> list[dict[str, Any]]:
    """Return the new records once the file has stopped growing."""
    deadline = time.monotonic() + FLUSH_TIMEOUT_S
    size, since = -1, time.monotonic()
    while time.monotonic() < deadline:
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        elif size > start and time.monotonic() - since > 1.5:
            break
        time.sleep(0.1)
    return read_records(path, start=start) if size > start else []


async def warm_up(base_url: str, model: str, *, budget_s: float, api_key: str | None = None) -> None:
    """Send one round of shapes, or as much of it as fits the time, to any server."""
    await _drive(base_url, model, api_key=api_key, seed=1, budget_s=budget_s, on_progress=None, max_rounds=1)


async def _drive(
    base_url: str,
    model: str,
    *,
    api_key: str | None,
    seed: int,
    budget_s: float,
    on_progress: Callable[[float], None] | None,
    max_rounds: int = MAX_ROUNDS,
) -> _Driver:
    length = await max_model_length(base_url, api_key=api_key)
    async with Client(base_url, model, slo_form="none", api_key=api_key) as client:
        driver = _Driver(client=client, rng=np.random.default_rng(seed), max_model_len=length)
        await driver.run(budget_s, on_progress, max_rounds)
        return driver


@dataclass(slots=True)
class _Driver:
    """Sends the shapes. Prompts are random, so that no prefix cache helps."""

    client: Client
    rng: np.random.Generator
    max_model_len: int
    longest_prompt: int = 0
    seconds_of: dict[str, float] = field(default_factory=dict)
    num_sent: int = 0

    async def run(self, budget_s: float, on_progress: Callable[[float], None] | None, max_rounds: int) -> None:
        """Warm up, find out how long a prompt may be, then do rounds until the time is used up."""
        started = time.perf_counter()
        await self.prompt(32)()
        longest, took_s = await self._find_longest(budget_s / 8)
        items = self._items(longest, int(budget_s / 20 / max(took_s, 1e-3)))
        for round_number in range(max_rounds):
            for index in self.rng.permutation(len(items)).tolist():
                name, item = items[index]
                used = time.perf_counter() - started
                left = budget_s - used
                if on_progress is not None:
                    on_progress(min(1.0, used / budget_s))
                if self.seconds_of.get(name, 0.0) > left or (left <= 0 and (round_number or max_rounds == 1)):
                    continue
                before = time.perf_counter()
                await item()
                self.seconds_of[name] = time.perf_counter() - before
            if time.perf_counter() - started > budget_s:
                return

    async def _find_longest(self, limit_s: float) -> tuple[int, float]:
        """Double a prompt until it fills the context or takes `limit_s`; return its tokens and seconds.

        The last one may span several steps.
        """
        size = 64
        while True:
            before = time.perf_counter()
            await self.prompt(size)()
            took = time.perf_counter() - before
            if 2.5 * took > limit_s or 2 * size > self.max_model_len - 8:
                return size, took
            size *= 2

    def _items(self, longest: int, num_long: int) -> list[tuple[str, Item]]:
        """Return one round: (name, what to do); so many prompts of the `longest` may be part of it."""
        sizes = [16 << i for i in range(12) if 16 << i <= longest]
        sizes += [3 * size // 2 for size in sizes if 3 * size // 2 <= longest]
        cheap = [size for size in sizes if size <= max(64, longest // 4)]
        room = min(longest, self.max_model_len - DECODE_TOKENS - 8)
        items: list[tuple[str, Item]] = [(f"prompt {size}", self.prompt(size)) for size in [*sizes, *cheap]]
        items += [
            (f"decode {batch} x {context}", self.decodes(batch, context, DECODE_TOKENS))
            for batch, context in DECODE_SHAPES
            if context <= room
        ]
        # What long contexts cost is multiplied when promises are made behind them: it is measured where it can be.
        many = min(num_long, MANY)
        items += [
            (f"decode {n} x {room}", self.decodes(n, room, DECODE_TOKENS))
            for n in {1, many // 4, many}
            if 0 < n <= many
        ]
        chunks = [size for size in (16, 32, 64, 128, 256, 512) if size <= max(64, longest // 2)]
        items += [(f"mixed {batch}", self.mixed(batch, chunks)) for batch in MIXED_BATCHES]
        return items

    def prompt(self, size: int) -> Item:
        """Give one prompt alone."""
        return self.decodes(1, size, 1)

    def decodes(self, batch: int, context: int, tokens: int) -> Item:
        """Give prompts that come at once and decode together for some tokens."""

        async def send() -> None:
            await self._all([self._request(context, tokens) for _ in range(batch)])

        return send

    def mixed(self, batch: int, chunks: Sequence[int]) -> Item:
        """Give prompts, one after the other, beside a decode batch."""

        async def send() -> None:
            lasting = min(400, self.max_model_len - 64)
            results = [StreamResult(request_id=str(i), sent_s=0.0) for i in range(batch)]
            tasks = [
                asyncio.create_task(self.client.stream(self.client.body(self._request(32, lasting)), result))
                for result in results
            ]
            try:
                pairs = list(zip(results, tasks, strict=True))
                # a stream has no event for its second token
                while any(result.num_output_tokens < 2 and not task.done() for result, task in pairs):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                self._check(results, done=[task.done() for task in tasks])
                for size in chunks:
                    await self._all([self._request(size, 1)])
            finally:
                await cancel(tasks)

        return send

    def _request(self, prompt_tokens: int, output_tokens: int) -> BenchRequest:
        self.longest_prompt = max(self.longest_prompt, prompt_tokens)
        self.num_sent += 1
        return BenchRequest(
            request_id=str(self.num_sent),
            offset_s=0.0,
            prompt_token_ids=random_prompt(prompt_tokens, self.rng),
            output_tokens=output_tokens,
            hidden_max_tokens=output_tokens,
        )

    async def _all(self, requests: Sequence[BenchRequest]) -> None:
        results = await self.client.offer(requests, drain_timeout_s=600)
        self._check(results, done=[True] * len(results))

    def _check(self, results: Sequence[StreamResult], *, done: Sequence[bool]) -> None:
        failed = [r.error for r, is_done in zip(results, done, strict=True) if is_done and r.error]
        if failed:
            raise TargetError(f"{self.client.url}: a request of the profile failed: {failed[0]}")
