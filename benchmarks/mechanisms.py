"""What each mechanism of the planner is worth, and what wrong predictions cost, on the simulator.

    python benchmarks/mechanisms.py [--study mechanisms|overruns|model] [--seeds N] [--first-seed N] [--rates R,R]
        [--best-effort SHARE] [--overruns SHARE] [--json FILE]

Every seed draws one mixed workload (chat, coding, summarization; log-normal lengths, gamma arrivals), and
everything under comparison serves the same ones, so differences are paired. Steps take 10 % longer than the
planner thinks at first, unless the study varies that; it learns from them as it does in service. A share of
the requests may have no SLO, and a share of the outputs may be twice as long as the planner was told.

- `mechanisms`: the planner with one mechanism taken out; the change of attainment in percentage points.
- `overruns`: a share of outputs is twice as long as the quantile that the planner was told.
- `model`: true step times over those of the performance model, with and without learning from steps.

Intervals are 95 % (Student's t over seeds). Promises kept is met / promised.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.config import load_slo_config
from slos_serve.core import planner
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import BatchPlan, Plan, ReplicaState
from slos_serve.sim.hardware import Hardware, load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.systems import system_with
from slos_serve.sim.workloads.workload import RequestFactory, Workload, trace_workload
from slos_serve.traces.trace import Trace, synthetic_arrivals

MAX_CONTEXT = 4096
MODEL_ERROR = 1.1
ACCEPTANCE = 0.7
# share, median and spread (sigma of the logarithm) of prompt and output tokens
CLASSES = {
    "chat": (0.45, 400, 0.9, 180, 0.7),
    "coding": (0.35, 900, 0.8, 40, 0.9),
    "summarization": (0.2, 1800, 0.4, 220, 0.4),
}
STUDENT_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def draw(rng: np.random.Generator, count: int, rate_rps: float, best_effort: float = 0.0) -> Trace:
    """Draw arrivals, lengths and classes. `best_effort`: share of requests without an SLO."""
    names = rng.choice(list(CLASSES), count, p=[shape[0] for shape in CLASSES.values()])
    rows = [CLASSES[name][1:] for name in names]
    prompts, outputs = (
        np.exp(rng.normal(np.log([row[k] for row in rows]), [row[k + 1] for row in rows])) for k in (0, 2)
    )
    return Trace.build(
        arrived_at_s=synthetic_arrivals("gamma:1.5", rate_rps, count, rng),
        prompt_tokens=np.clip(prompts, 8, MAX_CONTEXT * 3 // 4),
        output_tokens=np.clip(outputs, 2, MAX_CONTEXT // 5),
        slo_class=np.where(rng.random(count) < best_effort, "best-effort", names),
        source="mixed",
    )


def make_workload(
    hardware: Hardware, seed: int, rate_rps: float, count: int, *, overruns: float = 0.0, best_effort: float = 0.0
) -> Workload:
    """Return a seed's workload: the same requests at every rate. `overruns`: share of outputs twice as long as told."""
    rng = np.random.default_rng([2504, seed])
    past = draw(rng, 500, 1.0, best_effort)
    history = list(zip(past.slo_class.tolist(), past.prompt_tokens.tolist(), past.output_tokens.tolist(), strict=True))
    factory = RequestFactory(load_slo_config(None), hardware.reference_s, MAX_CONTEXT)
    trace = draw(rng, count, 1.0, best_effort)
    workload = trace_workload(
        trace, factory, max_model_len=MAX_CONTEXT, default_class="chat", rate_rps=rate_rps, history=history
    )
    told, late = workload.length_model(), rng.random(count) < overruns
    arrivals = []
    for sim, is_late in zip(workload.arrivals, late.tolist(), strict=True):
        request = sim.request
        quantile = told.predict(request.slo_class, request.num_prompt_tokens, request.max_output_tokens, quantile=0.9)
        longest = min(2 * math.ceil(quantile), request.max_output_tokens)
        arrivals.append(replace(sim, num_output_tokens=longest) if is_late else sim)
    return replace(workload, arrivals=arrivals)


class Variant(SloPlanner):
    """The shipped planner with some of its steps replaced."""

    def __init__(self, steps: type[planner._Planning], **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def plan(self, state: ReplicaState) -> Plan:
        """Plan with the replaced steps."""
        return self.steps(self, state).run()


class NeverAhead(planner._Planning):
    """Decodes join only when they must."""

    def batch(self, *args: Any, **options: Any) -> BatchPlan:
        """Return the batch for this order of joining."""
        return super().batch(*args, **(options | {"eager": False}))


class AlwaysAhead(planner._Planning):
    """Decodes join every batch before prefills do, whatever was checked."""

    def batch(self, *args: Any, **options: Any) -> BatchPlan:
        """Return the batch for this order of joining."""
        return super().batch(*args, **(options | {"eager": True}))


class NoRecovery(planner._Planning):
    """Promises that cannot all be kept are served side by side."""

    def recover(self, *_: Any) -> None:
        """Keep everyone."""


class NoFill(planner._Planning):
    """Room that promised work leaves in a batch stays empty."""

    def fill(self, parts: Any, index: Any, counts: Any, *more: Any) -> Any:
        """Add nobody to a batch that holds anything."""
        return (index, counts) if index.size else super().fill(parts, index, counts, *more)


class LongFill(planner._Planning):
    """Room is filled as far as deadlines allow, declined promises or not."""

    def fill(self, parts: Any, *more: Any) -> Any:
        """Give everyone the time of those that come first."""
        return super().fill([(rows, parts[0][1]) for rows, _ in parts], *more)


class CarelessFill(planner._Planning):
    """Room is filled up to the next deadline, whatever comes after it."""

    def goes_on(self, *_: Any, **__: Any) -> bool:
        """Do not look."""
        return True


SHIPPED = "as shipped"
VARIANTS: dict[str, Callable[[], SloPlanner]] = {
    SHIPPED: SloPlanner,
    "admission by value density": lambda: SloPlanner(admission_name="greedy"),
    "every promise at once": lambda: SloPlanner(reserve=1.0),
    "no brief batches": lambda: SloPlanner(brief_fixed_multiple=8.0),
    "decodes never run ahead": lambda: Variant(NeverAhead),
    "decodes always run ahead": lambda: Variant(AlwaysAhead),
    "leftovers stay empty": lambda: Variant(NoFill),
    "leftovers filled to the deadlines": lambda: Variant(LongFill),
    "leftovers filled unchecked": lambda: Variant(CarelessFill),
    "no recovery": lambda: Variant(NoRecovery),
    "drafts allowed": SloPlanner,
}


def serve(
    hardware: Hardware,
    workload: Workload,
    planner_: SloPlanner,
    seed: int,
    *,
    error: float = MODEL_ERROR,
    drafts: int = 0,
    learns: bool = True,
) -> dict[str, Any]:
    """Return the summary of one run."""
    result = system_with(planner_, max_draft_length=drafts).serve(
        workload,
        hardware.slower(error),
        plan_model=hardware.perf_model,
        seed=seed,
        engine=ReplicaOptions(acceptance={"": ACCEPTANCE}, learns_times=learns),
        max_model_len=MAX_CONTEXT,
    )
    return result.entry(system="slos-serve", wall_s=0.0)


def spread(values: Sequence[float]) -> str:
    """Return mean and half width of the 95 % interval, in percentage points."""
    array = 100 * np.array(values)
    half = STUDENT_95.get(len(array) - 1, 1.96) * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return f"{array.mean():+7.2f} +- {half:5.2f}"


def kept_share(entries: Sequence[dict[str, Any]]) -> str:
    """Return promises kept of all runs together."""
    kept, promised = (sum(entry[key] for entry in entries) for key in ("kept", "promised"))
    return f"{kept}/{promised} = {kept / max(1, promised):.4f}"


Make = Callable[..., Workload]  # of a hardware, a seed, a rate, a count and perhaps a share of over-runs


def study_mechanisms(
    hardware: Hardware, seeds: Sequence[int], rates: Sequence[float], count: int, make: Make
) -> list[Any]:
    rows = []
    print(f"{'':28} {'rate/s':>6} {'attainment':>10} {'against shipped, points':>26}   promises kept; free TTFT p50")
    for rate in rates:
        workloads = [make(hardware, seed, rate, count) for seed in seeds]
        base: list[dict[str, Any]] = []
        for name, build in VARIANTS.items():
            drafts = 6 if name == "drafts allowed" else 0
            entries = [
                serve(hardware, workload, build(), seed, drafts=drafts)
                for seed, workload in zip(seeds, workloads, strict=True)
            ]
            base = base or entries
            change = [mine["attainment"] - shipped["attainment"] for mine, shipped in zip(entries, base, strict=True)]
            mean = np.mean([entry["attainment"] for entry in entries])
            free = [e["by_class"]["best-effort"]["ttft_s"]["p50"] for e in entries if "best-effort" in e["by_class"]]
            text = f"{kept_share(entries)}; {np.mean(free):.2f} s" if free else kept_share(entries)
            print(f"{name:28} {rate:6.2f} {mean:10.3f} {spread(change):>26}   {text}", flush=True)
            rows.append({"name": name, "rate_rps": rate, "attainment": mean, "change": change})
    return rows


def study_overruns(
    hardware: Hardware, seeds: Sequence[int], rates: Sequence[float], count: int, make: Make
) -> list[Any]:
    rows = []
    print(f"{'outputs twice the quantile':28} {'rate/s':>6} {'attainment':>10}   promises kept")
    for rate in rates:
        for share in (0.0, 0.1, 0.3):
            entries = [
                serve(hardware, make(hardware, seed, rate, count, overruns=share), SloPlanner(), seed) for seed in seeds
            ]
            mean = np.mean([entry["attainment"] for entry in entries])
            print(f"{100 * share:26.0f} % {rate:6.2f} {mean:10.3f}   {kept_share(entries)}", flush=True)
            rows.append({"share": share, "rate_rps": rate, "attainment": mean, "kept": kept_share(entries)})
    return rows


def study_model(hardware: Hardware, seeds: Sequence[int], rates: Sequence[float], count: int, make: Make) -> list[Any]:
    rows = []
    print(f"{'true time / model time':28} {'rate/s':>6} {'learns':>7} {'attainment':>10}   promises kept")
    for rate in rates:
        workloads = [make(hardware, seed, rate, count) for seed in seeds]
        for error in (0.7, 0.85, 1.0, 1.15, 1.4):
            for learns in (True, False):
                entries = [
                    serve(hardware, workload, SloPlanner(), seed, error=error, learns=learns)
                    for seed, workload in zip(seeds, workloads, strict=True)
                ]
                mean = np.mean([entry["attainment"] for entry in entries])
                kept = kept_share(entries)
                print(f"{error:28.2f} {rate:6.2f} {'yes' if learns else 'no':>7} {mean:10.3f}   {kept}", flush=True)
                rows.append({"error": error, "learns": learns, "rate_rps": rate, "attainment": mean, "kept": kept})
    return rows


STUDIES = {"mechanisms": study_mechanisms, "overruns": study_overruns, "model": study_model}


def main() -> int:
    """Run the studies that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=sorted(STUDIES), action="append", help="one of them (default: all)")
    parser.add_argument("--seeds", type=int, default=6, help="workloads, paired (6)")
    parser.add_argument("--first-seed", type=int, default=0, help="number of the first workload (0)")
    parser.add_argument("--best-effort", type=float, default=0.0, help="share of requests without an SLO (0)")
    parser.add_argument("--overruns", type=float, default=0.0, help="share of outputs twice as long as told (0)")
    parser.add_argument("--rates", default="1.5,2.0", help="requests per second, separated by commas")
    parser.add_argument("--requests", type=int, default=250, help="requests per workload (250)")
    parser.add_argument("--hardware", default="a100-80g-7b-measured", help="name or file")
    parser.add_argument("--kv-tokens", type=int, help="KV room in tokens (default: the hardware's)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    hardware = load_hardware(arguments.hardware)
    if arguments.kv_tokens is not None:
        hardware = hardware.with_kv_tokens(arguments.kv_tokens)
    rates = [float(text) for text in arguments.rates.split(",")]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    make = partial(make_workload, overruns=arguments.overruns, best_effort=arguments.best_effort)
    document = {}
    for name in arguments.study or STUDIES:
        print(f"== {name}, {arguments.seeds} seeds of {arguments.requests} requests on {hardware.name}")
        document[name] = STUDIES[name](hardware, seeds, rates, arguments.requests, make)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
