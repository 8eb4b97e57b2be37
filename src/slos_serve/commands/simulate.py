"""`slos-serve simulate`: one run on the virtual clock."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.cache import write_json
from slos_serve.commands.options import MAX_REPLICAS, add_engine, add_simulation, add_workload, number, whole
from slos_serve.config import load_slo_config
from slos_serve.core.routing.routers import ROUTERS
from slos_serve.core.story import milliseconds
from slos_serve.core.warmup import warm_up
from slos_serve.errors import ConfigError
from slos_serve.named import check_router
from slos_serve.sim.cluster.cluster import POOLED
from slos_serve.sim.cluster.faults import FORM, parse_fault
from slos_serve.sim.hardware import hardware_names, load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import RunResult
from slos_serve.sim.systems import SYSTEMS, System, find_system
from slos_serve.sim.workloads.scenarios import SCENARIO_SLOS, Offer, find_scenario
from slos_serve.sim.workloads.workload import RequestFactory, Workload, trace_workload
from slos_serve.terminal.progress import Bar, said_if_slow
from slos_serve.traces.offered import check_options, offered_trace, summary, tell
from slos_serve.traces.synthetic import SYNTHETIC, data_folder

if TYPE_CHECKING:
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.core.types import Planner, Request
    from slos_serve.sim.hardware import Hardware
    from slos_serve.traces.trace import Trace

HELP = "Serve a trace on a virtual clock and grade it by class."
DEFAULT_HARDWARE = "a100-80g-7b-measured"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate`."""
    parser.epilog = "example: slos-serve simulate --system slos-serve --rate 3 --json"
    add_workload(parser)
    parser.add_argument(
        "--system",
        metavar="NAME[,NAME...]",
        default="slos-serve",
        help=f"of {', '.join(SYSTEMS)}, or package.module:Class, a planner of your own; the same requests for each",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting of the system, such as token_budget=512",
    )
    parser.add_argument(
        "--hardware", metavar="NAME|FILE", default=DEFAULT_HARDWARE, help=f"one of {', '.join(hardware_names())}"
    )
    parser.add_argument("--kv-tokens", metavar="N", type=whole(1), help="KV room in tokens (default: the hardware's)")
    parser.add_argument(
        "--replicas",
        metavar="N",
        type=whole(1, MAX_REPLICAS),
        default=1,
        help="replicas (1), or units of a system that needs several",
    )
    parser.add_argument(
        "--router",
        metavar="NAME",
        help=f"one of {', '.join(ROUTERS)}, or package.module:Class; {POOLED}: one replica as fast as all "
        "(default: the system's)",
    )
    parser.add_argument("--hops", metavar="N", type=whole(0), help="replicas tried after the first (the router's own)")
    parser.add_argument(
        "--snapshot-period",
        metavar="S",
        type=number(above=0, below=3600),
        default=0.25,
        help="seconds between a replica's snapshots (0.25)",
    )
    parser.add_argument(
        "--snapshot-lag",
        metavar="S",
        type=number(least=0, below=3600),
        default=0.0,
        help="seconds until the router has one (0)",
    )
    parser.add_argument("--fault", metavar="F", action="append", default=[], help=f"{FORM}; may be repeated")
    parser.add_argument(
        "--part", choices=("report", "tune"), default="report", help="windows of a scenario; --seed says which (report)"
    )
    add_engine(parser)
    parser.add_argument(
        "--noise", metavar="SIGMA", type=number(least=0, below=2), default=0.0, help="lognormal noise of step times (0)"
    )
    parser.add_argument(
        "--model-error",
        metavar="F",
        type=number(above=0, below=100),
        default=1.0,
        help="true step times / the planner's (1)",
    )
    parser.add_argument(
        "--length-error",
        metavar="F",
        type=number(above=0, below=100),
        default=1.0,
        help="factor on predicted lengths (1)",
    )
    parser.add_argument(
        "--acceptance-drift",
        metavar="D",
        type=number(above=-1, below=1),
        default=0.0,
        help="added to the acceptance every 100 s (0)",
    )
    parser.add_argument("--record", metavar="FILE", help="write every step as a line of JSON")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write results.json, requests.jsonl, steps.jsonl: for show"
    )
    add_simulation(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate and print the summary."""
    _check(args)
    hardware = load_hardware(args.hardware)
    if args.kv_tokens is not None:
        hardware = hardware.with_kv_tokens(args.kv_tokens)
    systems = [find_system(name) for name in dict.fromkeys(args.system.split(","))]
    workload, max_model_len, trace = build_workload(args, hardware)
    entries = [simulate(args, system, workload, hardware, max_model_len) for system in systems]
    tell(workload.name, workload.num_requests, workload.duration_s if trace is None else trace.span_s, trace)
    for entry in entries:
        entry.update({} if trace is None else {"trace": summary(trace)})
    if args.json:
        json.dump(entries if len(entries) > 1 else entries[0], sys.stdout, indent=2)
        print()
    else:
        print("\n\n".join(as_text(entry) for entry in entries))
    return 0


def _check(args: argparse.Namespace) -> None:
    where = "simulate"
    check_options(where, args)
    if args.router is not None:
        check_router(args.router, where=where, key="router", more=(POOLED,))


def parse_settings(system: System, texts: list[str]) -> dict[str, Any]:
    """Return the system's default settings, changed by KEY=VALUE texts (values are JSON)."""
    settings = dict(system.default)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(where="simulate", key="set", value=text, expected="KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def build_workload(args: argparse.Namespace, hardware: Hardware) -> tuple[Workload, int, Trace | None]:
    """Return what is offered, the context length it is offered under, and the trace it was made of, if any."""
    if args.scenario is not None:
        scenario = find_scenario(args.scenario)
        slos = load_slo_config(args.slo_config) if args.slo_config else SCENARIO_SLOS
        offer = Offer(
            data=data_folder(args.data, command="simulate"),
            hardware=hardware,
            rate_rps=args.rate,
            part=args.part,
            seed=args.seed,
        )
        return scenario.offer(offer, slos), scenario.max_model_len(hardware), None
    config = load_slo_config(args.slo_config)
    longest = hardware.limits().max_model_len
    trace = offered_trace(args, max_total_tokens=longest)
    factory = RequestFactory(config, hardware.reference_s, longest)
    workload = trace_workload(trace, factory, max_model_len=longest, default_class=args.slo_class)
    return workload, longest, trace


def simulate(
    args: argparse.Namespace, system: System, workload: Workload, hardware: Hardware, max_model_len: int
) -> dict[str, Any]:
    """Run and return the JSON document."""
    settings = parse_settings(system, args.set)
    faults = tuple(parse_fault(text) for text in args.fault)
    engine = ReplicaOptions(
        acceptance={"": args.acceptance},
        acceptance_drift=args.acceptance_drift,
        length_error=args.length_error,
        async_lag=args.async_lag,
        noise_sigma=args.noise,
        known_lengths=args.known_lengths,
    )
    limits = hardware.limits(max_model_len=max_model_len)
    with said_if_slow(f"{system.name}: compiling its loops, once after an installation: a minute or two"):
        warm_up(deployed(system, settings, args), limits)
    folder = None if args.out is None else args.out if "," not in args.system else args.out / system.name
    with (
        _step_writer(args.record, folder) as on_step,
        Bar(workload.name, workload.num_requests, counted="requests") as bar,
    ):
        start = time.perf_counter()
        result: RunResult = system.serve(
            workload,
            hardware.slower(args.model_error),
            settings=settings,
            num_replicas=args.replicas,
            router=args.router,
            engine=engine,
            cluster={
                "max_hops": args.hops,
                "snapshot_period_s": args.snapshot_period,
                "snapshot_lag_s": args.snapshot_lag,
                "faults": faults,
            },
            plan_model=hardware.perf_model,
            seed=args.seed,
            max_model_len=max_model_len,
            plan_clock=time.perf_counter,
            on_step=on_step,
            on_progress=lambda done: bar(done, done),
        )
        wall_s = time.perf_counter() - start
    entry = result.entry(system=system.name, wall_s=wall_s)
    entry["hardware"] = hardware.name
    entry["async_lag"] = result.replica.options.async_lag
    entry["settings"] = settings
    if args.scenario is not None:
        entry["data"] = args.data or SYNTHETIC
    entry["known_lengths"] = args.known_lengths
    if folder is not None:
        _write(folder, entry, result)
    return entry


def _write(folder: Path, entry: dict[str, Any], result: RunResult) -> None:
    """Write a run as `bench --out` writes one; `steps.jsonl` is there already."""
    slos = {(one.request.arrival_s, one.request.num_prompt_tokens): one.request for one in result.workload.arrivals}
    rows = [_request_row(number, one, slos) for number, one in enumerate(result.graded)]
    write_json({"hardware": entry["hardware"], "systems": {entry["system"]: [entry]}}, folder / "results.json")
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _request_row(number: int, one: GradedRequest, known: Mapping[tuple[float, int], Request]) -> dict[str, Any]:
    request = known.get((one.arrival_s, one.num_prompt_tokens))  # later rounds of a session are not among them
    asked = {} if request is None else {name: value for name, value in request.slo.items() if value is not None}
    return {
        "request_id": f"r{number}" if request is None else request.request_id,
        "class": one.slo_class,
        "sent_s": one.arrival_s,
        "prompt_tokens": one.num_prompt_tokens,
        "output_tokens": one.num_output_tokens,
        "slo": asked,
        "outcome": one.outcome,
        "promised": one.promised,
        "stages": {},
        "ttft_s": one.ttft_s,
        "tpot_s": one.tpot_s,
        "finished_s": one.finish_s,
    }


def deployed(system: System, settings: dict[str, Any], args: argparse.Namespace) -> Planner:
    """Return the system's planner; `ConfigError` for settings, replicas or faults that do not go together."""
    try:
        planner, cluster = system.deploy(settings, num_replicas=args.replicas, router=args.router)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(where=system.name, key="set", value=args.set, expected=str(error)) from error
    try:
        replace(cluster, faults=tuple(parse_fault(text) for text in args.fault))
    except ValueError as error:
        raise ConfigError(where="simulate", key="fault", value=args.fault, expected=str(error)) from error
    return planner


@contextmanager
def _step_writer(path: str | None, folder: Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """Yield what writes step records as lines of JSON; None without a path and a folder."""
    paths = ([] if path is None else [Path(path)]) + ([] if folder is None else [folder / "steps.jsonl"])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [stack.enter_context(one.open("w", encoding="utf-8")) for one in paths]

        def write(record: dict[str, Any]) -> None:
            line = json.dumps(record) + "\n"
            for file in files:
                file.write(line)

        yield write if files else None


def as_text(entry: dict[str, Any]) -> str:
    """Return the summary for people."""

    def row(name: str, group: dict[str, Any]) -> str:
        ttft, tpot = group["ttft_s"]["p99"], group["tpot_s"]["p99"]
        share = "-" if group["attainment"] is None else f"{100 * group['attainment']:.1f} %"
        kept = f"{group['kept']}/{group['promised']}" if group["promised"] else "-"
        lost = group["failed"] + group["rejected"]
        counts = f"{group['num_requests']:9}{share:>10}{kept:>11}{group['declined']:9}{lost:7}"
        latencies = [milliseconds(1000 * value) if value is not None else "-" for value in (ttft, tpot)]
        return f"{name:16}{counts}{latencies[0]:>9}{latencies[1]:>9}"

    where = entry["hardware"]
    if entry["replicas"] > 1:
        where = f"{entry['replicas']} x {where} ({entry['router']})"
    lines = [
        f"{entry['system']} on {where}, {entry['scenario']} at {entry['rate_rps']:.2f} requests/s",
        "class            requests  attained       kept declined failed p99 TTFT p99 TPOT",
        *(row(name, group) for name, group in entry["by_class"].items()),
        row("all", entry),
        f"{entry['num_steps']} steps, {entry['simulated_s']:.0f} s simulated in {entry['wall_s']:.1f} s",
    ]
    if entry["promised"]:
        lines.append("kept: of those promised; what was declined is served best-effort, and counts as a miss")
    if entry["num_dropped"]:
        lines.append(f"{entry['num_dropped']} more requests are longer than the context and were left out")
    return "\n".join(lines)
