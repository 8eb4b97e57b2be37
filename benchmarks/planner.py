"""Time one plan: milliseconds against the number of requests, TPOT tiers and slack, and beside rivals.

    python benchmarks/planner.py [--quick] [--json FILE] [--update]

Every state is drawn from a seed, planned many times by each planner in the same process, and timed in wall
and thread CPU time. `dp` is the shipped planner, `greedy` the same batches with admission by value density,
`vllm` the stock order, which decides nothing: what a plan costs is the distance to it. Then the steady
state of a busy replica, where nearly all plans are made: hundreds of decodes, no arrival or one.

What is asserted is the result, never the time: repeated plans are equal, and the digest of all plans
equals the one in `planner_digests.json` (`--update` writes it after a change that is meant).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.perf import PerfModel
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Limits, Plan, Planner, ReplicaState, Request, RequestTable, Slo, Status, Tier

DIGESTS = Path(__file__).with_name("planner_digests.json")
PLANNERS: dict[str, Planner] = {
    "dp": SloPlanner(),
    "greedy": SloPlanner(admission_name="greedy"),
    "vllm": VllmPlanner(token_budget=8192),
}
SIZES = (8, 16, 32, 64, 128, 256, 512)
TPOTS = {1: (0.05,), 2: (0.05, 0.1), 3: (0.03, 0.05, 0.1)}
MIX = {1: (1.0,), 2: (0.5, 0.5), 3: (0.1, 0.45, 0.45)}
# published times of a 7B model on one GPU; the second line knows drafter steps
MODEL = PerfModel.from_terms(
    [
        {"per_token_s": 6.878e-5, "fixed_s": 2.480e-2},
        {"per_token_s": 7.523e-5, "per_draft_step_s": 3.46e-3, "fixed_s": 3.03e-3},
    ]
)
# one that keeps a thousand decodes within 30 ms
FAST = PerfModel.from_terms(
    [
        {"per_token_s": 1e-5, "per_context_token_s": 1.5e-8, "fixed_s": 8e-3},
        {"per_token_s": 2e-5, "per_context_token_s": 1.5e-8, "fixed_s": 2e-3},
    ]
)
OUTPUT_TOKENS = 256


def add_request(table: RequestTable, name: str, prompt: int, slo: Slo, weight: float = 1.0) -> int:
    """Add a candidate that has just arrived."""
    request = Request(
        request_id=name,
        arrival_s=0.0,
        num_prompt_tokens=prompt,
        max_output_tokens=4096,
        slo=slo,
        slo_class="chat",
        weight=weight,
    )
    return table.add(request, predicted_output_tokens=OUTPUT_TOKENS)


def start_decoding(table: RequestTable, index: int, produced: int, next_due_s: float) -> None:
    """Turn a candidate into a promised decode whose next token is due at `next_due_s`."""
    row = table.rows[index]
    prompt, pace = int(row["num_prompt_tokens"]), float(row["tpot_s"])
    first = next_due_s - produced * pace
    row["status"], row["tier"] = Status.RUNNING, Tier.PROMISED
    row["num_computed_tokens"] = prompt + produced - 1
    row["num_output_tokens"] = produced
    row["num_kv_blocks"] = -(-(prompt + produced - 1) // 16)
    row["arrival_s"], row["ttft_deadline_s"] = first - 1.0, first
    row["first_token_s"], row["last_token_s"] = first, -0.001


def replica(table: RequestTable, model: PerfModel, *, drafts: int = 0) -> ReplicaState:
    """Return the table's state on a replica with memory to spare."""
    limits = Limits(
        max_num_batched_tokens=8192,
        max_num_seqs=2048,
        max_model_len=16384,
        block_size=16,
        num_kv_blocks=400_000,
        max_draft_length=drafts,
    )
    return ReplicaState(
        now_s=0.0,
        requests=table,
        num_free_kv_blocks=400_000 - int(table.rows["num_kv_blocks"].sum()),
        limits=limits,
        perf_model=model,
        acceptance={"chat": 0.7},
        draft_lengths={"chat": min(2, drafts)},
    )


def draw_state(seed: int, count: int, tiers: int, slack: str, *, drafts: int) -> ReplicaState:
    """Draw `count` requests: up to half of them decode, on at most 60 % of the budget; the rest have just arrived."""
    rng = np.random.default_rng(seed)
    table = RequestTable(["chat"])
    period, load = min(TPOTS[tiers]), 0.0
    room = (period - MODEL.seconds(0)) / 6.878e-5
    for i in range(count):
        tpot = float(rng.choice(TPOTS[tiers], p=MIX[tiers]))
        prompt = int(np.clip(rng.lognormal(math.log(1000) - 0.32, 0.8), 16, 8192))
        alone = MODEL.seconds(prompt)
        tight = float(rng.choice([3.0, 5.0])) * alone
        ttft = max(1.05 * alone, tight - float(rng.uniform(0, 0.05))) if slack == "tight" else float(rng.uniform(1, 6))
        weight = float(rng.choice([1.0, 1.0, 2.0]))
        index = add_request(table, f"r{i}", prompt, Slo(ttft_s=ttft, tpot_s=tpot), weight)
        if i < count // 2 and load + period / tpot <= 0.6 * room:
            load += period / tpot
            start_decoding(table, index, int(rng.integers(1, 200)), float(rng.uniform(0.0, 2 * tpot)) + 0.03)
    return replica(table, MODEL, drafts=drafts)


def draw_steady(seed: int, running: int, arrivals: int) -> ReplicaState:
    """Draw a busy replica: decodes within a second of their schedule, and what has just arrived."""
    rng = np.random.default_rng(seed)
    table = RequestTable(["chat"])
    for i in range(running):
        slo = Slo(ttft_s=1.0, tpot_s=float(rng.choice([0.05, 0.1])))
        index = add_request(table, f"r{i}", int(rng.integers(50, 800)), slo)
        start_decoding(table, index, int(rng.integers(1, 250)), float(rng.uniform(0.06, 1.0)))
    for i in range(arrivals):
        add_request(table, f"new{i}", 500, Slo(ttft_s=1.0, tpot_s=0.1))
    return replica(table, FAST)


def describe(plan: Plan) -> str:
    """Return what a plan decides, as text."""
    entries = [(entry.request_id, entry.num_tokens, entry.draft_length) for entry in plan.batch.entries]
    verdicts = sorted((verdict.request_id, verdict.promised, verdict.reason) for verdict in plan.verdicts)
    return json.dumps([entries, list(plan.batch.preempted), verdicts, list(plan.at_risk)])


@dataclass(slots=True)
class Cell:
    """Times (ms) and results of one planner on the states of one row."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    work: list[int] = field(default_factory=list)
    weight: float = 0.0
    digest: Any = field(default_factory=hashlib.sha256)

    def measure(self, planner: Planner, state: ReplicaState, repeats: int) -> None:
        """Plan the state a few times; the plans must be equal. The first call, which may compile, is not timed."""
        expected = describe(planner.plan(state))
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.thread_time()
            plan = planner.plan(state)
            self.wall_ms.append((time.perf_counter() - wall) * 1e3)
            self.cpu_ms.append((time.thread_time() - cpu) * 1e3)
            if describe(plan) != expected:
                raise SystemExit("the same state gave two plans")
        self.work.append(plan.work)
        weights = dict(zip(state.requests.request_ids, state.requests.rows["weight"].tolist(), strict=True))
        self.weight += sum(weights[verdict.request_id] for verdict in plan.verdicts if verdict.promised)
        self.digest.update(expected.encode())

    def row(self) -> dict[str, Any]:
        """Return the figures of the cell."""
        return {
            "wall_ms_p50": float(np.median(self.wall_ms)),
            "wall_ms_p99": float(np.percentile(self.wall_ms, 99)),
            "cpu_ms_p50": float(np.median(self.cpu_ms)),
            "cpu_ms_p99": float(np.percentile(self.cpu_ms, 99)),
            "work_p50": float(np.median(self.work)),
            "work_max": max(self.work),
            "promised_weight": self.weight,
            "num_plans": len(self.wall_ms),
            "digest": self.digest.hexdigest()[:16],
        }


def run_row(name: str, states: list[ReplicaState], repeats: int) -> dict[str, Any]:
    """Measure every planner on the same states, taking turns."""
    cells = {planner: Cell() for planner in PLANNERS}
    for state in states:
        for planner, cell in cells.items():
            cell.measure(PLANNERS[planner], state, repeats)
    return {
        "name": name,
        "num_states": len(states),
        "planners": {planner: cell.row() for planner, cell in cells.items()},
    }


def print_row(row: dict[str, Any]) -> None:
    dp, greedy, vllm = (row["planners"][name] for name in ("dp", "greedy", "vllm"))
    gain = dp["promised_weight"] / greedy["promised_weight"] if greedy["promised_weight"] else 1.0
    figures = " ".join(f"{dp[key]:7.2f}" for key in ("wall_ms_p50", "wall_ms_p99", "cpu_ms_p50", "cpu_ms_p99"))
    print(
        f"{row['name']:34} {figures} {dp['work_p50']:9.0f} | {greedy['cpu_ms_p50']:7.2f} {vllm['cpu_ms_p50']:6.2f}"
        f" | x{dp['cpu_ms_p50'] / greedy['cpu_ms_p50']:<5.2f} x{gain:<5.3f}",
        flush=True,
    )


def all_rows(*, quick: bool) -> list[dict[str, Any]]:
    seeds, repeats = (2, 3) if quick else (8, 8)
    rows = []
    print(f"{'':34} {'dp: wall ms':>15} {'cpu ms':>15} {'work':>9} | {'greedy':>7} {'vllm':>6} | dp / greedy")
    print(f"{'':34} {'p50':>7} {'p99':>7} {'p50':>7} {'p99':>7} {'p50':>9} | {'cpu':>7} {'cpu':>6} | time   weight")
    for drafts in (0, 4):
        for count in SIZES:
            for tiers in TPOTS:
                for slack in ("tight", "loose"):
                    name = f"{'drafts ' if drafts else ''}{count} requests, {tiers} tiers, {slack}"
                    states = [
                        draw_state(1000 * count + 10 * tiers + seed, count, tiers, slack, drafts=drafts)
                        for seed in range(seeds)
                    ]
                    rows.append(run_row(name, states, repeats))
                    print_row(rows[-1])
    for running in (256, 1024):
        for arrivals in (0, 1):
            states = [draw_steady(seed, running, arrivals) for seed in range(seeds)]
            rows.append(run_row(f"steady, {running} decodes, {arrivals} arrivals", states, 5 * repeats))
            print_row(rows[-1])
    return rows


def check_digest(rows: list[dict[str, Any]], mode: str, *, update: bool) -> bool:
    """Tell whether all plans are those written down; `update` writes them down."""
    together = hashlib.sha256()
    for row in rows:
        for planner in sorted(row["planners"]):
            together.update(row["planners"][planner]["digest"].encode())
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    if update:
        known[mode] = together.hexdigest()[:16]
        DIGESTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    found, expected = together.hexdigest()[:16], known.get(mode)
    print(f"digest of all plans: {found} ({'as expected' if found == expected else f'expected {expected}'})")
    return found == expected


def main() -> int:
    """Run the benchmark; the exit status says whether the plans are the expected ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer states and repeats")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--update", action="store_true", help="write the digest down as the expected one")
    arguments = parser.parse_args()
    load = os.getloadavg()
    rows = all_rows(quick=arguments.quick)
    print(f"load average before: {load[0]:.1f}, after: {os.getloadavg()[0]:.1f}, on {os.cpu_count()} CPUs")
    if arguments.json:
        document = {"schema": "slos-serve-planner-benchmark/1", "load_average": load, "num_cpus": os.cpu_count()}
        arguments.json.write_text(json.dumps(document | {"rows": rows}, indent=1))
    same = check_digest(rows, "quick" if arguments.quick else "full", update=arguments.update)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
