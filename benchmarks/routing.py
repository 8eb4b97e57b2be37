"""Time one routing decision over many replicas, beside least load in the same run.

    python benchmarks/routing.py [--replicas 64] [--decisions 2000] [--json FILE]

Replicas are drawn from a seed in the middle of things: decodes of three TPOT tiers and prompts waiting. Arrivals
follow with every 25th one a fresh snapshot of one replica, so that most decisions meet virtual load. Times
are thread CPU time; reading a snapshot from JSON is apart from the decisions. What is asserted is the result:
two runs of a policy choose the same replicas.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core.perf import PerfModel
from slos_serve.core.routing.routers import ROUTERS, Arrival, Router, make_router, snapshot_of
from slos_serve.core.routing.snapshots import ReplicaSnapshot
from slos_serve.core.types import Limits, ReplicaState, Request, RequestTable, Slo, Status, Tier

RIVAL = "least-load"
MODEL = PerfModel.from_terms(
    [
        {"per_token_s": 3.89e-5, "per_context_token_s": 3.99e-7, "fixed_s": 1.133e-2},
        {"per_token_s": 7.26e-5, "per_context_token_s": 3.99e-7, "fixed_s": 5.36e-3},
    ]
)
LIMITS = Limits(max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=8192, block_size=16, num_kv_blocks=7375)


def draw_replica(name: str, rng: np.random.Generator, now_s: float) -> ReplicaSnapshot:
    """Return the snapshot of a busy replica: up to 60 decodes and up to 6 prompts."""
    table = RequestTable()
    for i in range(int(rng.integers(0, 60))):
        prompt, produced = int(rng.integers(50, 2000)), int(rng.integers(1, 200))
        tpot = float(rng.choice([0.03, 0.05, 0.1]))
        first = now_s + float(rng.uniform(0.05, 0.5)) - produced * tpot
        request = Request(
            request_id=f"d{i}", arrival_s=first - 1, num_prompt_tokens=prompt, max_output_tokens=4096,
            slo=Slo(ttft_s=1.0, tpot_s=tpot),
        )  # fmt: skip
        index = table.add(request)
        row = table.rows[index]
        row["status"], row["tier"] = Status.RUNNING, Tier.PROMISED
        row["num_computed_tokens"], row["num_output_tokens"] = prompt + produced - 1, produced
        row["num_kv_blocks"] = -(-(prompt + produced) // 16)
        row["first_token_s"], row["last_token_s"] = first, now_s
    for i in range(int(rng.integers(0, 6))):
        slo = Slo(ttft_s=float(rng.uniform(0.3, 1.5)), tpot_s=0.05)
        prompt = int(rng.integers(100, 3000))
        table.add(
            Request(request_id=f"w{i}", arrival_s=now_s, num_prompt_tokens=prompt, max_output_tokens=4096, slo=slo)
        )
    held = int(table.rows["num_kv_blocks"].sum())
    state = ReplicaState(
        now_s=now_s, requests=table, num_free_kv_blocks=LIMITS.num_kv_blocks - held, limits=LIMITS, perf_model=MODEL
    )
    return snapshot_of(state, replica_id=name)


def run(policy: str, num_replicas: int, decisions: int) -> dict[str, Any]:
    """Make the decisions and return their times and a digest of the choices."""
    rng = np.random.default_rng(3)
    router: Router = make_router(policy, rng=np.random.default_rng(4))
    names = [f"r{i}" for i in range(num_replicas)]
    for name in names:
        router.observe(draw_replica(name, rng, 0.0))
    digest, spent, heard = hashlib.sha256(), [], []
    for i in range(decisions):
        now_s = 0.001 * i
        if i % 25 == 0:
            document = json.dumps(draw_replica(names[(i // 25) % num_replicas], rng, now_s).to_json())
            start = time.thread_time()
            router.observe(ReplicaSnapshot.from_json(document))
            heard.append(time.thread_time() - start)
        arrival = Arrival(
            request_id=f"q{i}",
            arrival_s=now_s,
            num_prompt_tokens=int(rng.integers(50, 3000)),
            ttft_deadline_s=now_s + float(rng.uniform(0.3, 1.5)),
            tpot_s=float(rng.choice([0.05, 0.1])),
        )
        start = time.thread_time()
        route = router.choose(arrival, names, now_s)
        spent.append(time.thread_time() - start)
        digest.update(f"{route.replica_id} {route.reason};".encode())
        if i >= 4 * num_replicas:
            router.ended(f"q{i - 4 * num_replicas}")
    ms = 1e3 * np.array(spent[10:])
    p50, p99 = (float(value) for value in np.percentile(ms, [50, 99]))
    return {
        "cpu_ms_p50": p50,
        "cpu_ms_p99": p99,
        "snapshot_ms_p50": 1e3 * float(np.median(heard)),
        "digest": digest.hexdigest()[:16],
    }


def main() -> int:
    """Print one line for each policy, with its ratio to least load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for policy in ROUTERS:
        rows[policy] = run(policy, args.replicas, args.decisions)
        if run(policy, args.replicas, args.decisions)["digest"] != rows[policy]["digest"]:
            sys.exit(f"{policy}: the same questions got two answers")
    print(f"{args.replicas} replicas, {args.decisions} decisions, thread CPU time")
    print(f"{'policy':16}{'p50 ms':>10}{'p99 ms':>10}{'x least load':>14}{'ms a snapshot':>16}")
    for policy, row in rows.items():
        row["ratio_p50"] = row["cpu_ms_p50"] / max(rows[RIVAL]["cpu_ms_p50"], math.ulp(1.0))
        times = f"{row['cpu_ms_p50']:10.3f}{row['cpu_ms_p99']:10.3f}{row['ratio_p50']:14.1f}"
        print(f"{policy:16}{times}{row['snapshot_ms_p50']:16.3f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
