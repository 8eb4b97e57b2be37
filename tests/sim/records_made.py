"""A record as a server would have written it, made on the virtual clock."""

import json
from dataclasses import asdict

import numpy as np
from tests.sim.worlds import MODEL, hardware, sim, workload

from slos_serve.config import SloConfig
from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import PlannerTraits
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import run_workload

HARDWARE = hardware(max_num_batched_tokens=512, max_num_seqs=32)
CONFIG = {"classes": {"chat": {"ttft_ms": 1000, "tpot_ms": 50}, "slow": {"ttft_ms": 4000, "tpot_ms": 200}}}


class Watched:
    """A planner that keeps what it was asked and what it said."""

    def __init__(self, planner):
        self.planner = planner
        self.makes_promises = PlannerTraits.of(planner).makes_promises
        self.lines = []
        self.added_s = {}

    def plan(self, state):
        before = state.to_json()
        self.added_s = {**dict.fromkeys(state.requests.request_ids, state.now_s), **self.added_s}
        plan = self.planner.plan(state)
        scheduled = {e.request_id: e.num_tokens + e.draft_length for e in plan.batch.entries}
        self.lines.append({"kind": "plan", "t": state.now_s, "state": before, "plan": plan.to_json()})
        self.lines[-1]["scheduled"] = scheduled
        return plan


def load(count=80, rate=4.0, seed=0, transit_s=0.0):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    prompts, outputs = rng.integers(10, 300, count).tolist(), rng.integers(2, 40, count).tolist()
    kinds = [("chat", 1.0, 0.05), ("slow", 4.0, 0.2)]
    return workload(
        *[
            sim(
                f"r{i}",
                prompts[i],
                outputs[i],
                at_s=1e6 + float(times[i]),
                slo_class=kinds[i % 2][0],
                ttft_s=kinds[i % 2][1],
                tpot_s=kinds[i % 2][2],
                transit_s=transit_s,
            )
            for i in range(count)
        ],
        duration_s=float(times[-1]),
    )


def write_record(path, *, plans=False, steered=False, rate=4.0, noise_sigma=0.0, transit_s=0.0, **engine):
    """Serve a load with vLLM's order (or ours, where plans or steering are asked for) and write it down."""
    ours = plans or steered
    planner = Watched(SloPlanner() if ours else VllmPlanner(token_budget=512))
    steps = []
    served = load(rate=rate, transit_s=transit_s)
    options = ReplicaOptions(noise_sigma=noise_sigma)
    result = run_workload(served, planner, HARDWARE, options=options, on_step=steps.append)
    for step in steps:
        step["t"] += step["seconds"]  # a server writes when they end
    by_key = {(one.arrival_s, one.num_prompt_tokens): one for one in result.graded}
    lines = [
        {
            "kind": "engine",
            "schema": "slos-serve-record/1",
            "t": 0.0,
            "vllm": "0",
            "mode": "observe",
            "limits": asdict(HARDWARE.limits()),
            "policy": "fcfs",
            "is_async": False,
            "planner": "slos_serve.core.planner.SloPlanner",
            "planner_options": {},
            "config": SloConfig().to_json(),
            **engine,
        },
        {"kind": "model", "perf_model": MODEL.to_json(), "max_num_batched_tokens": 512},
    ]
    for arrival in served.arrivals:
        request, end = arrival.request, by_key[arrival.request.arrival_s, arrival.request.num_prompt_tokens]
        lines.append(
            {
                "kind": "request",
                "request_id": request.request_id,
                "slo_id": None,
                "t": end.finish_s,
                "arrival_s": request.arrival_s,
                "added_s": planner.added_s[request.request_id],
                "first_token_s": request.arrival_s + end.ttft_s,
                "said": {"slo_class": request.slo_class},
                "slo_class": request.slo_class,
                "weight": 1.0,
                "slo": {name: value for name, value in request.slo.items() if value is not None},
                "thinks": False,
                "num_thinking_tokens": 0,
                "num_cached_tokens": 0,
                "reason": "",
                "max_output_tokens": 1000,
                "num_prompt_tokens": request.num_prompt_tokens,
                "num_output_tokens": arrival.num_output_tokens,
                "outcome": end.outcome,
                "enforced": ours,
                "verdict": "promised" if end.promised else "",
                "promised": end.promised,
                "stages": {},
                "ttft_ms": end.ttft_s * 1e3,
                "tpot_ms": (end.tpot_s or 0) * 1e3,
            }
        )
    if plans or steered:
        lines += [{**line, "steered": steered} for line in planner.lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *steps]))
    return path
