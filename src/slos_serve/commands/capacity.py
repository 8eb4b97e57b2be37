"""`slos-serve capacity`: the highest rate each system serves within its SLOs, by scenario and hardware."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from slos_serve.commands.options import add_engine, add_simulation, number, whole
from slos_serve.core.routing.routers import ROUTERS
from slos_serve.errors import ConfigError
from slos_serve.named import check_router
from slos_serve.sim.capacity.detail import look_closer
from slos_serve.sim.capacity.jobs import Journal, run_searches
from slos_serve.sim.capacity.report import write_report, write_tables
from slos_serve.sim.capacity.runs import CLAIRVOYANT
from slos_serve.sim.capacity.study import FULL, QUICK, Study
from slos_serve.sim.capacity.table import OURS, OURS_AR, as_text
from slos_serve.sim.cluster.cluster import POOLED
from slos_serve.sim.hardware import hardware_names, load_hardware
from slos_serve.sim.systems import SYSTEMS, find_system
from slos_serve.sim.workloads.scenarios import HARDWARE_SETS, SCENARIOS, find_scenario
from slos_serve.terminal.progress import Bar
from slos_serve.traces.synthetic import data_folder

HELP = "Find the highest rate at which systems keep their SLOs."
MAX_REPLICAS = 64
HIGHER_RATES = 3  # more of them for each of the goals above 90 %
SLOW_SCENARIO = "reasoning"  # thousands of tokens each: not for a quick look
QUICK_SYSTEMS = ("slos-serve", "slos-serve-ar", "vllm", "vllm-spec", "sarathi-serve")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capacity`."""
    parser.epilog = "example: slos-serve capacity --scenarios chatbot,coding --hardware measured --data DIR --quick"
    parser.add_argument(
        "--scenarios", metavar="NAMES", help=f"of {', '.join(SCENARIOS)} (all; with --quick all but {SLOW_SCENARIO})"
    )
    parser.add_argument(
        "--systems",
        metavar="NAMES",
        help=f"of {', '.join(SYSTEMS)}, {CLAIRVOYANT} (a bound, slow); 'main' is ours and its opponents, 'ablations' "
        "ours with parts taken out; or package.module:Class, a planner of your own "
        f"(main; with --quick {', '.join(QUICK_SYSTEMS)})",
    )
    parser.add_argument(
        "--hardware",
        metavar="NAMES|FILES",
        help=f"of {', '.join((*HARDWARE_SETS, *hardware_names()))}, or files; the first two are sets, with one file "
        "for each scenario (both sets; with --quick measured)",
    )
    parser.add_argument("--quick", action="store_true", help="three short windows, a coarse search, few settings")
    parser.add_argument(
        "--replicas", metavar="N[,N...]", default="1", help="replicas (1); more than one number shows how it scales"
    )
    parser.add_argument(
        "--router",
        metavar="NAME[,NAME...]",
        help=f"of {', '.join(ROUTERS)}, {POOLED} (one replica as fast as all), or package.module:Class; "
        "default: the system's own",
    )
    parser.add_argument(
        "--higher-goals", action="store_true", help="search at 95 and 99 %% too (default: what the rates run tell)"
    )
    parser.add_argument("--windows", metavar="N", type=whole(1), help="windows per scenario (10, with --quick 3)")
    parser.add_argument("--requests", metavar="N", type=whole(1), help="of a window at most (200 to 1000, quick half)")
    add_engine(parser)
    parser.add_argument(
        "--slo-scale", metavar="F", type=number(above=0, most=100), default=1.0, help="multiply every promise (1)"
    )
    parser.add_argument("--jobs", metavar="N", type=whole(1), help="processes (default: one per core)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("capacity-report"),
        help="report, plots, and the runs so far: the same command goes on from them (capacity-report)",
    )
    parser.add_argument(
        "--reuse",
        metavar="NAMES",
        help="systems whose runs in --out stand although other code made them, which the report then says (none)",
    )
    add_simulation(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    study = read_study(args)
    study.check()
    search_jobs = study.search_jobs()

    def progress(done: int, num_runs: int, name: str) -> None:
        bar(done, num_runs, name)
        if name:  # what is known so far survives whatever happens next
            write_tables(study.document(search_jobs), args.out)

    with (
        Journal(args.out / "runs.jsonl", reuse=study.reuse) as journal,
        Bar(f"{len(search_jobs)} searches", len(search_jobs)) as bar,
    ):
        if journal.num_foreign:
            bar.note(f"{journal.num_foreign} runs in {args.out} were made by other code and are made again")
        if journal.num_reused:
            bar.note(f"{journal.num_reused} runs in {args.out} were made by other code and stand")
        try:
            run_searches(search_jobs, journal, jobs=args.jobs or os.cpu_count() or 1, progress=progress)
        except KeyboardInterrupt:
            bar.note(f"{len(journal)} runs are kept in {args.out}: the same command goes on from here")
            return 130
    document = study.document(search_jobs)
    look_closer(document, study)
    note = write_report(document, study, args.out)
    if args.json:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        print(as_text(document))
        print(f"\nReport: {args.out}/report.html, report.json {f'(no plots: {note})' if note else 'and plots'}")
    return 1 if "errors" in document else 0


def read_study(args: argparse.Namespace) -> Study:
    """Check the arguments."""
    hardware = tuple((args.hardware or ("measured" if args.quick else ",".join(HARDWARE_SETS))).split(","))
    for name in hardware:
        if name not in HARDWARE_SETS:
            load_hardware(name)
    every = [name for name in SCENARIOS if not (args.quick and name == SLOW_SCENARIO)]
    scenarios = args.scenarios.split(",") if args.scenarios else every
    effort = QUICK if args.quick else FULL
    if args.windows is not None:
        effort = replace(effort, num_windows=args.windows, coarse_windows=min(effort.coarse_windows, args.windows))
    if args.higher_goals:
        effort = replace(effort, higher_rates=HIGHER_RATES)
    return Study(
        scenarios=tuple(find_scenario(name).name for name in scenarios),
        systems=read_systems(args.systems or (",".join(QUICK_SYSTEMS) if args.quick else "main")),
        hardware=hardware,
        data=str(data_folder(args.data, command="capacity").resolve()),
        effort=effort,
        is_quick=args.quick,
        max_requests=args.requests,
        acceptance=args.acceptance,
        async_lag=args.async_lag,
        known_lengths=args.known_lengths,
        slo_scale=args.slo_scale,
        seed=args.seed,
        replicas=read_replicas(args.replicas),
        routers=read_routers(args.router),
        reuse=read_systems(args.reuse) if args.reuse else (),
    )


def read_systems(text: str) -> tuple[str, ...]:
    """Return the systems that names and groups stand for, each once."""
    ablations = [name for name, one in SYSTEMS.items() if one.makes_promises and name not in {OURS, OURS_AR}]
    groups = {"main": [name for name in SYSTEMS if name not in ablations], "ablations": [OURS, *ablations]}
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    return tuple(dict.fromkeys(name if name == CLAIRVOYANT else find_system(name).name for name in names))


def read_routers(text: str | None) -> tuple[str | None, ...]:
    """Return the routers to run behind, None for the system's own."""
    names = tuple(dict.fromkeys(text.split(","))) if text else (None,)
    for name in names:
        if name is not None:
            check_router(name, where="capacity", key="router", more=(POOLED,))
    return names


def read_replicas(text: str) -> tuple[int, ...]:
    """Return the numbers of replicas to run."""
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = (0,)
    if not all(1 <= count <= MAX_REPLICAS for count in counts):
        expected = f"whole numbers from 1 to {MAX_REPLICAS}, with commas between"
        raise ConfigError(where="capacity", key="replicas", value=text, expected=expected)
    return counts
