"""What stages are worth on a real engine: requests that think, and agents that call tools, against plain vLLM.

    python benchmarks/stages.py [--workload reasoning|tool] [--out DIR] [--seeds 3] [--seconds 18] [--quick]

The workloads are those of `slos_serve.bench.staged`. Systems: ours with everything (drafts up to `DRAFTS` long), ours
with one feature taken out, plain vLLM with the budget that did best on a seed used for nothing else, and plain vLLM
with drafts of a fixed length. All get the same requests, one engine at a time, in an order that turns. Rates are shares
of the capacity that the profile implies. A run beside which others used the machine is repeated, and how much they did
is in the report; saved runs are not run again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slos_serve.bench.bystanders import Bystanders
from slos_serve.bench.client import BenchRequest
from slos_serve.bench.compare import OURS, STOCK, Run, best_setting, graded_run, load_run, run_file, save_run, warm
from slos_serve.bench.engines import Engine, ending_by_signal
from slos_serve.bench.lab import MODEL_NAME, OURS_BUDGET, Lab, check_memory, describe_engine, read_status
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.profile_file import Profile, write_json
from slos_serve.bench.progress import Progress
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
from slos_serve.bench.staged_report import as_text, report
from slos_serve.bench.study import saved_runs
from slos_serve.errors import SlosServeError
from slos_serve.sim.recording import read_recording

SHARES = {"reasoning": (0.2, 0.35, 0.6, 0.9), "tool": (0.2, 0.35, 0.6, 0.9)}
FIRST_SEED = 300
MAX_OTHERS, MAX_REPEATS = 0.1, 3  # a run beside which others took more than a tenth of the machine is repeated
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
    """What the user may choose."""

    model: str
    workload: str
    out: Path
    num_seeds: int = 3
    seconds: float = 18.0
    shares: tuple[float, ...] = ()


def ours_settings(scaled: Scaled, workload: str) -> list[Setting]:
    """Return ours with everything, then with one feature out."""
    settings = [
        Setting(name=OURS, engine=OURS),
        Setting(name="no drafts", engine="no-drafts"),
        Setting(name="no stages", engine=OURS, asks=without_stages(scaled)),
        Setting(name="no best effort", engine=OURS, asks=without_best_effort),
    ]
    return settings + ([Setting(name="no prefix hits", engine="no-prefix-hits")] if workload == "tool" else [])


def stock_settings(scaled: Scaled) -> list[Setting]:
    """Return plain vLLM: its default budget, the one that fits the loosest TPOT, and that with drafts."""
    default, fitted, _ = scaled.budgets
    names = ((default, ""), (fitted, ""), (fitted, "-drafts"))
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


def start(lab: Lab, workload: str) -> tuple[Scaled, dict[str, Engine]]:
    """Start every engine that the workload needs, ours first and alone where it has to measure itself; warm all up."""
    ours = scheduler_options()
    scaled = fitted(lab.start_ours(fresh=False, flags=[*FLAGS, *DRAFTING], **ours), workload)
    engines = {OURS: lab.ours, "no-drafts": lab.launch_ours("no-drafts", FLAGS, **ours)}
    if workload == "tool":
        name, flags = "no-prefix-hits", [*FLAGS, *DRAFTING]
        engines[name] = lab.launch_ours(name, flags, **ours, use_prefix_hits=False)
    for one in stock_settings(scaled):
        flags = [*FLAGS, *(DRAFTING if one.has_drafts else [])]
        engines[one.engine] = lab.launch_stock(one.budget, flags, name=one.engine)
    check_memory(len(engines) - 1)
    lab.wait(list(engines.values()), expected_s=30 * len(engines))
    with Progress("warming up"):
        for engine in engines.values():  # one by one: ours learns from every step how long steps take
            warm(engine.url, MODEL_NAME, Scaled(profile=scaled.profile), shapes_s=4.0)
    return scaled, engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What runs are made with."""

    options: Options
    scaled: Scaled
    engines: Mapping[str, Engine]

    def run_all(self) -> None:
        """Choose plain vLLM's budget, then do every run that is not saved yet."""
        options = self.options
        rates = [round(share * self.scaled.service_capacity_rps, 3) for share in options.shares]
        middle = rates[len(rates) // 2]
        stock = stock_settings(self.scaled)
        chosen = best_setting(self.run(one, middle, SELECTION_SEED) for one in stock if not one.has_drafts)
        rivals = [one for one in stock if one.has_drafts or one.name == chosen]
        full, *ablated = ours_settings(self.scaled, options.workload)
        for number in range(options.num_seeds):
            for position, rate in enumerate(rates):
                settings = [full, *rivals, *(ablated if rate == middle else [])]
                turn = (number + position) % len(settings)
                for one in settings[turn:] + settings[:turn]:
                    self.run(one, rate, FIRST_SEED + number)
                self.note_state()

    def note_state(self) -> None:
        """Keep what our servers say of themselves."""
        snapshots = {name: read_status(engine.url).get("snapshot") for name, engine in self.engines.items()}
        said = {name: {key: one.get(key) for key in SAID} for name, one in snapshots.items() if one}
        write_json(said, self.options.out / "status.json")

    def run(self, one: Setting, rate: float, seed: int) -> Run:
        """Return a saved run, or do it and save it."""
        options = self.options
        folder = options.out / "runs"
        saved = load_run(folder / run_file(one.name, rate, seed))
        if saved is not None and saved["duration_s"] == options.seconds:
            return saved
        sessions = sessions_of(self.scaled, rate_rps=rate, duration_s=options.seconds, seed=seed)
        asked = [[(pause_s, one.asks(request)) for pause_s, request in session] for session in sessions]
        engine = self.engines[one.engine]
        for _ in range(MAX_REPEATS):
            what = f"{options.workload}, seed {seed}, {rate:.2f} requests/s: {one.name}"
            with Progress(what), Bystanders(self.engines.values()) as others:
                began_s = time.time()
                results = asyncio.run(offer_sessions(engine.url, asked))
            engine.check()
            if others.share <= MAX_OTHERS:
                break
        run = graded_run(
            [request for session in sessions for _, request in session],
            results,
            system=one.system,
            budget=one.budget,
            rate_rps=rate,
            duration_s=options.seconds,
            seed=seed,
            setting=one.name,
            scenario=options.workload,
        )
        run |= {"wall_s": [began_s, time.time()], "others_cpu_share": others.share}
        save_run(run, folder)
        return run


def draft_series(record: Path, runs: Sequence[Run], window_s: float = 1.0) -> list[dict[str, Any]]:
    """Return draft length, acceptance and batch size by second of each run, from the record."""
    recording = read_recording(record)
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
    parser.add_argument("--workload", choices=sorted(LENGTHS), default="reasoning")
    parser.add_argument("--model", help="a small model's folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="stages-report/WORKLOAD")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting at each rate (3)")
    parser.add_argument(
        "--seconds", type=float, default=18.0, metavar="S", help="how long requests arrive in a run (18)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="rates, as shares of the modelled capacity"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, two rates")
    parser.add_argument("--report-only", action="store_true", help="report the runs that are saved")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not args.seconds >= 1 or min(args.shares or (1.0,)) <= 0:
        parser.error("--seeds, --seconds and --shares: expected positive numbers")
    shares = tuple(args.shares or SHARES[args.workload])
    options = Options(
        model=str(args.model or ensure_demo_model()),
        workload=args.workload,
        out=args.out or Path("stages-report") / args.workload,
        num_seeds=1 if args.quick else args.seeds,
        seconds=args.seconds,
        shares=shares[1:3] if args.quick else shares,
    )
    lab = Lab(model=options.model, out=options.out, say=_say)
    try:
        if not args.report_only:
            with ending_by_signal(), lab:
                scaled, engines = start(lab, options.workload)
                Bench(options=options, scaled=scaled, engines=engines).run_all()
        scaled = fitted(Scaled(profile=Profile.load(lab.profile_path)), options.workload)
        about = {"name": options.workload, "seconds": options.seconds, "engine": describe_engine(options.model)}
        document = report(options.out, scaled, draft_series(lab.record_path, saved_runs(options.out)), about)
    except KeyboardInterrupt:
        _say("stopped: what has run is saved, run again to go on")
        return 130
    except (SlosServeError, OSError, ValueError) as error:
        _say(f"stages: {' '.join(str(error).split())}")
        return 1
    print(as_text(document))
    return 0


def fitted(scaled: Scaled, workload: str) -> Scaled:
    """Return the workload at the size of the same engine."""
    return replace(scaled, mix={workload: 1.0}, lengths={workload: LENGTHS[workload]})


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
