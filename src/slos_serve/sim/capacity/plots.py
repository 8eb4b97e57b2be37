"""Figures of the capacity report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slos_serve.core.perf import PerfModel
from slos_serve.figures import ACCENT, GREY, INK, OURS, STOCK, style

PALETTE = (STOCK, ACCENT, "#8e5bb5", "#c2a12f", "#c2496b", "#4aa3a2", GREY, "#6b4f2a", "#9bb54a")
DRAFTS = (0, 1, 2, 4, 6)
FEWEST_TICKS = 3
CONTEXT_TOKENS = 512  # behind each request of the feasible region

Entry = Mapping[str, Any]


def colours_of(systems: Sequence[str]) -> dict[str, str]:
    """Return a colour for each system: ours the same in every figure."""
    others = [name for name in systems if not name.startswith("slos-serve")]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}
    ours = [name for name in systems if name.startswith("slos-serve")]
    shades = (OURS, "#6cb1ef", "#0f4c8a", "#a9d0f5", "#3a6ea5")
    return {**{name: shades[i % len(shades)] for i, name in enumerate(ours)}, **colours}


def attainment_figure(scenarios: Mapping[str, Entry], systems: Sequence[str]) -> Any:
    """Draw attainment of the class that has least, by rate, one panel a scenario, with the 90 % line."""
    colours = colours_of(systems)
    shares = [
        row["attainment"] for entry in scenarios.values() for curve in entry["attainment"].values() for row in curve
    ]
    lowest = max(0.0, min(80.0, 100 * min(shares) - 3))
    with style() as pyplot:
        columns = min(3, len(scenarios))
        rows = math.ceil(len(scenarios) / columns)
        figure, grid = pyplot.subplots(rows, columns, figsize=(3.7 * columns, 3.0 * rows), sharey=True, squeeze=False)
        panels = grid.flatten()
        for axes, (name, entry) in zip(panels, scenarios.items(), strict=False):
            for system, curve in entry["attainment"].items():
                points = [(row["rate_rps"], 100 * row["attainment"]) for row in curve]
                ours = system.startswith("slos-serve")
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colours[system], label=system,
                          linewidth=2.2 if ours else 1.4, zorder=3 if ours else 2)  # fmt: skip
            axes.axhline(90, color=INK, linewidth=1, linestyle=":")
            axes.set(xscale="log", ylim=(lowest, 101), xlabel="requests per second and GPU")
            axes.xaxis.set_major_formatter("{x:g}")
            _label_rates(axes)
            axes.set_title(name)
        for axes in panels[len(scenarios) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("attainment of the worst class, %")
        figure.tight_layout(rect=(0, 0.07 if rows > 1 else 0.14, 1, 1))
        _legend(figure, _swatches(figure.axes[0], colours))
        return figure


def _label_rates(axes: Any) -> None:
    """Label 1, 2 and 5 of every decade of a logarithmic axis; a few round numbers where it spans less."""
    low, high = axes.get_xlim()
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < FEWEST_TICKS:
        step = 10 ** math.floor(math.log10(high - low))
        step *= 1 if (high - low) / step >= FEWEST_TICKS else 0.5
        inside = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    axes.set_xticks(inside)
    axes.set_xticks([], minor=True)


def capacity_figure(scenarios: Mapping[str, Entry], systems: Sequence[str]) -> Any:
    """Draw capacity at 90 % with its interval, one group of bars a scenario, relative to the best without drafts."""
    colours = colours_of(systems)
    bases = [
        entry["capacity_rps"].get(entry["best_baseline"])
        or max(filter(None, entry["capacity_rps"].values()), default=1.0)
        for entry in scenarios.values()
    ]
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(2.0 + 1.7 * len(scenarios), 3.6))
        width = 0.84 / len(systems)
        for i, system in enumerate(systems):
            for group, entry in enumerate(scenarios.values()):
                base = bases[group]
                height = entry["capacity_rps"].get(system)
                if height is None:
                    continue
                low, high = entry["spread"][system]
                place = group + (i - (len(systems) - 1) / 2) * width
                errors = [[max(0.0, height - low) / base], [max(0.0, high - height) / base]]
                axes.bar(place, height / base, width, color=colours[system], yerr=errors, ecolor=INK,
                         error_kw={"elinewidth": 0.8})  # fmt: skip
        axes.axhline(1, color=INK, linewidth=1, linestyle=":")
        labels = [f"{name}\n1 = {base:.3g}/s" for name, base in zip(scenarios, bases, strict=True)]
        axes.set_xticks(range(len(scenarios)), labels)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("capacity / best without drafts")
        axes.set_title("Capacity per GPU at 90 % of every class")
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        _legend(figure, _swatches(figure.axes[0], colours))
        return figure


def ablation_figure(scenarios: Mapping[str, Entry], parts: Sequence[str], whole: str) -> Any:
    """Draw what is left of our capacity when a part is taken out. `parts`: systems without it."""
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(2.0 + 1.4 * len(scenarios), 3.0))
        width = 0.8 / max(1, len(parts))
        colours = colours_of([whole, *parts])
        for i, part in enumerate(parts):
            places, heights = [], []
            for group, entry in enumerate(scenarios.values()):
                ours, without = entry["capacity_rps"].get(whole), entry["capacity_rps"].get(part)
                if ours and without is not None:
                    places.append(group + (i - (len(parts) - 1) / 2) * width)
                    heights.append(without / ours)
            bars = axes.bar(places, heights, width, color=colours[part])
            axes.bar_label(bars, fmt="{:.2f}", fontsize=7, padding=2)
        axes.axhline(1, color=OURS, linewidth=1.5)
        axes.set_xticks(range(len(scenarios)), list(scenarios))
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(f"capacity / {whole}")
        axes.set_title("What each part is worth (1 = with everything)")
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        _legend(figure, _swatches(axes, {part: colours[part] for part in parts}))
        return figure


def burst_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, width_s: float) -> Any:
    """Draw arrivals, and the p99 of the first and of the last token's time as multiples of what is promised.

    `runs[system]`: rows with `arrival_s`, `first` and `last` (multiples, None where unknown), `accepted`. The
    solid line counts accepted requests, the dashed one everybody.
    """
    colours = colours_of(list(runs))
    with style() as pyplot:
        figure, (arrivals, first, last) = pyplot.subplots(3, 1, figsize=(9, 6.4), sharex=True, height_ratios=(1, 2, 2))
        start_s = [row["arrival_s"] for row in next(iter(runs.values()))]
        edges = np.arange(0.0, max(start_s) + width_s, width_s)
        arrivals.hist(start_s, bins=edges, color=GREY)
        arrivals.set(ylabel="requests")
        arrivals.set_title(f"Arrivals, in {width_s:g} s")
        for axes, key, title in (
            (first, "first", "Time to the first token, p99, as a multiple of what is promised"),
            (last, "last", "Time to the last token, p99, as a multiple of what is promised"),
        ):
            for system, rows in runs.items():
                for dashed in (False, True):
                    line = _moving_p99([row for row in rows if dashed or row["accepted"]], key, edges)
                    if dashed and all(row["accepted"] for row in rows):
                        continue
                    name = f"{system}, declined ones too" if dashed else system
                    axes.plot(edges[:-1] + width_s / 2, line, color=colours[system], label=name,
                              linewidth=1.0 if dashed else 2.0, linestyle=":" if dashed else "-")  # fmt: skip
            axes.axhline(1, color=INK, linewidth=1)
            axes.set(yscale="log", ylabel="multiple")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_title(title)
        last.set_xlabel("time of arrival, s")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        _legend(figure, first.get_lines()[:-1])
        return figure


def _moving_p99(rows: Sequence[Mapping[str, Any]], key: str, edges: Any) -> list[float]:
    """Return the p99 of what arrives within two bins of each bin."""
    known = [(row["arrival_s"], row[key]) for row in rows if row[key] is not None]
    times = np.array([at for at, _ in known])
    values = np.array([value for _, value in known])
    width = edges[1] - edges[0]
    line = []
    for edge in edges[:-1]:
        near = values[(times >= edge - width) & (times < edge + 2 * width)] if known else values
        line.append(float(np.percentile(near, 99)) if len(near) else math.nan)
    return line


def scaling_figure(scenarios: Mapping[str, Mapping[str, Mapping[int, float | None]]]) -> Any:
    """Draw capacity by number of replicas, relative to one. `scenarios[name][system][replicas]`: per GPU."""
    colours = colours_of(list(dict.fromkeys(system for systems in scenarios.values() for system in systems)))
    with style() as pyplot:
        size = (max(4.5, 3.4 * len(scenarios)), 3.4)
        figure, panels = pyplot.subplots(1, len(scenarios), figsize=size, squeeze=False)
        for axes, (name, systems) in zip(panels[0], scenarios.items(), strict=True):
            for system, by_count in systems.items():
                known = {count: rps for count, rps in sorted(by_count.items()) if rps}
                if 1 in known:
                    heights = [count * rps / known[1] for count, rps in known.items()]
                    axes.plot(list(known), heights, marker="o", linewidth=2, color=colours[system])
            ends = [1, max(count for by_count in systems.values() for count in by_count)]
            axes.plot(ends, ends, color=INK, linewidth=1, linestyle=":")
            axes.set(xlabel="replicas")
            axes.set_title(name)
        panels[0][0].set_ylabel("capacity / that of one")
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        _legend(figure, _swatches(figure.axes[0], colours))
        return figure


def tokens_per_step(draft_length: int, acceptance: float) -> float:
    """Return the expected tokens of one decode step that verifies a draft."""
    return sum(acceptance**i for i in range(draft_length + 1))


def feasible_figure(model: PerfModel, *, acceptance: float, tiers_s: Sequence[float] = (0.05, 0.1)) -> Any:
    """Draw time per token by batch size and draft length; what lies under a tier's line can be promised it."""
    batch = np.unique(np.geomspace(1, 256, 60).astype(np.int64))
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        shades = pyplot.get_cmap("viridis")(np.linspace(0.05, 0.85, len(DRAFTS)))
        for shade, draft in zip(shades, DRAFTS, strict=True):
            per_token_ms = [
                1e3
                * model.seconds(int(n) * (1 + draft), int(n), context_tokens=int(n) * CONTEXT_TOKENS, draft_steps=draft)
                / tokens_per_step(draft, acceptance)
                for n in batch
            ]
            axes.plot(batch, per_token_ms, color=shade, linewidth=2, label=f"draft of {draft}" if draft else "no draft")
        for tier_s in tiers_s:
            axes.axhspan(0, tier_s * 1e3, color=OURS, alpha=0.06, linewidth=0)
            axes.axhline(tier_s * 1e3, color=INK, linewidth=1, linestyle=":")
            axes.annotate(f"{tier_s * 1e3:.0f} ms", (1, tier_s * 1e3), fontsize=8, va="bottom")
        highest = max(max(line.get_ydata()) for line in axes.lines)
        axes.set(xscale="log", ylim=(0, min(2.2e3 * max(tiers_s), 1.15 * highest)), xlabel="requests decoding together")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("time per token, ms")
        axes.set_title(f"What can be promised: batch size and draft length (acceptance {acceptance:g})")
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        _legend(figure, axes.get_lines()[: len(DRAFTS)])
        return figure


def _swatches(axes: Any, colours: Mapping[str, str]) -> list[Any]:
    return [axes.plot([], [], color=colour, linewidth=4, label=name)[0] for name, colour in colours.items()]


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """Put one legend under all panels."""
    figure.legend(handles=handles, loc="lower center", ncols=min(6, len(handles)), fontsize=8)
