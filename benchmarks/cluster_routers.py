"""Routers on real replicas, one after the other, at equal load with square bursts and the same seeds."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from typing import Any

import numpy as np
from cluster_bed import MODEL, Bed, capacity_rps, measure, requests_of
from cluster_terminal import say

from slos_serve.bench.client import offer
from slos_serve.bench.grade import entry, grade_run

ROUTERS = ("slo", "ray", "round-robin")
BURSTS = "bursts:4:20:0.3"  # four times the base rate during the first 6 s of every 20
SECONDS = 40.0
SETTLING_S, SETTLING_SEED = 20.0, 1_000_003  # the first load after a start, not measured: margins are learnt in it
COUNTS = ("num_requests", "met", "missed", "declined", "failed", "promised", "kept")


def routers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every seed behind every router, on one cluster after the other: two do not fit a small machine at once."""
    scaled = measure(options)
    names, seconds = list(options.only or ROUTERS), options.seconds or SECONDS
    rate = options.load * capacity_rps(scaled, options.replicas)
    rows = []
    for name in names:
        say(f"{name}: starting {options.replicas} replicas")
        with Bed(options) as bed:
            app = bed.deploy(router=name)
            app.warm(bed.num_replicas)
            asyncio.run(offer(app.url, MODEL, requests_of(scaled, rate, SETTLING_S, SETTLING_SEED, BURSTS)))
            for seed in range(options.seed, options.seed + options.runs):
                requests = requests_of(scaled, rate, seconds, seed, BURSTS)
                results = asyncio.run(offer(app.url, MODEL, requests))
                graded = entry(grade_run(requests, results), system=name, scenario="bursts", span_s=seconds)
                rows.append({"router": name, "seed": seed, "rate_rps": rate, **{key: graded[key] for key in COUNTS},
                             "attainment": graded["attainment"], "goodput_rps": graded["goodput_rps"],
                             "hops": sum(int((one.slo or {}).get("hops") or 0) for one in results),
                             "ttft_s": graded["ttft_s"]})  # fmt: skip
                say(json.dumps(rows[-1]))
    say("\n" + summary(rows))
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Return one line per router: means, and the lowest and highest of the runs."""
    by_router = defaultdict(list)
    for row in rows:
        by_router[row["router"]].append(row)
    lines = []
    for name, some in by_router.items():
        cells = []
        for key in ("attainment", "goodput_rps"):
            values = np.array([row[key] for row in some])
            cells.append(f"{key} {values.mean():.3f} ({values.min():.3f} to {values.max():.3f})")
        kept, promised, hops = (sum(row[key] for row in some) for key in ("kept", "promised", "hops"))
        lines.append(f"{name:12} {', '.join(cells)}, promises kept {kept} of {promised}, hops {hops}")
    return "\n".join(lines)
