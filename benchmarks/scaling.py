"""Capacity per GPU against the number of replicas, by router, beside one replica as fast as all.

    python benchmarks/scaling.py --trace FILE@0:900 [--slo-class coding] [--replicas 1,2,4,8] [--json FILE]
    python benchmarks/scaling.py --trace FILE --rate 3 --max-requests 60 --replicas 4,16,64    # attainment at one rate
        [--arrivals bursts:4:20:0.3 --seeds 3]    # of requests drawn from the trace, with these arrivals instead

The trace is stretched until 90 % of the requests attain their SLO: the highest such rate, per GPU, found by
bisection to 3 %. A trace keeps its bursts when it is stretched, so what more replicas gain per GPU is
multiplexing; `pooled` (one replica n times as fast) shows how much of it there is to gain. `vllm` replicas
with least load show what the same hardware does without us. Use windows that are not reported elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.config import SloConfig
from slos_serve.sim.hardware import Hardware, load_hardware
from slos_serve.sim.run import RunResult
from slos_serve.sim.systems import find_system
from slos_serve.sim.workloads.workload import RequestFactory, Workload, trace_workload
from slos_serve.traces.trace import read_trace, synthetic_arrivals

SLOS = SloConfig(ttft_floor_ms=0.0, ttft_allowance_ms=0.0)
TARGET, TOLERANCE = 0.90, 0.03


def offered(args: argparse.Namespace, hardware: Hardware, rate_rps: float, num_requests: int | None) -> Workload:
    """Return the trace at a rate; lengths are learnt from what the trace held before the window."""
    longest, trace = hardware.limits().max_model_len, read_trace(args.trace)
    if args.arrivals:
        rng = np.random.default_rng([args.seed, 11])
        trace = trace.select(rng.permutation(len(trace)) < (num_requests or len(trace)))
        times = synthetic_arrivals(args.arrivals, rate_rps, len(trace), rng)
        trace = trace.with_arrivals(times, span_s=len(trace) / rate_rps)
    return trace_workload(
        trace,
        RequestFactory(SLOS, hardware.reference_s, longest),
        max_model_len=longest,
        default_class=args.slo_class,
        rate_rps=None if args.arrivals else rate_rps,
        max_requests=num_requests,
    )


def serve(
    args: argparse.Namespace, hardware: Hardware, column: tuple[str, str], n: int, rate: float, *, cuts: bool = True
) -> RunResult:
    """Run one system behind one router at `rate` requests per second and GPU; `cuts`: stop where the target is lost."""
    system_name, router = column
    system = replace(find_system(system_name), max_draft_length=0)
    workload = offered(args, hardware, rate * n, args.max_requests and args.max_requests * n)
    counts = workload.num_by_class().items() if cuts else ()
    budget = {name: int((1 - TARGET) * count) for name, count in counts}
    return system.serve(
        workload, hardware, num_replicas=n, router=router, seed=args.seed, miss_budget=budget or None,
        plan_clock=time.thread_time,
    )  # fmt: skip


def capacity(
    args: argparse.Namespace, hardware: Hardware, column: tuple[str, str], n: int, guess: float
) -> dict[str, Any]:
    """Return the highest rate per GPU that attains the target, and how the last passing run went."""
    low, high, passed = 0.0, math.inf, None
    rate = guess
    while not math.isfinite(high) or low == 0.0 or high / low > 1 + TOLERANCE:
        result = serve(args, hardware, column, n, rate)
        if result.stopped:
            high = rate
        else:
            low, passed = rate, result
        rate = low * 1.4 if not math.isfinite(high) else high / 1.4 if low == 0.0 else math.sqrt(low * high)
        if rate < 1e-3:
            return {"capacity_rps_per_gpu": 0.0}
    assert passed is not None
    entry = passed.entry(system=column[0], wall_s=0.0)
    kept = entry["kept"] / entry["promised"] if entry["promised"] else None
    return {
        "capacity_rps_per_gpu": low,
        "hops": entry["hops"],
        "kept": kept,
        "route_ms_p99": 1e3 * entry["route_s"]["p99"],
    }


def attained(args: argparse.Namespace, hardware: Hardware, column: tuple[str, str], n: int) -> dict[str, Any]:
    """Return how the runs at `--rate` went: means, and the lowest and highest attainment of the seeds."""
    entries = []
    for seed in range(args.seed, args.seed + args.seeds):
        run = argparse.Namespace(**{**vars(args), "seed": seed})
        entries.append(serve(run, hardware, column, n, args.rate, cuts=False).entry(system=column[0], wall_s=0.0))
    names = ("num_requests", "attainment", "goodput_rps", "promised", "kept", "hops")
    by_seed = [entry["attainment"] for entry in entries]
    return {
        **{name: float(np.mean([entry[name] for entry in entries])) for name in names},
        "by_seed": by_seed,
        "route_ms_p99": 1e3 * max(entry["route_s"]["p99"] for entry in entries),
    }


def main() -> int:
    """Print one line per number of replicas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--slo-class", default="coding")
    parser.add_argument("--hardware", default="a100-80g-7b-measured")
    parser.add_argument("--system", default="slos-serve-ar")
    parser.add_argument("--rival", default="vllm", help="system whose replicas get least load")
    parser.add_argument("--replicas", default="1,2,4,8,16,64")
    parser.add_argument("--routers", default="round-robin,least-load,power-of-two,sequential,slo,pooled")
    parser.add_argument("--rate", type=float, help="requests/s per GPU: attainment at this rate instead of capacity")
    parser.add_argument("--max-requests", type=int, help="of the trace, per replica")
    parser.add_argument("--arrivals", metavar="PROCESS", help="for the trace's: poisson, gamma:CV, bursts:F:S:SHARE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="runs at --rate, each with a seed of its own")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hardware = load_hardware(args.hardware)
    columns = [(args.system, router) for router in args.routers.split(",")] + [(args.rival, "least-load")]
    print(f"{'replicas':>8}" + "".join(f"{router if name == args.system else name:>14}" for name, router in columns))
    table: dict[str, Any] = {}
    guess = dict.fromkeys(columns, 1.0)
    for n in [int(text) for text in args.replicas.split(",")]:
        row = table[str(n)] = {}
        for column in columns:
            name, router = column
            if args.rate is not None:
                row[f"{name}/{router}"] = attained(args, hardware, column, n)
                continue
            if n == 1 and name == args.system and row:
                row[f"{name}/{router}"] = next(iter(row.values()))
            else:
                row[f"{name}/{router}"] = capacity(args, hardware, column, n, guess[column])
            guess[column] = row[f"{name}/{router}"]["capacity_rps_per_gpu"] or guess[column]
        shown = "capacity_rps_per_gpu" if args.rate is None else "attainment"
        cells = [f"{row[f'{name}/{router}'][shown]:14.3f}" for name, router in columns]
        print(f"{n:8}" + "".join(cells), flush=True)
        if args.rate is not None and args.seeds > 1:
            by_seed = [row[f"{name}/{router}"]["by_seed"] for name, router in columns]
            print(f"{'':8}" + "".join(f"{f'{min(one):.3f}-{max(one):.3f}':>14}" for one in by_seed), flush=True)
        if args.json:
            args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
