"""The study behind the claims: vLLM at its best of three token budgets against vLLM with slos-serve.

Rates are shares of the capacity that the profile implies. For each seed and rate every setting is offered
the same requests, one engine at a time, in an order that turns with the seed, so that a machine that gets
slower is slow for all. Each run is saved as it ends; a study that was interrupted goes on where it stopped.

At each rate the opponent is the one budget that did best over all seeds. Differences are paired by seed;
their interval is a bootstrap over seeds (95 %, percentile), the opponent chosen anew in every resample.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slos_serve import figures, pages
from slos_serve.bench import plots, report
from slos_serve.bench.compare import (
    OURS,
    STOCK,
    Run,
    best_setting,
    load_run,
    pooled,
    run_file,
    run_once,
    save_run,
)
from slos_serve.bench.lab import MODEL_NAME, Lab, Side, describe_engine
from slos_serve.bench.scaled import Scaled, fitted
from slos_serve.cache import write_json
from slos_serve.emulated.emulation import notice
from slos_serve.errors import SlosServeError
from slos_serve.records.profile import Profile
from slos_serve.terminal.progress import Progress
from slos_serve.terminal.signals import ending_by_signal

FloatArray = npt.NDArray[np.float64]

SHARES = (0.15, 0.35, 0.55, 0.75, 0.95)
RESAMPLES = 2_000
FIRST_SEED = 100
HOLDS = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What the user may choose. `seconds` is the length of one run, `hours` when to stop starting new ones."""

    model: str
    out: Path
    num_seeds: int = 8
    seconds: float = 40.0
    hours: float = 3.0
    shares: tuple[float, ...] = SHARES
    emulate: str | None = None


def run_study(options: StudyOptions) -> list[Run]:
    """Do every run that is not saved yet, as far as the time goes; return all that are."""
    deadline = time.monotonic() + options.hours * 3600
    with Lab(model=options.model, out=options.out, say=_say, emulate=options.emulate) as lab:
        scaled = lab.start_ours(fresh=False)
        sides = lab.start_sides(scaled, scaled.budgets)
        for position, (seed, share) in enumerate(_order(options)):
            rate = round(share * scaled.service_capacity_rps, 3)
            turned = sides[position % len(sides) :] + sides[: position % len(sides)]
            for side in turned:
                if time.monotonic() > deadline:
                    _say(f"{options.hours:g} h are over: run again to go on")
                    return saved_runs(options.out)
                _run_unless_saved(side, scaled, rate=rate, seed=seed, options=options)
    return saved_runs(options.out)


def _order(options: StudyOptions) -> list[tuple[int, float]]:
    """Return (seed, share) pairs: whole seeds first, so that an early end leaves complete pairs."""
    return [(FIRST_SEED + i, share) for i in range(options.num_seeds) for share in options.shares]


def _run_unless_saved(side: Side, scaled: Scaled, *, rate: float, seed: int, options: StudyOptions) -> None:
    path = options.out / "runs" / run_file(side.name, rate, seed)
    saved = load_run(path)
    if saved is not None and saved["duration_s"] == options.seconds:
        return
    with Progress(f"seed {seed}, {rate:.2f} requests/s on {side.name}"):
        run = run_once(
            side.engine.url,
            MODEL_NAME,
            scaled,
            system=side.system,
            budget=side.budget,
            rate_rps=rate,
            duration_s=options.seconds,
            seed=seed,
        )
    side.engine.check()
    save_run(run, path.parent)


def saved_runs(out: Path) -> list[Run]:
    """Return every run below a folder, in a fixed order."""
    runs = [load_run(path) for path in sorted((out / "runs").glob("*.json"))]
    return [run for run in runs if run is not None]


def complete_seeds(runs: Sequence[Run], rate_rps: float) -> tuple[dict[str, list[Run]], list[int]]:
    """Return runs by setting at a rate, for the seeds that every setting has run, in the same order."""
    by_setting: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run["rate_rps"] == rate_rps:
            by_setting.setdefault(run["setting"], {})[run["seed"]] = run
    if not by_setting:
        return {}, []
    seeds = sorted(set.intersection(*(set(found) for found in by_setting.values())))
    return {name: [found[seed] for seed in seeds] for name, found in by_setting.items()}, seeds


def compare_at(runs: Sequence[Run], rate_rps: float, rng: np.random.Generator) -> dict[str, Any] | None:
    """Return ours against the best stock setting at one rate, None without one complete seed."""
    by_setting, seeds = complete_seeds(runs, rate_rps)
    ours = [name for name in by_setting if name.startswith(OURS)]
    stock = [name for name in by_setting if name.startswith(STOCK + "-")]
    if not seeds or not ours or not stock:
        return None
    table = {name: _met_and_offered(by_setting[name]) for name in (*ours, *stock)}
    mean = {name: _share(table[name]) for name in table}
    best = best_setting(run for name in stock for run in by_setting[name])
    low, high = bootstrap_interval(table[ours[0]], [table[name] for name in stock], rng)
    return {
        "rate_rps": rate_rps,
        "num_seeds": len(seeds),
        "best_setting": best,
        "attainment": {name: mean[name] for name in sorted(mean)},
        "ours": mean[ours[0]],
        "stock": mean[best],
        "difference": mean[ours[0]] - mean[best],
        "low": low,
        "high": high,
        "by_class": {OURS: _classes(by_setting[ours[0]]), STOCK: _classes(by_setting[best])},
    }


def _met_and_offered(runs: Sequence[Run]) -> FloatArray:
    """Return (met, offered) of each run, shape (runs, 2)."""
    rows = [(run["entry"]["met"], run["entry"]["num_requests"] - run["entry"]["cancelled"]) for run in runs]
    return np.array(rows, np.float64)


def _share(rows: FloatArray) -> float:
    met, offered = rows.sum(axis=0)
    return float(met / offered) if offered else 0.0


def bootstrap_interval(
    ours: FloatArray,
    stock: Sequence[FloatArray],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return the 95 % interval of ours minus the best of `stock`, resampling seeds; rows are paired."""
    picks = rng.integers(0, len(ours), (RESAMPLES, len(ours)))

    def shares(rows: FloatArray) -> FloatArray:
        sums = rows[picks].sum(axis=1)
        share: FloatArray = sums[:, 0] / np.maximum(sums[:, 1], 1.0)
        return share

    best = np.max([shares(rows) for rows in stock], axis=0)
    low, high = np.quantile(shares(ours) - best, [0.025, 0.975])
    return float(low), float(high)


def _classes(runs: Sequence[Run]) -> dict[str, Any]:
    """Return attainment and promises by class, "all" for everything, pooled over runs."""
    return {
        name or "all": {**counts, "attainment": counts["met"] / counts["offered"] if counts["offered"] else None}
        for name, counts in pooled(runs).items()
    }


def summarise(runs: Sequence[Run], *, seed: int = 0) -> list[dict[str, Any]]:
    """Return the comparison at every rate that has one complete seed, ascending."""
    rng = np.random.default_rng(seed)
    rates = sorted({run["rate_rps"] for run in runs})
    found = [compare_at(runs, rate, rng) for rate in rates]
    return [comparison for comparison in found if comparison is not None]


def first_rate_below(comparisons: Sequence[Mapping[str, Any]], share: float = HOLDS) -> Mapping[str, Any] | None:
    """Return the comparison at the lowest rate where stock attains less than `share`."""
    return next((comparison for comparison in comparisons if comparison["stock"] < share), None)


def as_text(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return the table for a terminal."""
    lines = [
        f"{'rate/s':>7}{'seeds':>7}{'vLLM':>8}{'ours':>8}   difference (95 % interval)   promises kept   best budget"
    ]
    for row in comparisons:
        everything = row["by_class"][OURS]["all"]
        interval = f"{row['difference'] * 100:+.0f} ({row['low'] * 100:+.0f} to {row['high'] * 100:+.0f}) points"
        kept = f"{everything['kept']} of {everything['promised']}"
        budget = row["best_setting"].removeprefix(STOCK + "-")
        lines.append(
            f"{row['rate_rps']:>7.2f}{row['num_seeds']:>7}{pages.percent(row['stock']):>8}"
            f"{pages.percent(row['ours']):>8}   {interval:<27}{kept:>16}{budget:>14}"
        )
        for name in sorted(set(row["by_class"][OURS]) - {"all"}):
            ours, stock = row["by_class"][OURS][name], row["by_class"][STOCK][name]
            lines.append(
                f"  {name:<12}{pages.percent(stock['attainment']):>8}{pages.percent(ours['attainment']):>8}"
                f"   {ours['kept']} of {ours['promised']} promises kept, {ours['offered']} offered"
            )
    return "\n".join(lines)


def verdict(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return the claim in one sentence, or that there is none."""
    row = first_rate_below(comparisons)
    if row is None:
        return f"vLLM held {HOLDS * 100:.0f} % at every rate of this study: no claim."
    return (
        f"At {row['rate_rps']:.2f} requests/s, the first rate where vLLM falls under {HOLDS * 100:.0f} %: "
        f"{pages.percent(row['stock'])} with vLLM at its best budget, {pages.percent(row['ours'])} with slos-serve, "
        f"{row['difference'] * 100:+.0f} points (95 % interval {row['low'] * 100:+.0f} to {row['high'] * 100:+.0f}, "
        f"{row['num_seeds']} paired seeds)."
    )


def write_study(runs: Sequence[Run], options: StudyOptions) -> list[dict[str, Any]]:
    """Write report.json, report.html and a plot; return the comparisons."""
    comparisons = summarise(runs)
    scaled = fitted(Profile.load(options.out / "profile.json"))
    profile = scaled.profile.document
    document = {
        "schema": "slos-serve-study/1",
        "engine": describe_engine(options.model, options.emulate),
        "emulated": notice(profile.get("key")),
        "profile": {key: profile.get(key) for key in ("r2", "mape_heldout", "margin_coverage", "num_steps", "terms")},
        "workload": {**scaled.describe(), "seconds": options.seconds, "shares": list(options.shares)},
        "settings": sorted({run["setting"] for run in runs}),
        "num_runs": len(runs),
        "comparisons": comparisons,
        "claim": verdict(comparisons),
    }
    write_json(document, options.out / "report.json")
    if comparisons:
        figure = plots.difference_figure(comparisons)
        figures.save(figure, options.out / "difference.png")
        (options.out / "report.html").write_text(_page(document), encoding="utf-8")
    return comparisons


def _page(document: Mapping[str, Any]) -> str:
    comparisons = document["comparisons"]
    row = first_rate_below(comparisons) or comparisons[-1]
    systems = {
        name: [
            {
                "rate_rps": c["rate_rps"],
                "attainment": c["by_class"][name]["all"]["attainment"],
                "by_class": {k: v for k, v in c["by_class"][name].items() if k != "all"},
            }
            for c in comparisons
        ]
        for name in (STOCK, OURS)
    }
    rate = f"{row['rate_rps']:.2f} requests per second"
    kept, promised = (sum(c["by_class"][OURS]["all"][key] for c in comparisons) for key in ("kept", "promised"))
    tiles = [
        (pages.percent(row["ours"]), f"attainment with slos-serve at {rate}", "ours"),
        (pages.percent(row["stock"]), f"attainment of vLLM's best budget at {rate}", "stock"),
        (f"{kept} of {promised}", "promises kept, all runs", "good"),
    ]
    sections = [
        ("Attainment by rate", pages.inline(plots.attainment_figure(systems))),
        ("Difference, with its interval", pages.inline(plots.difference_figure(comparisons))),
        ("Numbers", f"<pre>{as_text(comparisons)}</pre>"),
        ("What the numbers mean", report.EXPLANATION),
    ]
    title, emulated = "vLLM and slos-serve: the study", document["emulated"]
    title += ", on an emulated device" if emulated else ""
    return pages.page(title=title, lead=document["claim"], tiles=tiles, sections=sections, notice=emulated)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(prog="study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a small model's folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), metavar="DIR", help="bench-report")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="paired runs at each rate (8)")
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help="length of one run (40)")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help=f"rates, as shares of the modelled capacity ({_shares()})"
    )
    parser.add_argument("--hours", type=float, default=3.0, metavar="H", help="start no new run after this time (3)")
    parser.add_argument("--quick", action="store_true", help="two rates, two seeds: about a quarter of an hour")
    parser.add_argument("--emulate", metavar="NAME|FILE", help="on a device emulated by this hardware file")
    parser.add_argument("--report-only", action="store_true", help="report the runs that are saved, run nothing")
    args = parser.parse_args(argv)
    if args.seeds < 1 or not args.seconds >= 1 or not args.hours > 0 or min(args.shares or (1.0,)) <= 0:
        parser.error("--seeds, --seconds, --shares and --hours: expected positive numbers")
    try:
        with ending_by_signal():
            model = args.model or ("" if args.report_only else _demo_model())
            options = StudyOptions(
                model=str(model),
                out=args.out,
                num_seeds=2 if args.quick else args.seeds,
                seconds=args.seconds,
                hours=args.hours,
                emulate=args.emulate,
                shares=tuple(args.shares or ((SHARES[0], SHARES[3]) if args.quick else SHARES)),
            )
            runs = saved_runs(options.out) if args.report_only else run_study(options)
    except KeyboardInterrupt:
        _say("stopped: what has run is saved, run again to go on")
        return 130
    except (SlosServeError, OSError, ValueError) as error:
        _say(f"study: {' '.join(str(error).split())}")
        return 1
    comparisons = write_study(runs, options)
    emulated = notice(Profile.load(options.out / "profile.json").document.get("key"))
    if emulated:
        print(emulated)
    print(as_text(comparisons))
    print(verdict(comparisons))
    print(json.dumps({"report": str(options.out / "report.json")}), file=sys.stderr)
    return 0


def _shares() -> str:
    return " ".join(f"{share:g}" for share in SHARES)


def _demo_model() -> Path:
    from slos_serve.bench.model import ensure_demo_model  # noqa: PLC0415

    return ensure_demo_model()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
