"""From the saved runs of a workload with stages to tables and a plot.

Capacity is the rate up to which `HOLDS` is attained, interpolated between the rates that were run. The interval of the
ratio of capacities is a bootstrap over seeds (95 %, percentile), paired: every resample takes the same seeds of ours
and of plain vLLM, whose better setting is chosen anew in each. A system that holds at the highest rate, or fails at
the lowest, counts as that rate in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve import figures
from slos_serve.bench.compare import OURS, STOCK, Run
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.staged import DRAFTS, SELECTION_SEED
from slos_serve.bench.study import HOLDS, saved_runs
from slos_serve.cache import write_json
from slos_serve.core.slo.deadlines import STAGES


def holds_until(points: Sequence[tuple[float, float]], share: float = HOLDS) -> float | None:
    """Return the rate up to which `share` is attained, interpolated between (rate, attainment); None: not seen."""
    for (rate, high), (next_rate, low) in pairwise(points):
        if high >= share > low:
            return rate + (next_rate - rate) * (high - share) / (high - low)
    return None


def counted(out: Path) -> list[Run]:
    """Return the saved runs that count: offered to compare, and not disturbed."""
    return [run for run in saved_runs(out) if run["seed"] != SELECTION_SEED and not run["is_disturbed"]]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return attainment, promises, stages and whole sessions of runs that differ in their seed."""
    entries = [run["entry"] for run in runs]
    rows = [(run["seed"], row) for run in runs for row in run["requests"]]
    sessions: dict[tuple[int, str], list[bool]] = {}  # by round
    for seed, row in rows:
        key = seed, "-".join(row["request_id"].split("-")[:2])
        sessions.setdefault(key, []).append(row["outcome"] == "met")
    rounds = {
        "loop rounds": [met for found in sessions.values() for met in found[:-1]],
        "final rounds": [found[-1] for found in sessions.values()],
    }
    words = {stage: [row["stages"][stage] for _, row in rows if row["stages"][stage]] for stage in STAGES}
    keys = ("num_requests", "met", "missed", "declined", "rejected", "failed", "promised", "kept")
    total = {key: sum(entry[key] for entry in entries) for key in keys}
    return {
        **total,
        "attainment": total["met"] / total["num_requests"],
        "by_seed": {str(run["seed"]): run["entry"]["attainment"] for run in runs},
        "stages": {stage: found.count("met") / len(found) for stage, found in words.items() if found},
        "rounds": {name: sum(met) / len(met) for name, met in rounds.items() if met},
        "sessions_met": sum(map(all, sessions.values())) / len(sessions),
        "most_waited": max(run["waited"] for run in runs),
    }


def report(out: Path, scaled: Scaled, drafts: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json and the plot from the saved runs; return the document. `drafts`: by run, see `plot`."""
    runs = counted(out)
    names = sorted({run["setting"] for run in runs})
    table = {
        name: {
            f"{rate:g}": summary([run for run in runs if (run["setting"], run["rate_rps"]) == (name, rate)])
            for rate in sorted({run["rate_rps"] for run in runs if run["setting"] == name})
        }
        for name in names
    }
    systems = {name: _by_seed(table[name]) for name in names if name == OURS or name.startswith(STOCK + "-")}
    document = {
        "schema": "slos-serve-stages/2",
        **about,
        "workload": scaled.describe(),
        "settings": table,
        "capacity_rps": {
            name: {"all": holds_until(_pooled(found)), "by_seed": {s: holds_until(one) for s, one in found.items()}}
            for name, found in systems.items()
        },
        "ratio": ratio(systems),
        "runs": run_counts(saved_runs(out)),
        "drafts": drafts,
    }
    write_json(document, out / "report.json")
    plot(table, drafts, out)
    return document


def run_counts(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Return, by setting, how many runs there are, left out as disturbed, and discarded attempts."""
    counts: dict[str, dict[str, int]] = {}
    for run in runs:
        found = counts.setdefault(run["setting"], {"runs": 0, "left_out": 0, "discarded": 0})
        found["runs"] += 1
        found["left_out"] += run["is_disturbed"]
        found["discarded"] += run["num_discarded"]
    return counts


Points = list[tuple[float, float]]  # (rate, attainment), ascending


def _by_seed(by_rate: Mapping[str, Mapping[str, Any]]) -> dict[str, Points]:
    """Return the points of each seed that was run at every rate."""
    seeds = sorted(set.intersection(*(set(one["by_seed"]) for one in by_rate.values())))
    return {seed: [(float(rate), one["by_seed"][seed]) for rate, one in by_rate.items()] for seed in seeds}


def _pooled(found: Mapping[str, Points], seeds: Sequence[str] = ()) -> Points:
    """Return mean attainment by rate; of the given seeds, one as often as it is named."""
    chosen = [found[seed] for seed in seeds or found]
    return [(points[0][0], float(np.mean([share for _, share in points]))) for points in zip(*chosen, strict=True)]


def _bounded(points: Points) -> float:
    found = holds_until(points)
    return (points[-1] if points[0][1] >= HOLDS else points[0])[0] if found is None else found


def ratio(systems: Mapping[str, Mapping[str, Points]]) -> dict[str, Any] | None:
    """Return our capacity over the best of plain vLLM's settings', with its paired interval; None without a seed.

    `is_bracketed`: both fall under `HOLDS` between two of the rates.
    """
    seeds = sorted(set.intersection(*(set(found) for found in systems.values()))) if OURS in systems else []
    stock = [name for name in systems if name != OURS]
    if not seeds or not stock:
        return None

    def of(chosen: Sequence[str]) -> float:
        held = {name: _bounded(_pooled(found, chosen)) for name, found in systems.items()}
        return held[OURS] / max(held[name] for name in stock)

    resampled = [of(chosen) for chosen in itertools.product(seeds, repeat=len(seeds))]
    low, high = np.quantile(resampled, [0.025, 0.975])
    pooled = {name: holds_until(_pooled(found, seeds)) for name, found in systems.items()}
    bracketed = pooled[OURS] is not None and any(pooled[name] is not None for name in stock)
    return {
        "value": of(seeds),
        "interval": [float(low), float(high)],
        "num_seeds": len(seeds),
        "is_bracketed": bracketed,
    }


def plot(table: Mapping[str, Any], drafts: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw attainment by rate, what each feature is worth, and drafts over time."""
    with figures.style() as pyplot:
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 3.8))
        stock = [name for name in table if name.startswith(STOCK + "-")]
        for name, colour in zip(
            (OURS, *stock), (figures.OURS, figures.STOCK, figures.ACCENT, figures.GREY), strict=False
        ):
            rates, shares = (
                [float(rate) for rate in table[name]],
                [list(one["by_seed"].values()) for one in table[name].values()],
            )
            left.plot(
                rates, [100 * one["attainment"] for one in table[name].values()], marker="o", color=colour, label=name
            )
            for rate, by_seed in zip(rates, shares, strict=True):
                left.scatter([rate] * len(by_seed), [100 * share for share in by_seed], color=colour, s=9, alpha=0.5)
        left.axhline(100 * HOLDS, color=figures.INK, linewidth=1, linestyle=":")
        left.set(xlabel="requests per second", ylabel="attainment, %", ylim=(-3, 103), title="attainment by rate")
        left.legend(loc="lower left", fontsize=8)
        rate = next(
            (next(iter(one)) for name, one in table.items() if name not in (OURS, *stock)), next(iter(table[OURS]))
        )
        bars = {name: 100 * by_rate[rate]["attainment"] for name, by_rate in table.items() if rate in by_rate}
        middle.barh(
            list(bars), list(bars.values()), color=[figures.OURS if name == OURS else figures.GREY for name in bars]
        )
        middle.set(xlabel="attainment, %", xlim=(0, 103), title=f"one feature out, {float(rate):.2f} requests/s")
        first = [one for one in drafts if one["points"] and one["seed"] == drafts[0]["seed"]]
        for one, shade in zip(first, np.linspace(0.35, 1, len(first)), strict=True):
            label = f"{one['rate_rps']:.2f}/s"
            points = [(point["second"], point["draft_length"]) for point in one["points"]]
            known = [(p["second"], DRAFTS * p["acceptance"]) for p in one["points"] if p["acceptance"] is not None]
            for line, colour, dash in ((points, figures.OURS, "-"), (known, figures.ACCENT, ":")):
                right.plot(*zip(*line, strict=True), color=colour, alpha=shade, linestyle=dash, label=label)
                label = ""
        right.set(
            xlabel="second of the run", ylabel="draft tokens", title=f"draft length; dotted: acceptance x {DRAFTS}"
        )
        if first:
            right.legend(fontsize=8)
        figure.tight_layout()
        figures.save(figure, out / "stages.png")


def as_text(document: Mapping[str, Any]) -> str:
    """Return the tables for a terminal."""
    lines = [
        f"{document['name']}, {document['seconds']:g} s a run",
        f"{'setting':18}{'rate/s':>8}{'attained':>10}{'by seed':>16}{'kept':>10}{'sessions':>10}   stages, rounds",
    ]
    for name, by_rate in document["settings"].items():
        for rate, one in by_rate.items():
            seeds = " ".join(f"{100 * x:.0f}" for x in one["by_seed"].values())
            kept = f"{one['kept']}/{one['promised']}" if one["promised"] else ""
            parts = {**one["stages"], **(one["rounds"] if len(one["rounds"]) > 1 else {})}
            stages = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in parts.items())
            lines.append(
                f"{name:18}{float(rate):8.2f}{100 * one['attainment']:9.1f}%{seeds:>16}{kept:>10}"
                f"{100 * one['sessions_met']:9.0f}%   {stages}"
            )
    for name, found in document["capacity_rps"].items():
        seeds = ", ".join("?" if x is None else f"{x:.2f}" for x in found["by_seed"].values())
        whole = "not bracketed" if found["all"] is None else f"{found['all']:.2f}/s"
        lines.append(f"{name} holds {100 * HOLDS:.0f} % up to {whole} (by seed: {seeds})")
    if document["ratio"]:
        found, (low, high) = document["ratio"], document["ratio"]["interval"]
        note = "" if found["is_bracketed"] else "; a bound: not both fall under it between the rates"
        text = f"{found['value']:.2f} ({low:.2f} to {high:.2f}, {found['num_seeds']} seeds){note}"
        lines.append(f"capacity to plain vLLM's best setting: {text}")
    totals = {key: sum(one[key] for one in document["runs"].values()) for key in ("runs", "left_out", "discarded")}
    lines.append("runs {runs}, left out as disturbed {left_out}, attempts discarded {discarded}".format(**totals))
    for name, said in document["schedulers"].items():
        coverage = said["margin_coverage"]
        shown = "unknown" if coverage is None else f"{100 * coverage:.1f} %"
        lines.append(f"{name}: margins covered {shown} of steps, stepped down {said['step_downs']} times")
    return "\n".join(lines)
