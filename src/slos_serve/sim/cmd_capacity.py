"""`slos-serve capacity`: the highest rate each system serves within its SLOs, by scenario and hardware."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slos_serve.errors import ConfigError
from slos_serve.sim.capacity import TARGETS, Measured, Task, ratio_interval, solve, tune
from slos_serve.sim.hardware import hardware_names, load_hardware
from slos_serve.sim.scenarios import SCENARIOS, find_scenario
from slos_serve.sim.systems import SYSTEMS, find_system

HELP = "find the highest rate at which systems keep their SLOs"
DEFAULT_SYSTEMS = ("slos-serve", "slos-serve-ar", "vllm", "sarathi-serve")
DEFAULT_HARDWARE = ("a100-80g-7b-measured",)
OURS, OURS_AR = "slos-serve", "slos-serve-ar"
RATIOS = ("ratio", "ratio_spec", "ratio_ar")
QUICK_SEEDS, FULL_SEEDS = 1, 10
QUICK_TOLERANCE, FULL_TOLERANCE = 0.08, 0.03
QUICK_REQUESTS, TUNE_REQUESTS = 300, 600
SCALE = {0.90: "capacity_rps", 0.95: "capacity_95_rps", 0.99: "capacity_99_rps"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `capacity`."""
    parser.epilog = (
        "example: slos-serve capacity --scenarios chatbot,coding --systems slos-serve,vllm --data DIR --quick"
    )
    parser.add_argument("--scenarios", metavar="NAMES", default="chatbot,coding", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument(
        "--systems", metavar="NAMES", default=",".join(DEFAULT_SYSTEMS), help=f"of {', '.join(SYSTEMS)}"
    )
    parser.add_argument(
        "--hardware", metavar="NAMES", default=",".join(DEFAULT_HARDWARE), help=f"of {', '.join(hardware_names())}"
    )
    parser.add_argument("--replicas", metavar="N", type=int, default=1, help="number of replicas (1)")
    parser.add_argument("--data", metavar="DIR", required=True, help="folder of public trace files")
    parser.add_argument("--quick", action="store_true", help="one short window, coarse search, default settings only")
    parser.add_argument("--seeds", metavar="N", type=int, help="windows per scenario (10, with --quick 1)")
    parser.add_argument("--acceptance", metavar="A", type=float, default=0.7, help="chance of a draft token (0.7)")
    parser.add_argument("--known-lengths", action="store_true", help="let every system know true output lengths")
    parser.add_argument("--processes", metavar="N", type=int, help="parallel processes (default: one per core)")
    parser.add_argument("--out", metavar="DIR", help="write capacity.json, capacity.md and a plot there")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What to measure: one cell is a system on a scenario on some hardware."""

    scenarios: tuple[str, ...]
    systems: tuple[str, ...]
    data: str
    num_seeds: int
    tolerance: float
    is_quick: bool
    acceptance: float
    known_lengths: bool

    def task(self, hardware: str, scenario: str, system: str, **changes: Any) -> Task:
        """Return the task of one cell."""
        values = {
            "scenario": scenario,
            "system": system,
            "hardware": hardware,
            "data": self.data,
            "part": "report",
            "seeds": (0,),
            "settings": tuple(find_system(system).default.items()),
            "tolerance": self.tolerance,
            "acceptance": self.acceptance,
            "known_lengths": self.known_lengths,
            "targets": (0.90,) if self.is_quick else TARGETS,
            "max_requests": QUICK_REQUESTS if self.is_quick else None,
        }
        return Task(**{**values, **changes})

    def tuning(self, hardware: str, scenario: str, system: str) -> list[Task]:
        """Return one task for each setting to try, on the tuning windows."""
        if self.is_quick:
            return [self.task(hardware, scenario, system, part="tune")]
        changes = {"part": "tune", "seeds": (0, 1), "max_requests": TUNE_REQUESTS, "targets": (0.90,)}
        return [
            self.task(hardware, scenario, system, settings=tuple(settings.items()), **changes)
            for settings in find_system(system).grid
        ]


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    study, hardware = _read(args)
    with ProcessPoolExecutor(args.processes or os.cpu_count() or 1) as pool:
        document = {"hardware": {name: measure(study, name, pool) for name in hardware}}
    if args.out:
        write(document, Path(args.out))
    if args.json:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        print(as_text(document))
    return 0


def _read(args: argparse.Namespace) -> tuple[Study, list[str]]:
    """Check the arguments."""
    if args.replicas != 1:
        raise ConfigError(where="capacity", key="replicas", value=args.replicas, expected="1")
    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(where="capacity", key="seeds", value=args.seeds, expected="at least 1")
    if not 0 <= args.acceptance < 1:
        raise ConfigError(where="capacity", key="acceptance", value=args.acceptance, expected="at least 0, below 1")
    hardware: list[str] = args.hardware.split(",")
    for name in hardware:
        load_hardware(name)
    study = Study(
        scenarios=tuple(find_scenario(name).name for name in args.scenarios.split(",")),
        systems=tuple(find_system(name).name for name in args.systems.split(",")),
        data=args.data,
        num_seeds=args.seeds or (QUICK_SEEDS if args.quick else FULL_SEEDS),
        tolerance=QUICK_TOLERANCE if args.quick else FULL_TOLERANCE,
        is_quick=args.quick,
        acceptance=args.acceptance,
        known_lengths=args.known_lengths,
    )
    return study, hardware


def measure(study: Study, hardware: str, pool: Executor) -> dict[str, Any]:
    """Tune every system, then measure it on the reporting windows; return one hardware's document."""
    cells = [(scenario, system) for scenario in study.scenarios for system in study.systems]
    tuned: list[Task] = []
    for (scenario, system), (task, capacity) in zip(
        cells, pool.map(tune, [study.tuning(hardware, *cell) for cell in cells]), strict=True
    ):
        _progress(f"{hardware} {scenario} {system}: {dict(task.settings)} tuned at {capacity:.2f} requests/s")
        tuned.append(study.task(hardware, scenario, system, settings=task.settings, guess_rps=capacity or 1.0))
    tasks = [replace(task, seeds=(seed,)) for task in tuned for seed in range(study.num_seeds)]
    answers = iter(pool.map(solve, tasks))
    measured: dict[str, dict[str, Measured]] = {}
    for (scenario, system), task in zip(cells, tuned, strict=True):
        result = Measured(system=system, settings=dict(task.settings))
        for _ in range(study.num_seeds):
            for target, capacity in next(answers).items():
                result.by_target.setdefault(target, []).append(capacity)
        _progress(f"{hardware} {scenario} {system}: {result.mean(0.90):.2f} requests/s")
        measured.setdefault(scenario, {})[system] = result
    scenarios = {name: scenario_entry(systems) for name, systems in measured.items()}
    return {
        "scenarios": scenarios,
        "geomean": {key: _geomean([entry[key] for entry in scenarios.values()]) for key in RATIOS},
    }


def scenario_entry(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return one scenario's part of `capacity --json`.

    `ratio` is our capacity over that of the best baseline without drafts, `ratio_spec` over the best of
    all, `ratio_ar` that of ours without drafts over the best baseline without drafts.
    """
    entry: dict[str, Any] = {}
    for target, key in SCALE.items():
        entry[key] = {name: m.mean(target) for name, m in measured.items() if target in m.by_target}
    entry["settings"] = {name: m.settings for name, m in measured.items()}
    entry["spread"] = {name: [min(m.by_target[0.90]), max(m.by_target[0.90])] for name, m in measured.items()}
    baselines = [name for name in measured if not find_system(name).makes_promises]
    plain = [name for name in baselines if not find_system(name).max_draft_length]
    ours = OURS if OURS in measured else OURS_AR
    entry["best_baseline"], entry["best_baseline_spec"] = _best(measured, plain), _best(measured, baselines)
    for suffix, name, baseline in (
        ("", ours, entry["best_baseline"]),
        ("_spec", ours, entry["best_baseline_spec"]),
        ("_ar", OURS_AR, entry["best_baseline"]),
    ):
        entry[f"ratio{suffix}"], entry[f"ratio{suffix}_interval"] = _ratio(measured, name, baseline)
    entry["clairvoyant_rps"] = None
    entry["share_of_clairvoyant"] = None
    return entry


def _best(measured: Mapping[str, Measured], names: Sequence[str]) -> str | None:
    return max(names, key=lambda name: measured[name].mean(0.90), default=None)


def _ratio(
    measured: Mapping[str, Measured], ours: str, baseline: str | None
) -> tuple[float | None, tuple[float, float] | None]:
    if baseline is None or ours not in measured or measured[baseline].mean(0.90) <= 0:
        return None, None
    left, right = measured[ours].by_target[0.90], measured[baseline].by_target[0.90]
    return sum(left) / sum(right), ratio_interval(left, right)


def _geomean(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def as_text(document: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = []
    for name, hardware in document["hardware"].items():
        scenarios = hardware["scenarios"]
        systems = list(dict.fromkeys(system for entry in scenarios.values() for system in entry["capacity_rps"]))
        lines += [f"### {name}", "", "Capacity in requests per second and GPU (every class attains 90 %).", ""]
        lines.append("| scenario | " + " | ".join(systems) + " | ratio | to the best with drafts | without drafts |")
        lines.append("|---|" + "---|" * (len(systems) + 1 + len(RATIOS)))
        for scenario, entry in scenarios.items():
            cells = [f"{entry['capacity_rps'][system]:.2f}" for system in systems]
            ratios = [_number(entry[key]) for key in RATIOS]
            lines.append(f"| {scenario} | " + " | ".join(cells + ratios) + " |")
        means = [_number(hardware["geomean"][key]) for key in RATIOS]
        lines += ["| geometric mean | " + " | ".join([""] * len(systems) + means) + " |", ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write the document, its tables, and (where matplotlib is installed) a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "capacity.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "capacity.md").write_text(as_text(document) + "\n", encoding="utf-8")
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        _progress("no plot: matplotlib is not installed (pip install 'slos-serve[bench]')")
        return
    mpl.use("Agg")
    for name, hardware in document["hardware"].items():
        plot(name, hardware["scenarios"], folder / f"capacity-{Path(name).stem}.png")


def plot(name: str, scenarios: Mapping[str, Any], path: Path) -> None:
    """Draw one group of bars for each scenario."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    systems = list(dict.fromkeys(system for entry in scenarios.values() for system in entry["capacity_rps"]))
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(scenarios), 3.2), layout="constrained")
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        heights = [entry["capacity_rps"][system] for entry in scenarios.values()]
        spread = [entry["spread"][system] for entry in scenarios.values()]
        below = [height - low for height, (low, _) in zip(heights, spread, strict=True)]
        above = [high - height for height, (_, high) in zip(heights, spread, strict=True)]
        places = [group + (i - (len(systems) - 1) / 2) * width for group in range(len(scenarios))]
        axes.bar(places, heights, width, label=system, yerr=[below, above], error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(scenarios)), list(scenarios))
    axes.set_ylabel("requests/s per GPU at 90 %")
    axes.set_title(name)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
