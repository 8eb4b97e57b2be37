"""What stages are worth on a real engine: requests that think, and agents that call tools, against plain vLLM.

    python benchmarks/stages.py [--workloads reasoning tool] [--out DIR] [--seeds 3] [--seconds 12] [--minutes M]

The workloads are those of `slos_serve.bench.staged`. Systems: ours with everything (drafts up to `DRAFTS` long), ours
with one feature taken out, plain vLLM with the budget that did best on a seed used for nothing else, and plain vLLM
with drafts of a fixed length. Each is started once and gets the same requests, one engine at a time, in an order that
turns. Rates are shares of the capacity that the profile implies; features are taken out at the middle one.

A run in which the server's busiest thread, ready to go on, waited more than `MAX_WAITED` of the time for a processor,
whichever system it was, is discarded and repeated, up to `MAX_REPEATS` times; what was disturbed every time is counted
and left out. Saved runs are not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slos_serve.bench.client import BenchRequest
from slos_serve.bench.compare import OURS, STOCK, Run, best_setting, graded_run, load_run, run_file, save_run, warm
from slos_serve.bench.contention import CpuContention
from slos_serve.bench.engines import ServerProcess
from slos_serve.bench.lab import MODEL_NAME, OURS_BUDGET, Lab, check_memory, describe_engine, read_status
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.staged import (
    DRAFTING,
    FLAGS,
    LENGTHS,
    SELECTION_SEED,
    THINK_END,
    offer_sessions,
    offered_classes,
    sessions_of,
    without_best_effort,
    without_stages,
)
from slos_serve.bench.staged_report import as_text, counted, report
from slos_serve.cache import write_json
from slos_serve.errors import SlosServeError
from slos_serve.records.profile import Profile
from slos_serve.records.reader import Recording, read_recording
from slos_serve.terminal.progress import Progress
from slos_serve.terminal.signals import ending_by_signal

SHARES = {"reasoning": (0.35, 0.7, 1.05), "tool": (0.6, 1.0, 1.4)}
FIRST_SEED = 300
MAX_WAITED, MAX_REPEATS = 0.1, 2
SAID = ("effective_mode", "reason", "step_downs", "plan_s", "overhead_s", "margin_coverage", "model_error", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A system under test. `asks` changes what a request says, never what it is graded by."""

    name: str
    engine: str
    system: str = OURS
    budget: int = OURS_BUDGET
    has_drafts: bool = False
    asks: Callable[[BenchRequest], BenchRequest] = lambda request: request


# -- the runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user may choose. `shares`: those of `SHARES` where empty; `minutes`: when to start no new run."""

    model: str
    out: Path
    workloads: tuple[str, ...] = ("reasoning", "tool")
    num_seeds: int = 3
    seconds: float = 12.0
    minutes: float = math.inf
    shares: tuple[float, ...] = ()


def ours_settings(scaled: Scaled, workload: str) -> list[Setting]:
    """Return ours with everything, then with one feature out."""
    settings = [
        Setting(name=OURS, engine=OURS),
        Setting(name="no drafts", engine="no-drafts"),
        Setting(name="no deferral", engine="no-deferral"),
        Setting(name="no stages", engine=OURS, asks=without_stages(scaled)),
        Setting(name="no best effort", engine=OURS, asks=without_best_effort),
    ]
    return settings + ([Setting(name="no prefix hits", engine="no-prefix-hits")] if workload == "tool" else [])


def stock_settings(scaled: Scaled) -> list[Setting]:
    """Return plain vLLM: its default budget, the one that fits the loosest TPOT, and that with drafts."""
    default, fitted_budget, _ = scaled.budgets
    names = ((default, ""), (fitted_budget, ""), (fitted_budget, "-drafts"))
    return [
        Setting(name=name, engine=name, system=STOCK, budget=budget, has_drafts=bool(more))
        for budget, more in names
        if (name := f"{STOCK}-{budget}{more}")
    ]


def scheduler_options() -> dict[str, Any]:
    """Return what our schedulers are told; a step of this engine is so short that planning may take a tenth of it."""
    return {
        "thinking_end": [THINK_END[1]],
        "config": offered_classes(),
        "safety": {"max_time_share": 0.1},
    }


def start(lab: Lab, workloads: Sequence[str]) -> tuple[Scaled, dict[str, ServerProcess]]:
    """Start every engine that the workloads need, ours first and alone where it has to measure itself; warm all up."""
    ours, drafting = scheduler_options(), [*FLAGS, *DRAFTING]
    scaled = lab.start_ours(fresh=False, flags=drafting, **ours)
    engines = {
        OURS: lab.ours,
        "no-drafts": lab.launch_ours("no-drafts", FLAGS, **ours),
        "no-deferral": lab.launch_ours("no-deferral", drafting, **ours, planner_options={"reserve": 1}),
    }
    if "tool" in workloads:
        engines["no-prefix-hits"] = lab.launch_ours("no-prefix-hits", drafting, **ours, use_prefix_hits=False)
    for one in stock_settings(scaled):
        flags = drafting if one.has_drafts else FLAGS
        engines[one.engine] = lab.launch_stock(one.budget, flags, name=one.engine)
    check_memory(len(engines) - 1)
    lab.wait(list(engines.values()), expected_s=30 * len(engines))
    with Progress("warming up"):
        for engine in engines.values():  # one by one: ours learns from every step how long steps take
            warm(engine.url, MODEL_NAME, scaled, shapes_s=4.0)
    return scaled, engines


@dataclass(slots=True, kw_only=True)
class Bench:
    """What runs are made with. `until_s`: no run starts after it, on the monotonic clock."""

    options: Options
    scaled: Scaled
    engines: Mapping[str, ServerProcess]
    until_s: float = math.inf

    def run_all(self) -> None:
        """Choose plain vLLM's budgets, then do every run that is not saved yet, whole seeds first."""
        options = self.options
        self.until_s = time.monotonic() + 60 * options.minutes
        rivals = {workload: self.rivals(workload) for workload in options.workloads}
        for seed, workload in itertools.product(range(options.num_seeds), options.workloads):
            full, *ablated = ours_settings(fitted(self.scaled, workload), workload)
            rates = self.rates(workload)
            for position, rate in enumerate(rates):
                settings = [full, *rivals[workload], *(ablated if rate == middle(rates) else [])]
                turn = (seed + position) % len(settings)
                for one in settings[turn:] + settings[:turn]:
                    self.run(workload, one, rate, FIRST_SEED + seed)
                self.note_state()

    def rates(self, workload: str) -> list[float]:
        """Return the rates of a workload, in requests per second."""
        capacity = fitted(self.scaled, workload).service_capacity_rps
        return [round(share * capacity, 3) for share in self.options.shares or SHARES[workload]]

    def rivals(self, workload: str) -> list[Setting]:
        """Return plain vLLM with the better budget without drafts, and with drafts."""
        stock, rate = stock_settings(fitted(self.scaled, workload)), middle(self.rates(workload))
        runs = [self.run(workload, one, rate, SELECTION_SEED) for one in stock if not one.has_drafts]
        chosen = best_setting(run for run in runs if run is not None)
        return [one for one in stock if one.has_drafts or one.name == chosen]

    def note_state(self) -> None:
        """Keep what our servers say of themselves."""
        snapshots = {name: read_status(engine.url).get("snapshot") for name, engine in self.engines.items()}
        said = {name: {key: one.get(key) for key in SAID} for name, one in snapshots.items() if one}
        write_json(said, self.options.out / "status.json")

    def run(self, workload: str, one: Setting, rate: float, seed: int) -> Run | None:
        """Return a saved run, or do it and save it; None where the time is over."""
        options = self.options
        folder = options.out / workload / "runs"
        saved = load_run(folder / run_file(one.name, rate, seed))
        if saved is not None and saved["duration_s"] == options.seconds and not saved["is_disturbed"]:
            return saved
        scaled = fitted(self.scaled, workload)
        sessions = sessions_of(scaled, rate_rps=rate, duration_s=options.seconds, seed=seed)
        asked = [[(pause_s, one.asks(request)) for pause_s, request in session] for session in sessions]
        engine = self.engines[one.engine]
        waited, num_tried = 0.0, 0
        while not num_tried or (waited > MAX_WAITED and num_tried <= MAX_REPEATS):
            if time.monotonic() > self.until_s:
                return None
            what = f"{workload}, seed {seed}, {rate:.2f} requests/s: {one.name}"
            with Progress(what), CpuContention(engine) as others:
                began_s = time.time()
                results = asyncio.run(offer_sessions(engine.url, asked))
            engine.check()
            waited, num_tried = others.waited, num_tried + 1
        run = graded_run(
            [request for session in sessions for _, request in session],
            results,
            system=one.system,
            budget=one.budget,
            rate_rps=rate,
            duration_s=options.seconds,
            seed=seed,
            setting=one.name,
            scenario=workload,
        )
        run |= {"wall_s": [began_s, time.time()], "waited": waited}
        run |= {"num_discarded": num_tried - 1, "is_disturbed": waited > MAX_WAITED}
        save_run(run, folder)
        return run


def middle(rates: Sequence[float]) -> float:
    """Return the rate at which plain vLLM's budget is chosen and features are taken out."""
    return rates[len(rates) // 2]


def draft_series(recording: Recording, runs: Sequence[Run], window_s: float = 1.0) -> list[dict[str, Any]]:
    """Return draft length, acceptance and batch size by second of each run, from the record."""
    series = []
    for run in sorted((run for run in runs if run["setting"] == OURS), key=lambda run: (run["rate_rps"], run["seed"])):
        began, ended = run["wall_s"]
        bins: dict[int, list[tuple[float, float]]] = {}
        for step in recording.steps:
            if began <= step["t"] < ended and not step["has_prefill"]:
                bins.setdefault(int((step["t"] - began) / window_s), []).append(
                    (step["draft_steps"], step["num_requests"])
                )
        accepted = {
            int((plan["t"] - began) / window_s): plan["state"]["acceptance"].get(run["entry"]["scenario"])
            for plan in (recorded.document for recorded in recording.plans)
            if began <= plan["t"] < ended
        }
        points = [
            {"second": at, "draft_length": sum(d for d, _ in v) / len(v), "batch": sum(n for _, n in v) / len(v)}
            | {"acceptance": accepted.get(at)}
            for at, v in sorted(bins.items())
        ]
        series.append({"rate_rps": run["rate_rps"], "seed": run["seed"], "points": points})
    return series


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=sorted(LENGTHS), default=sorted(LENGTHS), metavar="W")
    parser.add_argument("--model", help="a small model's folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("stages-report"), help="stages-report")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting at each rate (3)")
    parser.add_argument(
        "--seconds", type=float, default=12.0, metavar="S", help="how long requests arrive in a run (12)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="rates, as shares of the modelled capacity"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="start no new run after this time")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--report-only", action="store_true", help="report the runs that are saved")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not args.seconds >= 1 or not args.minutes > 0 or min(args.shares or (1.0,)) <= 0:
        parser.error("--seeds, --seconds, --minutes and --shares: expected positive numbers")
    shares = tuple(args.shares or ())
    options = Options(
        model=str(args.model or ensure_demo_model()),
        out=args.out,
        workloads=tuple(args.workloads),
        num_seeds=1 if args.quick else args.seeds,
        seconds=args.seconds,
        minutes=args.minutes,
        shares=shares,
    )
    lab = Lab(model=options.model, out=options.out, say=_say)
    try:
        if not args.report_only:
            with ending_by_signal(), lab:
                scaled, engines = start(lab, options.workloads)
                Bench(options=options, scaled=scaled, engines=engines).run_all()
        scaled = Scaled(profile=Profile.load(lab.profile_path))
        recording = read_recording(lab.record_path)
        for workload in options.workloads:
            folder = options.out / workload
            about = {"name": workload, "seconds": options.seconds, "engine": describe_engine(options.model)}
            schedulers = json.loads((options.out / "status.json").read_text(encoding="utf-8"))
            drafts = draft_series(recording, counted(folder))
            print(as_text(report(folder, fitted(scaled, workload), drafts, {**about, "schedulers": schedulers})))
    except KeyboardInterrupt:
        _say("stopped: what has run is saved, run again to go on")
        return 130
    except (SlosServeError, OSError, ValueError) as error:
        _say(f"stages: {' '.join(str(error).split())}")
        return 1
    return 0


def fitted(scaled: Scaled, workload: str) -> Scaled:
    """Return the workload at the size of the same engine."""
    return replace(scaled, mix={workload: 1.0}, lengths={workload: LENGTHS[workload]})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
