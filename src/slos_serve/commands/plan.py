"""`slos-serve plan`: how many replicas of what hardware a workload needs, and the headroom for a burst."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.cache import write_json
from slos_serve.commands.options import MAX_REPLICAS, add_simulation, add_workload, number, whole
from slos_serve.config import load_slo_config
from slos_serve.errors import ConfigError
from slos_serve.sim.capacity.runs import work_rate
from slos_serve.sim.capacity.search import pooled
from slos_serve.sim.capacity.sizing import (
    Deployment,
    faster,
    fewest,
    highest_factor,
    likely,
    with_burst,
    worst_class,
)
from slos_serve.sim.hardware import hardware_names, load_hardware
from slos_serve.sim.systems import SYSTEMS, find_system
from slos_serve.sim.workloads.scenarios import SCENARIO_SLOS, Offer, find_scenario
from slos_serve.sim.workloads.workload import RequestFactory, Workload, trace_workload
from slos_serve.terminal.progress import Bar
from slos_serve.traces.offered import check_options, offered_trace, tell
from slos_serve.traces.synthetic import SYNTHETIC, data_folder
from slos_serve.traces.trace import Trace

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware

HELP = "Say how many replicas of what hardware a workload needs."
DEFAULT_HARDWARE = "a100-80g-7b-measured"
NUM_WINDOWS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    parser.epilog = "example: slos-serve plan --trace mine.csv --rate 20 --hardware a100-80g-7b-measured --burst 3"
    add_workload(parser)
    parser.add_argument(
        "--hardware",
        metavar="NAMES|FILES",
        default=DEFAULT_HARDWARE,
        help=f"of {', '.join(hardware_names())}, or files, such as `slos-serve profile` writes ({DEFAULT_HARDWARE})",
    )
    parser.add_argument(
        "--system", metavar="NAME", default="slos-serve-ar", help=f"of {', '.join(SYSTEMS)} (slos-serve-ar: no drafts)"
    )
    parser.add_argument(
        "--target-attainment",
        metavar="T",
        type=number(above=0, most=1),
        default=0.9,
        help="of every class, 0 to 1 (0.9)",
    )
    parser.add_argument(
        "--burst",
        metavar="FACTOR",
        type=number(above=1, below=1000),
        help="also plan for a fifth of the requests arriving so much faster",
    )
    parser.add_argument(
        "--max-replicas", metavar="N", type=whole(1, MAX_REPLICAS), default=64, help="where to stop looking (64)"
    )
    parser.add_argument(
        "--max-requests", metavar="N", type=whole(1), default=900, help="simulate the busiest so many of a trace (900)"
    )
    parser.add_argument(
        "--price",
        metavar="NAME=USD",
        action="append",
        default=[],
        help="of a GPU and hour of a hardware; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write plan.json and plan.html, with pictures")
    add_simulation(parser)


def run(args: argparse.Namespace) -> int:
    """Plan for each hardware and print the answer."""
    check_options("plan", args)
    find_system(args.system)
    names = args.hardware.split(",")
    hardware = {name: load_hardware(name) for name in names}
    prices = parse_prices(args.price, [one.name for one in hardware.values()])
    document: dict[str, Any] = {"target_attainment": args.target_attainment, "system": args.system}
    document["burst_factor"] = args.burst
    if args.scenario is not None:
        document["data"] = args.data or SYNTHETIC
    with Bar(f"planning on {', '.join(hardware)}", len(hardware)) as bar:
        found: dict[str, dict[str, Any]] = {}
        num_runs = 0

        def on_run() -> None:
            nonlocal num_runs
            num_runs += 1
            bar(len(found), num_runs)

        for name, one in hardware.items():
            workloads, longest = build_workloads(args, one)
            deployment = Deployment(
                system=find_system(args.system),
                settings=find_system(args.system).default,
                hardware=one,
                max_model_len=longest,
                acceptance=args.acceptance,
                seed=args.seed,
                on_run=on_run,
            )
            found[one.name] = {"workload": describe(workloads), **size(args, deployment, workloads)}
            bar(len(found), num_runs, name)
    document["hardware"] = {name: found[name] for name in cheapest_first(found, prices)}
    fitting = [name for name, entry in document["hardware"].items() if entry["replicas"]]
    document["best"] = next(iter(fitting), None)
    document["closest"] = max(found, key=lambda name: found[name]["attainment"]) if not fitting else None
    if args.out is not None:
        write_report(document, args.out)
    if args.json:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        print(as_text(document))
    return 0 if fitting else 1


def write_report(document: dict[str, Any], folder: Path) -> None:
    """Write the plan as a document and as a page."""
    from slos_serve.sim.capacity.plan_report import page_of  # noqa: PLC0415 - draws

    write_json(document, folder / "plan.json")
    (folder / "plan.html").write_text(page_of(document, as_text(document)), encoding="utf-8")


def parse_prices(texts: list[str], names: list[str]) -> dict[str, float]:
    """Return the price of a GPU and hour by hardware; `ConfigError` for what is none."""
    prices: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            prices[name] = float(value)
        except ValueError:
            prices[name] = math.nan
        if name not in names or not 0 < prices[name] < math.inf:
            expected = f"NAME=USD, NAME of {', '.join(names)}, such as {names[0]}=2.5"
            raise ConfigError(where="plan", key="--price", value=text, expected=expected)
    return prices


def cheapest_first(found: dict[str, dict[str, Any]], prices: Mapping[str, float]) -> list[str]:
    """Return the hardware that serves the workload, the cheapest first, then what does not, the closest first.

    By price where all have one, else by GPUs. Each entry is given its `cost_per_hour`.
    """
    for name, entry in found.items():
        price = prices.get(name)
        entry["cost_per_hour"] = None if price is None or entry["gpus"] is None else price * entry["gpus"]
    key = "cost_per_hour" if all(name in prices for name in found) else "gpus"
    return sorted(found, key=lambda n: (found[n]["replicas"] is None, found[n][key] or 0.0, -found[n]["attainment"]))


def build_workloads(args: argparse.Namespace, hardware: Hardware) -> tuple[list[Workload], int]:
    """Return what is offered (several windows of a scenario, one stretch of a trace), and the context length."""
    if args.scenario is not None:
        scenario = find_scenario(args.scenario)
        slos = load_slo_config(args.slo_config) if args.slo_config else SCENARIO_SLOS
        data = data_folder(args.data, command="plan")
        each = max(1, args.max_requests // NUM_WINDOWS)
        offers = [
            Offer(data=data, hardware=hardware, rate_rps=args.rate, seed=seed, max_requests=each)
            for seed in range(NUM_WINDOWS)
        ]
        workloads = [scenario.offer(offer, slos) for offer in offers]
        tell(scenario.name, sum(one.num_requests for one in workloads), sum(one.duration_s for one in workloads))
        return workloads, scenario.max_model_len(hardware)
    config = load_slo_config(args.slo_config)
    longest = hardware.limits().max_model_len
    trace = busiest(offered_trace(args, max_total_tokens=longest, stretch=False), args.max_requests)
    factory = RequestFactory(config, hardware.reference_s, longest)
    workload = trace_workload(trace, factory, max_model_len=longest, default_class=args.slo_class, rate_rps=args.rate)
    tell(workload.name, workload.num_requests, workload.duration_s if trace.span_s else 0.0, trace)
    return [workload], longest


def busiest(trace: Trace, max_requests: int) -> Trace:
    """Return so many requests in a row, those that arrive in the shortest time."""
    if len(trace) <= max_requests:
        return trace
    times = trace.arrived_at_s
    spans = times[max_requests:] - times[:-max_requests]
    first = int(np.argmin(spans))
    cut = trace.part(first, first + max_requests)
    return replace(cut, span_s=max(cut.span_s, 1e-6))


def describe(workloads: list[Workload]) -> dict[str, Any]:
    """Return what is planned for."""
    counts = sum((workload.num_by_class() for workload in workloads), Counter[str]())
    return {
        "name": workloads[0].name,
        "rate_rps": sum(one.num_requests for one in workloads) / sum(one.duration_s for one in workloads),
        "num_requests": counts.total(),
        "left_out": dict(sum((Counter(one.left_out) for one in workloads), Counter[str]())),
        "num_dropped": sum(workload.num_dropped for workload in workloads),
        "num_windows": len(workloads),
        "by_class": dict(sorted(counts.items())),
    }


def size(args: argparse.Namespace, deployment: Deployment, workloads: list[Workload]) -> dict[str, Any]:
    """Return the replicas that one hardware needs, and what they have to spare."""
    target: float = args.target_attainment
    rate_rps = describe(workloads)["rate_rps"]
    gpus_each = deployment.system.layout(deployment.settings).num_replicas * deployment.hardware.num_gpus
    start = math.ceil(rate_rps / gpus_each / work_rate(workloads[0], deployment.hardware, share=0.6))

    def passes(count: int) -> bool:
        return deployment.attainment(workloads, count) >= target

    count = fewest(passes, start=start, most=args.max_replicas)
    if count is None:
        name, met, offered = worst_class(deployment.outcomes(workloads, args.max_replicas))
        best = deployment.attainment(workloads, args.max_replicas)
        reason = f"{replicas(args.max_replicas)} attain {best:.1%}"
        reason += f" of {name} ({met} of {offered}): its promises are too tight for this hardware"
        curve = curve_of(deployment, workloads)
        return {"replicas": None, "gpus": None, "attainment": best, "lacking": name, "curve": curve, "reason": reason}
    outcomes = deployment.outcomes(workloads, count)
    names = sorted({name for one in outcomes for name in one.by_class})
    by_class = {}
    for name in names:
        mine = [one for one in outcomes if name in one.by_class]
        by_class[name] = sum(one.met(name) for one in mine) / sum(one.by_class[name][1] for one in mine)
    return {
        "replicas": count,
        "gpus": count * gpus_each,
        "attainment": pooled(outcomes),
        "attainment_interval": list(likely(*worst_class(outcomes)[1:])),
        "attainment_by_window": [pooled([one]) for one in outcomes],
        # `fewest` has run it: nothing is simulated for this.
        "attainment_one_fewer": deployment.attainment(workloads, count - 1) if count > 1 else None,
        "attainment_by_class": by_class,
        "rate_per_gpu_rps": rate_rps / (count * gpus_each),
        "headroom_factor": highest_factor(
            lambda factor: deployment.attainment([faster(one, factor) for one in workloads], count) >= target
        ),
        "burst": burst(args, deployment, workloads, count, gpus_each) if args.burst else None,
        "curve": curve_of(deployment, workloads),
        "reason": "",
    }


def curve_of(deployment: Deployment, workloads: list[Workload]) -> list[dict[str, Any]]:
    """Return attainment of the worst class, with its interval, by the numbers of replicas that were tried."""
    rows = []
    for count, outcomes in deployment.curve(workloads).items():
        low, high = likely(*worst_class(outcomes)[1:])
        rows.append({"replicas": count, "attainment": pooled(outcomes), "low": low, "high": high})
    return rows


def burst(
    args: argparse.Namespace, deployment: Deployment, workloads: list[Workload], count: int, gpus_each: int
) -> dict[str, Any]:
    """Return what the burst does to `count` replicas, and how many hold the target through it."""
    target: float = args.target_attainment
    bursts = [with_burst(workload, args.burst) for workload in workloads]

    def passes(extra: int) -> bool:
        return deployment.attainment(bursts, count - 1 + extra) >= target

    extra = fewest(passes, start=1, most=args.max_replicas - count + 1)
    needed = None if extra is None else count - 1 + extra
    return {
        "factor": args.burst,
        "attainment": deployment.attainment(bursts, count),
        "replicas": needed,
        "gpus": None if needed is None else needed * gpus_each,
    }


def replicas(count: int) -> str:
    """Return the count in words."""
    return f"{count} replica" if count == 1 else f"{count} replicas"


def as_text(document: dict[str, Any]) -> str:
    """Return the answer for people."""
    lines = []
    for name, entry in document["hardware"].items():
        load = entry["workload"]
        mix = ", ".join(f"{count} {slo_class}" for slo_class, count in load["by_class"].items())
        lines.append(f"{name}: {load['name']} at {load['rate_rps']:.2f} requests/s")
        lines.append(f"  {mix}" + (f"; {load['num_dropped']} too long" if load["num_dropped"] else ""))
        if entry["replicas"] is None:
            lines.append(f"  cannot be served: {entry['reason']}")
            continue
        gpus = f", {entry['gpus']} GPUs" if entry["gpus"] != entry["replicas"] else ""
        fewer = entry["attainment_one_fewer"]
        aside = "" if fewer is None else f" (with one fewer {fewer:.1%})"
        lines.append(f"  {replicas(entry['replicas'])}{gpus}: {entry['attainment']:.1%} of the worst class{aside}")
        low, high = entry["attainment_interval"]
        windows = entry["attainment_by_window"]
        spread = f"; by window {min(windows):.1%} to {max(windows):.1%}" if len(windows) > 1 else ""
        lines.append(f"  likely {low:.1%} to {high:.1%} (95 %, of so many requests){spread}")
        if entry["cost_per_hour"] is not None:
            lines.append(f"  {entry['cost_per_hour']:.2f} USD an hour")
        target = f"{document['target_attainment']:.0%}"
        lines.append(f"  headroom: holds {target} up to {entry['headroom_factor']:.2f} x the rate")
        if entry["burst"]:
            one = entry["burst"]
            more = "more than there may be" if one["replicas"] is None else replicas(one["replicas"])
            lines.append(
                f"  a burst of {one['factor']:g} x: {one['attainment']:.1%} with those; {more} to hold {target}"
            )
    if document["best"] is not None and len(document["hardware"]) > 1:
        is_priced = all(
            entry["cost_per_hour"] is not None or not entry["replicas"] for entry in document["hardware"].values()
        )
        lines.append(f"{'cheapest' if is_priced else 'fewest GPUs'}: {document['best']}")
    if document["closest"] is not None and len(document["hardware"]) > 1:
        lines.append(f"closest: {document['closest']}")
    lines.append("Simulated with the hardware files' step times; a profile of your engine is better.")
    return "\n".join(lines)
