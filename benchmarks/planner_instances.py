"""Solve planning instances from files, so that an outside referee can judge the plans.

    python benchmarks/planner_instances.py DIR --plans OUT

Reads every `slo-plan-instance/1` file in DIR, writes a `slo-plan/1` file for each into OUT and prints one
JSON line per instance: name, admitted_value, plan_ms. The admission code is the shipped one; only the
instance's assumptions differ from a replica's state: requests decode for ever and memory is one number.

`--exhaustive N` also tries every set of candidates, where there are at most N, on the same batches: `best_value`
is the most that any of them is worth. `--table` adds a Markdown table on standard error, by speculation, size,
tiers and slack: value, value by the `--reference` (a JSON object of value by name; mean over those above zero)
and CPU milliseconds.
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

from slos_serve.core.planning import admission, draft
from slos_serve.core.planning import demand as columns
from slos_serve.core.planning.demand import Demand, Machine, WorkBudget
from slos_serve.core.planning.dry_run import last_deadline, simulate
from slos_serve.core.types import DEFAULT_WORK_LIMIT

TAIL_S = 1.0
EPS_VALUE = 1e-9


def read_demand(instance: dict[str, Any]) -> tuple[Demand, list[int]]:
    """Return the instance's requests as a demand, and their ids in its order."""
    now = instance["now"]
    requests = sorted(instance["requests"], key=lambda r: (r["deadline"] if r["prefill_left"] else -math.inf, r["id"]))
    left = np.array([r["prefill_left"] for r in requests], float)
    reference = np.array([r["deadline"] for r in requests], float)
    running = np.array([r["state"] == "running" for r in requests])
    demand = np.zeros((columns.NUM_COLUMNS, len(requests)))
    demand[columns.LEFT] = left
    demand[columns.DEADLINE] = np.where(left > 0, np.maximum(reference, now), -math.inf)
    demand[columns.TPOT] = [instance["tpots"][r["tier"]] for r in requests]
    demand[columns.DUE] = np.where(left > 0, math.inf, reference + demand[columns.TPOT])
    demand[columns.GAP] = math.inf
    demand[columns.VERIFY] = demand[columns.GAIN] = demand[columns.STEPS] = 1
    demand[columns.OUTPUT_LEFT] = 1e18
    demand[columns.HELD] = running
    demand[columns.START] = [r["mem_blocks"] for r in requests]
    demand[columns.VALUE] = [r["value"] for r in requests]
    demand[columns.REQUIRED] = running
    return demand, [r["id"] for r in requests]


def read_machine(instance: dict[str, Any]) -> Machine:
    """Return the instance's hardware; blocks do not grow."""
    hardware = instance["hw"]
    return Machine(
        lines=np.array([[k1, 0.0, 0.0, k2, 0.0, b] for k1, k2, b in hardware["terms"]]),
        margin_prefill=1.0,
        margin_decode=1.0,
        token_budget=float(hardware.get("max_batch_tokens", 16384)),
        max_seqs=float(hardware.get("max_batch_seqs") or 1_000_000),
        block_size=1e30,
        free_blocks=float(instance["mem_free_blocks"]),
        max_batch_s=math.inf,
        phase_is_gain=instance.get("spec") is not None,
    )


def set_lengths(demand: Demand, machine: Machine, spec: dict[str, Any] | None) -> None:
    """Choose draft lengths per tier, if any. Here s verified tokens are s drafter steps, and the rate is owed."""
    if spec is None:
        return
    acceptance = spec["alpha"]
    tiers, group = np.unique(demand[columns.TPOT], return_inverse=True)
    counts = np.bincount(group, weights=np.where(demand[columns.REQUIRED] > 0, 1.0, 0.5), minlength=len(tiers))
    verify = draft.lengths(tiers, np.full(len(tiers), acceptance), counts, machine, spec["max_len"], step_offset=0.0)
    gain = np.array([draft.expected_tokens(acceptance, int(s)) for s in verify])
    demand[columns.VERIFY] = demand[columns.STEPS] = verify[group]
    demand[columns.GAIN] = gain[group]
    demand[columns.DUE] += (gain[group] - 1) * demand[columns.TPOT]


def solve(instance: dict[str, Any], *, name: str, work_limit: int) -> tuple[dict[str, Any], float]:
    """Return the plan document and the CPU milliseconds that choosing the promises took."""
    demand, ids = read_demand(instance)
    machine = read_machine(instance)
    began = time.thread_time()
    set_lengths(demand, machine, instance.get("spec"))
    chosen, dry_run = admission.select(machine, demand, instance["now"], WorkBudget(work_limit), name=name, width=200)
    elapsed_ms = (time.thread_time() - began) * 1e3
    plan = write_plan(demand[:, chosen], [ids[i] for i in chosen.tolist()], machine, instance["now"], kept=dry_run.kept)
    return plan, elapsed_ms


def best_value(instance: dict[str, Any]) -> float:
    """Return the value of the best set that our batches can carry out, by trying every set."""
    demand, _ = read_demand(instance)
    machine = read_machine(instance)
    set_lengths(demand, machine, instance.get("spec"))
    required = np.flatnonzero(demand[columns.REQUIRED])
    candidates = np.flatnonzero(demand[columns.REQUIRED] == 0)
    best = 0.0
    for bits in range(1 << len(candidates)):
        chosen = candidates[(bits >> np.arange(len(candidates))) & 1 > 0]
        value = float(demand[columns.VALUE, chosen].sum())
        if value > best + EPS_VALUE:
            rows = demand[:, np.sort(np.concatenate([required, chosen]))]
            dry_runs = (
                simulate(machine, rows, instance["now"], WorkBudget(10**12), run_ahead=run_ahead)
                for run_ahead in (False, True)
            )
            best = value if any(dry_run.kept for dry_run in dry_runs) else best
    return best


def write_plan(demand: Demand, ids: list[int], machine: Machine, now_s: float, *, kept: bool) -> dict[str, Any]:
    """Unroll the batches of the chosen requests until one second after the last deadline."""
    until = float(last_deadline(demand, now_s)) + TAIL_S
    dry_run = simulate(machine, demand, now_s, WorkBudget(10**12), run_ahead=False, log_batches=4000, until_s=until)
    left = demand[columns.LEFT].copy()
    batches: list[dict[str, Any]] = []
    begin = now_s
    for tokens, end in zip(dry_run.log_tokens, dry_run.log_end.tolist(), strict=True):
        prefill = [[ids[i], int(tokens[i])] for i in np.flatnonzero((tokens > 0) & (left > 0)).tolist()]
        decode = [[ids[i], int(tokens[i])] for i in np.flatnonzero((tokens > 0) & (left == 0)).tolist()]
        left = np.where(left > 0, left - tokens, left)
        batches.append({"prefill": prefill, "decode": decode, "start": begin})
        begin = end
    loop = [[request_id, int(verify)] for request_id, verify in zip(ids, demand[columns.VERIFY], strict=True)]
    batches += [{"prefill": [], "decode": loop}] if loop else []
    return {
        "schema": "slo-plan/1",
        "feasible": kept,
        "admitted": ids,
        "batches": batches,
        "loop_start": len(batches) - 1 if loop else None,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a Markdown table, one line per kind of instance."""
    print("| drafts | requests | tiers | slack | plans | value | / reference | ms p50 | ms p99 |", file=sys.stderr)
    print("|---|---|---|---|---|---|---|---|---|", file=sys.stderr)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    for kind, group in sorted(groups.items()):
        shares = [row["value"] / row["reference"] for row in group if row["reference"]]
        share = f"{np.mean(shares):.3f}" if shares else "-"
        ms = np.concatenate([row["ms"] for row in group])
        value = sum(row["value"] for row in group)
        cells = [*kind, len(group), f"{value:.1f}", share, f"{np.median(ms):.2f}", f"{np.percentile(ms, 99):.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", file=sys.stderr)


def main() -> int:
    """Solve every instance of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--admission", choices=("dp", "greedy"), default="dp")
    parser.add_argument("--work-limit", type=int, default=DEFAULT_WORK_LIMIT)
    parser.add_argument("--repeats", type=int, default=1, help="times each instance is solved; plan_ms is the median")
    parser.add_argument("--table", action="store_true", help="print a table by kind of instance to standard error")
    parser.add_argument("--reference", type=Path, help="JSON object of reference values by name, for the table")
    parser.add_argument("--exhaustive", type=int, metavar="N", help="also try every set of up to N candidates")
    arguments = parser.parse_args()
    reference = json.loads(arguments.reference.read_text()) if arguments.reference else {}
    files = sorted(arguments.folder.glob("*.json"))
    if not files:
        print(f"{arguments.folder}: expected slo-plan-instance/1 files", file=sys.stderr)
        return 2
    arguments.plans.mkdir(parents=True, exist_ok=True)
    instances = {file: json.loads(file.read_text()) for file in files}
    for instance in instances.values():  # every loop is compiled, or read from its cache, before anything is timed
        solve(instance, name=arguments.admission, work_limit=arguments.work_limit)
    rows = []
    for file, instance in instances.items():
        solved = [
            solve(instance, name=arguments.admission, work_limit=arguments.work_limit)
            for _ in range(max(1, arguments.repeats))
        ]
        plan, elapsed = solved[0][0], [elapsed_ms for _, elapsed_ms in solved]
        (arguments.plans / file.name).write_text(json.dumps(plan))
        admitted = set(plan["admitted"])
        value = sum(r["value"] for r in instance["requests"] if r["state"] == "waiting" and r["id"] in admitted)
        line = {"name": instance["name"], "admitted_value": value, "plan_ms": round(float(np.median(elapsed)), 4)}
        if sum(r["state"] == "waiting" for r in instance["requests"]) <= (arguments.exhaustive or 0):
            line["best_value"] = best_value(instance)
        print(json.dumps(line), flush=True)
        about = instance.get("params", {})
        kind = ("yes" if instance.get("spec") else "no", *(about.get(key, "-") for key in ("n", "tiers", "slack")))
        rows.append({"kind": kind, "value": value, "reference": reference.get(instance["name"]), "ms": elapsed})
    if arguments.table:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
