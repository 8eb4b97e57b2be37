"""Solve planning instances from files, so that an outside referee can judge the plans.

    python benchmarks/planner_instances.py DIR --plans OUT

Reads every `slo-plan-instance/1` file in DIR, writes a `slo-plan/1` file for each into OUT and prints one
JSON line per instance: name, admitted_value, plan_ms. The admission code is the shipped one; only the
instance's assumptions differ from a replica's state: requests decode for ever and memory is one number.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core import admission, draft
from slos_serve.core.batching import Capacity, Demand, Effort, simulate
from slos_serve.core.types import DEFAULT_WORK_LIMIT

TAIL_S = 1.0


def read_demand(instance: dict[str, Any]) -> tuple[Demand, list[int]]:
    """Return the instance's requests as a demand, and their ids in its order."""
    now = instance["now"]
    requests = sorted(instance["requests"], key=lambda r: (r["deadline"] if r["prefill_left"] else math.inf, r["id"]))
    left = np.array([r["prefill_left"] for r in requests], float)
    tpot = np.array([instance["tpots"][r["tier"]] for r in requests])
    reference = np.array([r["deadline"] for r in requests], float)
    running = np.array([r["state"] == "running" for r in requests])
    ones = np.ones(len(requests))
    demand = Demand(
        left=left,
        context=0 * ones,
        deadline=np.where(left > 0, np.maximum(reference, now), math.inf),
        due=np.where(left > 0, math.inf, reference + tpot),
        tpot=tpot,
        gap=ones * math.inf,
        verify=ones.copy(),
        gain=ones.copy(),
        output_left=ones * 1e18,
        held=np.where(running, 1.0, 0.0),
        start=np.array([float(r["mem_blocks"]) for r in requests]),
        value=np.array([float(r["value"]) for r in requests]),
        required=running.astype(np.int64),
    )
    return demand, [r["id"] for r in requests]


def read_capacity(instance: dict[str, Any]) -> Capacity:
    """Return the instance's hardware; blocks do not grow."""
    lines = np.array([[k1, 0.0, 0.0, k2, 0.0, b] for k1, k2, b in instance["hw"]["terms"]])
    return Capacity(
        lines=lines,
        margin_prefill=1.0,
        margin_decode=1.0,
        token_budget=instance["hw"].get("max_batch_tokens", 16384),
        max_seqs=instance["hw"].get("max_batch_seqs") or 1_000_000,
        block_size=10**15,
        free_blocks=float(instance["mem_free_blocks"]),
        phase_is_gain=instance.get("spec") is not None,
    )


def solve(instance: dict[str, Any], *, name: str, work_limit: int) -> tuple[dict[str, Any], float]:
    """Return the plan document and the milliseconds that choosing the promises took."""
    began = time.perf_counter()
    demand, ids = read_demand(instance)
    capacity = read_capacity(instance)
    effort = Effort(work_limit)
    spec = instance.get("spec")
    if spec:
        demand = draft.with_lengths(demand, capacity, spec["alpha"], spec["max_len"])
        # tokens come in bursts: what is owed is the rate
        demand.due = demand.due + (demand.gain - 1) * demand.tpot
    chosen, trial = admission.select(demand, capacity, instance["now"], effort, name=name, width=200)
    elapsed_ms = (time.perf_counter() - began) * 1e3
    subset = demand.take(chosen)
    return write_plan(subset, [ids[i] for i in chosen.tolist()], capacity, instance["now"], trial.kept), elapsed_ms


def write_plan(subset: Demand, ids: list[int], capacity: Capacity, now_s: float, kept: bool) -> dict[str, Any]:
    """Unroll the batches of the chosen requests until one second after the last deadline."""
    finite = subset.deadline[np.isfinite(subset.deadline)]
    until = float(finite.max(initial=now_s)) + TAIL_S
    trial = simulate(
        subset, capacity, now_s, Effort(10**12), eager=False, margin=True, log_batches=4000, until_s=until
    )
    left = subset.left.copy()
    batches = []
    begin = now_s
    for tokens, end in zip(trial.log_tokens, trial.log_end.tolist(), strict=True):
        prefill = [[ids[i], int(tokens[i])] for i in np.flatnonzero((tokens > 0) & (left > 0)).tolist()]
        decode = [[ids[i], int(tokens[i])] for i in np.flatnonzero((tokens > 0) & (left == 0)).tolist()]
        left = np.where(left > 0, left - tokens, left)
        batches.append({"prefill": prefill, "decode": decode, "start": begin})
        begin = end
    loop = [[ids[i], int(subset.verify[i])] for i in range(len(ids))]
    loop_start = None
    if loop:
        loop_start = len(batches)
        batches.append({"prefill": [], "decode": loop})
    return {
        "schema": "slo-plan/1",
        "feasible": bool(kept),
        "admitted": ids,
        "batches": batches,
        "loop_start": loop_start,
    }


def main() -> int:
    """Solve every instance of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--admission", choices=("dp", "greedy"), default="dp")
    parser.add_argument("--work-limit", type=int, default=DEFAULT_WORK_LIMIT)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        print(f"{arguments.folder}: expected slo-plan-instance/1 files", file=sys.stderr)
        return 2
    arguments.plans.mkdir(parents=True, exist_ok=True)
    solve(json.loads(files[0].read_text()), name=arguments.admission, work_limit=arguments.work_limit)  # compile
    for file in files:
        instance = json.loads(file.read_text())
        plan, elapsed_ms = solve(instance, name=arguments.admission, work_limit=arguments.work_limit)
        (arguments.plans / file.name).write_text(json.dumps(plan))
        admitted = set(plan["admitted"])
        value = sum(r["value"] for r in instance["requests"] if r["state"] == "waiting" and r["id"] in admitted)
        print(json.dumps({"name": instance["name"], "admitted_value": value, "plan_ms": round(elapsed_ms, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
