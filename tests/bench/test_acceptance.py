"""Bursts of an acceptance run: the same work for both servers, none of it twice for one, and no failure unsaid."""

import asyncio

import pytest

from slos_serve.bench.acceptance import Size, burst_of
from slos_serve.bench.client import TargetError

SIZE = Size(num_texts=1, num_requests=3, output_tokens=4, load_s=0.0, num_blocks=1)


def test_bursts_of_a_seed_are_the_same_others_are_not_and_ask_for_no_promise(engine, serve):
    async def ask():
        async with serve(engine) as url:
            burst = await asyncio.to_thread(burst_of, url, SIZE, seed=7)
            return [await asyncio.to_thread(burst, number) for number in (1, 2, 1)]

    assert min(asyncio.run(ask())) > 0
    prompts = [sorted(body["prompt"] for body in engine.bodies[i : i + 3]) for i in (0, 3, 6)]
    assert prompts[0] == prompts[2] != prompts[1]
    assert not any("slo" in body for body in engine.bodies)


def test_a_burst_with_a_request_that_failed_says_so(engine, serve):
    engine.status = 500

    async def ask():
        async with serve(engine) as url:
            burst = await asyncio.to_thread(burst_of, url, SIZE, seed=7)
            await asyncio.to_thread(burst, 1)

    with pytest.raises(TargetError, match="a request failed"):
        asyncio.run(ask())
