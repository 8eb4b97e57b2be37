"""What the way through Ray adds: TTFT and token gaps of one replica behind Ray against a bare engine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from cluster_bed import MODEL, Bed, arguments, free_port, measure
from cluster_terminal import say

from slos_serve.bench.client import BenchRequest, offer
from slos_serve.bench.profiling import warm_up
from slos_serve.serving import launch, prepare


def one_by_one(url: str, count: int, seed: int) -> dict[str, Any]:
    """Send requests one after the other; return TTFT and gaps in ms."""
    rng = np.random.default_rng(seed)
    ttft, gaps = [], []
    for i in range(count):
        ids = rng.integers(1000, 30_000, 64).tolist()
        request = BenchRequest(
            request_id=f"p{i}", offset_s=0.0, prompt_token_ids=ids, output_tokens=32, hidden_max_tokens=64
        )
        (result,) = asyncio.run(offer(url, MODEL, [request], slo_form="none"))
        assert result.error is None, result.error
        times = [at for at, _ in result.chunks]
        ttft.append(times[0] - result.sent_s)
        gaps += np.diff(times).tolist()
    return {"ttft_ms": quantiles(ttft), "gap_ms": quantiles(gaps)}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"mean": round(float(np.mean(seconds)) * 1e3, 2), "p50": round(float(p50), 2), "p99": round(float(p99), 2)}


def path(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure vLLM's own server, then one replica behind Ray."""
    share, options.replicas = options.replicas, 1
    measure(options)
    rows = []
    args = arguments(options, free_port(), 1)
    plan = prepare.prepare(args, prepare.find_engine(options.emulate), os.environ, share=share)
    child = launch.start(plan.command, plan.env, stdout_to_stderr=True)
    try:
        launch.wait_healthy(child, plan.url, probe=True)
        asyncio.run(warm_up(plan.url, MODEL, budget_s=4.0))
        rows.append({"server": "bare", **one_by_one(plan.url, options.requests, options.seed)})
        say(json.dumps(rows[-1]))
    finally:
        launch.end(child)
    with Bed(options) as bed:
        app = bed.deploy()
        app.warm(1)
        rows.append({"server": "ray", **one_by_one(app.url, options.requests, options.seed)})
        say(json.dumps(rows[-1]))
    return rows
