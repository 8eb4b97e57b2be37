"""Routers on real replicas, in turn, at equal load with square bursts and the same seeds."""

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
SETTLING_SEED = 1_000_003
COUNTS = ("num_requests", "met", "missed", "declined", "failed", "promised", "kept")


def routers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every seed behind every router in turn, on the same replicas."""
    scaled = measure(options)
    names, seconds = list(options.only or ROUTERS), options.seconds or SECONDS
    rate = options.load * capacity_rps(scaled, options.replicas)
    switch = options.out / "router"
    switch.write_text(names[0])
    rows = []
    with Bed(options) as bed:
        say(f"starting {options.replicas} replicas")
        app = bed.deploy(switch=switch)
        app.warm(bed.num_replicas)
        for run in range(options.runs + 1):  # the first is not measured: margins settle in it
            seed = options.seed + run - 1 if run else SETTLING_SEED
            requests = requests_of(scaled, rate, seconds, seed, BURSTS)
            for name in names[run % len(names) :] + names[: run % len(names)] if run else names[:1]:
                switch.write_text(name)
                results = asyncio.run(offer(app.url, MODEL, requests))
                graded = entry(grade_run(requests, results), system=name, scenario="bursts", span_s=seconds)
                row = {"router": name, "seed": seed, "rate_rps": rate, **{key: graded[key] for key in COUNTS},
                       "attainment": graded["attainment"], "goodput_rps": graded["goodput_rps"],
                       "hops": sum(int((one.slo or {}).get("hops") or 0) for one in results),
                       "ttft_s": graded["ttft_s"]}  # fmt: skip
                say(json.dumps(row))
                if run:
                    rows.append(row)
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
