"""From the saved runs of a workload with stages to tables and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve import figures
from slos_serve.bench.compare import OURS, STOCK, Run
from slos_serve.bench.profile_file import write_json
from slos_serve.bench.scaled import Scaled
from slos_serve.bench.staged import DRAFTS, SELECTION_SEED
from slos_serve.bench.study import HOLDS, saved_runs
from slos_serve.core.deadlines import STAGES


def holds_until(points: Sequence[tuple[float, float]], share: float = HOLDS) -> float | None:
    """Return the rate up to which `share` is attained, interpolated between (rate, attainment); None: not seen."""
    for (rate, high), (next_rate, low) in pairwise(points):
        if high >= share > low:
            return rate + (next_rate - rate) * (high - share) / (high - low)
    return None


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return attainment, promises, stages and whole sessions of runs that differ in their seed."""
    entries = [run["entry"] for run in runs]
    rows = [(run["seed"], row) for run in runs for row in run["requests"]]
    sessions: dict[tuple[int, str], bool] = {}
    for seed, row in rows:
        key = seed, "-".join(row["request_id"].split("-")[:2])
        sessions[key] = sessions.get(key, True) and row["outcome"] == "met"
    words = {stage: [row["stages"][stage] for _, row in rows if row["stages"][stage]] for stage in STAGES}
    keys = ("num_requests", "met", "missed", "declined", "rejected", "failed", "promised", "kept")
    total = {key: sum(entry[key] for entry in entries) for key in keys}
    return {
        **total,
        "attainment": total["met"] / total["num_requests"],
        "by_seed": {str(run["seed"]): run["entry"]["attainment"] for run in runs},
        "stages": {stage: found.count("met") / len(found) for stage, found in words.items() if found},
        "sessions_met": sum(sessions.values()) / len(sessions),
        "others_cpu_share": max(run.get("others_cpu_share", 0.0) for run in runs),
    }


def report(out: Path, scaled: Scaled, drafts: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json and the plot from the saved runs; return the document. `drafts`: by run, see `plot`."""
    runs = [run for run in saved_runs(out) if run["seed"] != SELECTION_SEED]
    names = sorted({run["setting"] for run in runs})
    table = {
        name: {
            f"{rate:g}": summary([run for run in runs if (run["setting"], run["rate_rps"]) == (name, rate)])
            for rate in sorted({run["rate_rps"] for run in runs if run["setting"] == name})
        }
        for name in names
    }
    capacity = {name: _capacity(table[name]) for name in names if name == OURS or name.startswith(STOCK + "-")}
    held = {name: found["all"] for name, found in capacity.items() if found["all"]}
    stock = max((rate for name, rate in held.items() if name != OURS), default=None)
    document = {
        "schema": "slos-serve-stages/1",
        **about,
        "workload": scaled.describe(),
        "settings": table,
        "capacity_rps": capacity,
        "ratio": held[OURS] / stock if OURS in held and stock else None,
        "schedulers": json.loads((out / "status.json").read_text(encoding="utf-8")),
        "drafts": drafts,
    }
    write_json(document, out / "report.json")
    plot(table, drafts, out)
    return document


def _capacity(by_rate: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rate up to which enough is attained, of the seeds that were run at every rate: together and each."""
    seeds = sorted(set.intersection(*(set(one["by_seed"]) for one in by_rate.values())))
    shares = [(float(rate), [one["by_seed"][seed] for seed in seeds]) for rate, one in by_rate.items()]
    pooled = [(rate, sum(found) / len(found)) for rate, found in shares if found]
    each = {seed: holds_until([(rate, found[i]) for rate, found in shares]) for i, seed in enumerate(seeds)}
    return {"all": holds_until(pooled), "by_seed": each}


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
        first = [one for one in drafts if one["seed"] == drafts[0]["seed"]]
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
        right.legend(fontsize=8)
        figure.tight_layout()
        figures.save(figure, out / "stages.png")


def as_text(document: Mapping[str, Any]) -> str:
    """Return the tables for a terminal."""
    lines = [f"{'setting':18}{'rate/s':>8}{'attained':>10}{'by seed':>18}{'kept':>12}{'sessions':>10}   stages"]
    for name, by_rate in document["settings"].items():
        for rate, one in by_rate.items():
            seeds = " ".join(f"{100 * x:.0f}" for x in one["by_seed"].values())
            kept = f"{one['kept']}/{one['promised']}" if one["promised"] else ""
            stages = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in one["stages"].items())
            lines.append(
                f"{name:18}{float(rate):8.2f}{100 * one['attainment']:9.1f}%{seeds:>18}{kept:>12}"
                f"{100 * one['sessions_met']:9.0f}%   {stages}"
            )
    for name, found in document["capacity_rps"].items():
        seeds = ", ".join("?" if x is None else f"{x:.2f}" for x in found["by_seed"].values())
        whole = "not bracketed" if found["all"] is None else f"{found['all']:.2f}/s"
        lines.append(f"{name} holds {100 * HOLDS:.0f} % up to {whole} (by seed: {seeds})")
    if document["ratio"]:
        lines.append(f"capacity to plain vLLM's best setting: {document['ratio']:.2f}")
    return "\n".join(lines)
