"""Time the simulator: how much faster than the clock an hour of traffic over four replicas runs on one core.

    python benchmarks/simulator.py [--minutes 60] [--policies trivial,vllm,slos-serve-ar] [--json] [--update]

The kernel (events, engine, streams, grading) and the planner are timed apart in the same run, in simulated
seconds per second of this thread's CPU time: `kernel` leaves out the time inside `plan` and routing, `whole`
counts all of it. `trivial` runs everybody at
once and decides nothing, so its kernel figure is the kernel's own. Same requests for every policy.

What is asserted is the result, never the time: steps, events and outcomes are those in
`simulator_digests.json` (`--update` writes it after a change that is meant).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.config import SloConfig
from slos_serve.core.types import BatchPlan, Plan, ReplicaState, Status
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.systems import System, find_system, system_of
from slos_serve.sim.workloads.workload import RequestFactory, Workload, trace_workload
from slos_serve.traces.trace import Trace, synthetic_arrivals

DIGESTS = Path(__file__).with_name("simulator_digests.json")
HARDWARE = load_hardware("a100-80g-7b-measured")
REPLICAS, RATE_RPS, CONTEXT = 4, 8.0, 4096
AIMS = {"kernel": 1500.0, "whole": 50.0}


class Trivial:
    """Run every request that has a seat and memory, whole prompts, first come first served; decide nothing."""

    ignores_times = True

    def plan(self, state: ReplicaState) -> Plan:
        """Return a batch of everybody who fits."""
        table, limits = state.requests, state.limits
        rows = table.rows
        needed = rows["num_prompt_tokens"] + rows["num_output_tokens"] - rows["num_computed_tokens"]
        chosen = np.flatnonzero(rows["status"] == Status.RUNNING)
        waiting = np.flatnonzero(rows["status"] == Status.WAITING)
        if len(waiting):
            waiting = waiting[np.argsort(rows["seq"][waiting])]
            blocks = np.cumsum(-(-needed[waiting] // limits.block_size) + 1)
            tokens = np.cumsum(needed[waiting]) + needed[chosen].sum()
            seats = len(chosen) + 1 + np.arange(len(waiting))
            room = (blocks <= state.num_free_kv_blocks) & (tokens <= limits.max_num_batched_tokens)
            chosen = np.concatenate([chosen, waiting[room & (seats <= limits.max_num_seqs)]])
        batch = BatchPlan(
            request_ids=tuple(table.request_ids[i] for i in chosen.tolist()),
            num_tokens=needed[chosen],
            draft_lengths=np.zeros(len(chosen), np.int64),
        )
        waits = len(chosen) < len(rows)
        return Plan(batch=batch, verdicts=(), repeats=not waits and bool((needed == 1).all()))


def hour(minutes: float) -> Workload:
    """Return the traffic: chat and coding lengths, gaps with a coefficient of variation of 2."""
    rng = np.random.default_rng(3600)
    count = round(RATE_RPS * 60 * minutes)
    coding = rng.random(count) < 0.4
    prompt = np.where(coding, rng.lognormal(7.2, 0.8, count), rng.lognormal(6.5, 1.0, count))
    output = np.where(coding, rng.lognormal(2.8, 0.9, count), rng.lognormal(4.8, 0.8, count))
    trace = Trace.build(
        arrived_at_s=synthetic_arrivals("gamma:2", RATE_RPS, count, rng),
        prompt_tokens=np.clip(prompt, 10, 3000).astype(np.int64),
        output_tokens=np.clip(output, 2, 1000).astype(np.int64),
        slo_class=np.where(coding, "coding", "chat"),
        source="hour",
    )
    factory = RequestFactory(SloConfig(), HARDWARE.reference_s, CONTEXT)
    return trace_workload(trace, factory, max_model_len=CONTEXT, default_class="chat")


def system_named(policy: str) -> System:
    return (
        replace(system_of(Trivial, name=policy), router="round-robin") if policy == "trivial" else find_system(policy)
    )


def measure(policy: str, workload: Workload) -> dict[str, Any]:
    """Run a policy once and return its speed and its result."""
    system = system_named(policy)
    start, cpu = time.perf_counter(), time.thread_time()
    result = system.serve(
        workload,
        HARDWARE,
        num_replicas=REPLICAS,
        engine=ReplicaOptions(acceptance={"": 0.7}),
        plan_clock=time.thread_time,
    )
    wall_s, cpu_s = time.perf_counter() - start, time.thread_time() - cpu
    replicas = result.cluster.replicas
    steps = sum(replica.num_steps for replica in replicas)
    plan_s = sum(sum(replica.plan_s) for replica in replicas) + sum(result.cluster.route_s)
    outcomes = Counter(grade.outcome for grade in result.graded)
    return {
        "policy": policy,
        "minutes": workload.duration_s / 60,
        "requests": workload.num_requests,
        "steps": steps,
        "whole": result.simulated_s / cpu_s,
        "kernel": result.simulated_s / (cpu_s - plan_s),
        "kernel_us_per_step": 1e6 * (cpu_s - plan_s) / steps,
        "plan_us_per_step": 1e6 * plan_s / steps,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "result": {
            "steps": steps,
            "simulated_s": round(result.simulated_s, 6),
            "outcomes": dict(sorted(outcomes.items())),
        },
    }


def as_text(entry: dict[str, Any]) -> str:
    return (
        f"{entry['policy']:16}{entry['minutes']:5.0f} min {entry['requests']:7} requests {entry['steps']:8} steps   "
        f"kernel {entry['kernel']:7.0f} x ({entry['kernel_us_per_step']:5.0f} us a step), "
        f"with the planner {entry['whole']:7.0f} x ({entry['plan_us_per_step']:5.0f} us a plan)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--policies", default="trivial,vllm,slos-serve-ar")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--update", action="store_true", help="accept the results of this run")
    args = parser.parse_args()
    workload = hour(args.minutes)
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    measure(args.policies.split(",")[-1], hour(0.2))  # compiled code is loaded before the clock starts
    changed = []
    for policy in args.policies.split(","):
        entry = measure(policy, workload)
        print(json.dumps(entry) if args.json else as_text(entry), flush=True)
        key = f"{policy} {args.minutes:g}"
        if known.get(key, entry["result"]) != entry["result"]:
            changed.append(f"{key}: {entry['result']} was {known[key]}")
        if args.update:
            known[key] = entry["result"]
    if not args.json:
        print(f"aims: kernel {AIMS['kernel']:.0f} x, with the planner {AIMS['whole']:.0f} x")
    if args.update:
        DIGESTS.write_text(json.dumps(known, indent=1) + "\n")
    elif changed:
        print("\n".join(["results have changed:", *changed]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
