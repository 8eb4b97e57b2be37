"""The claims: plain vLLM at three token budgets against slos-serve, five rates, several seeds, with intervals.

Every setting serves the same requests, one engine at a time, in an order that turns with every seed. Each
run is saved as it ends, so that an interrupted study goes on where it stopped. At each rate the opponent
is the budget with the highest mean attainment over all seeds. The interval on the difference is a
bootstrap over seeds and, within them, over requests, both sides resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
    setting_name,
    warm,
)
from slos_serve.bench.demo import (
    COMMON_FLAGS,
    MODEL_NAME,
    OURS_BUDGET,
    START_TIMEOUT_S,
    WARM_SHAPES_S,
    Say,
    describe_engine,
)
from slos_serve.bench.engines import Engine, Fleet
from slos_serve.bench.profile_file import Profile, write_json
from slos_serve.bench.scaled import Scaled

SHARES = (0.15, 0.3, 0.5, 0.8, 1.1)  # of the service capacity that the profile implies
NUM_RESAMPLES = 2000
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run: a model's folder, where results go, seeds, seconds per run and shares of capacity."""

    model: str
    out: Path
    seeds: Sequence[int]
    seconds: float = 30.0
    shares: Sequence[float] = SHARES


def run_study(options: Options, *, say: Say) -> dict[str, Any]:
    """Run what is missing, then write and return the report."""
    out = options.out
    profile_path = out / "profile.json"
    runs: list[Run] = []
    with Fleet(out / "logs") as fleet:
        flags = ["--profile", str(profile_path.resolve()), "--record", str((out / "steps.jsonl").resolve())]
        flags += [] if profile_path.exists() else ["--reprofile"]
        flags += ["--slo-mode", "enforce", "--max-num-batched-tokens", str(OURS_BUDGET), *COMMON_FLAGS]
        say("Starting vLLM with slos-serve; it measures its own steps where no profile is there.")
        ours = fleet.start(OURS, options.model, flags)
        fleet.wait([ours], timeout_s=START_TIMEOUT_S)
        scaled = Scaled(profile=Profile.load(profile_path))
        engines = {setting_name(OURS, OURS_BUDGET): (OURS, OURS_BUDGET, ours)}
        for budget in dict.fromkeys(scaled.budgets):
            name = setting_name(STOCK, budget)
            flags = ["--no-slo", "--max-num-batched-tokens", str(budget), *COMMON_FLAGS]
            engines[name] = (STOCK, budget, fleet.start(name, options.model, flags))
        fleet.wait([engine for _, _, engine in engines.values()], timeout_s=START_TIMEOUT_S)
        say(f"Warming up {', '.join(engines)}.")
        for _, _, engine in engines.values():
            warm(engine.url, MODEL_NAME, scaled, shapes_s=WARM_SHAPES_S)
        rates = [round(share * scaled.service_capacity_rps, 3) for share in options.shares]
        for turn, seed in enumerate(options.seeds):
            names = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
            for rate in rates:
                runs += [_run(scaled, engines[name], rate, seed=seed, options=options, say=say) for name in names]
            write_report(scaled, runs, options)
    return write_report(scaled, runs, options)


def _run(scaled: Scaled, side: tuple[str, int, Engine], rate: float, *, seed: int, options: Options, say: Say) -> Run:
    system, budget, engine = side
    folder = options.out / "runs"
    saved = load_run(folder / run_file(setting_name(system, budget), rate, seed))
    if saved is not None:
        return saved
    run = run_once(
        engine.url,
        MODEL_NAME,
        scaled,
        system=system,
        budget=budget,
        rate_rps=rate,
        duration_s=options.seconds,
        seed=seed,
    )
    engine.check()
    save_run(run, folder)
    entry = run["entry"]
    promises = f", promises kept {entry['kept']} of {entry['promised']}" if system == OURS else ""
    say(f"seed {seed}, {rate:.2f}/s, {run['setting']}: {report.percent(entry['attainment'])}{promises}")
    return run


def write_report(scaled: Scaled, runs: Sequence[Run], options: Options) -> dict[str, Any]:
    """Write report.json, report.html and the plots; return the document."""
    points, systems = compare(runs)
    document = {
        "schema": "slos-serve-study/1",
        "engine": describe_engine(options.model),
        "profile": {
            key: scaled.profile.document.get(key) for key in ("r2", "mape_heldout", "margin_coverage", "num_steps")
        },
        "workload": {**scaled.describe(), "seconds": options.seconds, "seeds": list(options.seeds)},
        "rates": points,
    }
    write_json(document, options.out / "report.json")
    sections = [
        ("slos-serve minus the best vLLM budget", report.inline(plots.difference_figure(points))),
        *report.comparison_sections(systems, timeline=None, rate=""),
    ]
    lead = (
        f"{len(runs)} runs of {options.seconds:.0f} s over {len(options.seeds)} seeds, the same requests for everyone."
    )
    page = report.page(title="slos-serve against vLLM", lead=lead, tiles=[], sections=sections)
    (options.out / "report.html").write_text(page, encoding="utf-8")
    plots.save(plots.difference_figure(points), options.out / "difference.png")
    plots.save(plots.attainment_figure(systems), options.out / "attainment.png")
    return document


def compare(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return one row by rate, and pooled entries by system for the plots."""
    points: list[dict[str, Any]] = []
    systems: dict[str, list[dict[str, Any]]] = {OURS: [], STOCK: []}
    for rate in sorted({run["rate_rps"] for run in runs}):
        here = [run for run in runs if run["rate_rps"] == rate]
        ours = [run for run in here if run["system"] == OURS]
        stock = [run for run in here if run["system"] == STOCK]
        if not ours or not stock:
            continue
        best = best_setting(stock)
        rivals = [run for run in stock if run["setting"] == best]
        pairs = _pairs(ours, rivals)
        low, high = bootstrap(pairs, np.random.default_rng(0))
        point: dict[str, Any] = {"rate_rps": rate, "vllm_setting": best, "num_seeds": len(pairs)}
        for name, part in ((OURS, ours), (STOCK, rivals)):
            counts = pooled(part)
            rows = {
                one: {**count, "attainment": count["met"] / count["offered"] if count["offered"] else None}
                for one, count in counts.items()
            }
            point[name] = {"all": rows.pop(""), "by_class": rows}
            systems[name].append(_entry(part, rate, point[name]))
        point["difference"] = point[OURS]["all"]["attainment"] - point[STOCK]["all"]["attainment"]
        point["low"], point["high"] = low, high
        points.append(point)
    return points, systems


def _entry(runs: Sequence[Run], rate: float, pooled_point: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry as a single run has it, with what is pooled put over the first run's."""
    entry = {**runs[0]["entry"], "rate_rps": rate}
    for key in ("met", "promised", "kept", "attainment"):
        entry[key] = pooled_point["all"][key]
    entry["num_requests"] = pooled_point["all"]["offered"]
    entry["by_class"] = {
        name: {**runs[0]["entry"]["by_class"].get(name, {}), **part, "num_requests": part["offered"]}
        for name, part in pooled_point["by_class"].items()
    }
    return entry


def _pairs(ours: Sequence[Run], rivals: Sequence[Run]) -> list[np.ndarray]:
    """Return, by seed, an array (requests, 2) of 1 where the SLO was met: ours, theirs."""
    by_seed = {run["seed"]: run for run in rivals}
    pairs = []
    for run in ours:
        other = by_seed.get(run["seed"])
        if other is None:
            continue
        theirs = {row["request_id"]: row["outcome"] == "met" for row in other["requests"]}
        met = [(row["outcome"] == "met", theirs[row["request_id"]]) for row in run["requests"]]
        pairs.append(np.array(met, np.float64))
    return pairs


def bootstrap(pairs: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference: seeds are drawn, then requests within each."""
    means = np.empty(NUM_RESAMPLES)
    for k in range(NUM_RESAMPLES):
        drawn = [pairs[i] for i in rng.integers(0, len(pairs), len(pairs))]
        sample = np.concatenate([part[rng.integers(0, len(part), len(part))] for part in drawn])
        means[k] = (sample[:, 0] - sample[:, 1]).mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def text(document: Mapping[str, Any]) -> str:
    """Return the study as a table for a terminal, and what it says of the first rate that vLLM does not hold."""
    lines = [
        f"{'req/s':>6}  {'vLLM':>6}  {'ours':>6}  {'difference':>10}  {'95 % interval':>15}  {'kept':>11}  best budget"
    ]
    first = None
    for point in document["rates"]:
        ours, stock = point[OURS]["all"], point[STOCK]["all"]
        interval = f"{point['low'] * 100:+.0f} to {point['high'] * 100:+.0f}"
        lines.append(
            f"{point['rate_rps']:6.2f}  {report.percent(stock['attainment']):>6}  "
            f"{report.percent(ours['attainment']):>6}  {point['difference'] * 100:+10.1f}  {interval:>15}  "
            f"{ours['kept']:>5}/{ours['promised']:<5}  {point['vllm_setting']}"
        )
        if first is None and stock["attainment"] < 0.9:
            first = point
    if first is not None:
        lines.append(
            f"At {first['rate_rps']:.2f} requests/s, the first rate at which vLLM is under 90 %, slos-serve keeps "
            f"{first['difference'] * 100:.0f} points more ({first['low'] * 100:+.0f} to {first['high'] * 100:+.0f})."
        )
    return "\n".join(lines)
