"""Figures of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core.fit import StepSample, predicted_s
from slos_serve.core.perf import TERMS, PerfModel
from slos_serve.figures import GREY, INK, OURS, STOCK, save, style

SYSTEM_COLOURS = {"slos-serve": OURS, "vllm": STOCK}
SYSTEM_NAMES = {"slos-serve": "vLLM + slos-serve", "vllm": "vLLM"}

Row = Mapping[str, Any]


def plot_fit(model: PerfModel, samples: Sequence[StepSample], path: Path) -> None:
    """Draw predicted against measured step times, in milliseconds, on logarithmic axes."""
    shapes = np.array([(*sample[: len(TERMS) - 1], 1.0) for sample in samples])
    predicted_ms = predicted_s(model, shapes) * 1e3
    measured_ms = np.array([sample.seconds for sample in samples]) * 1e3
    prefill = np.array([sample.has_prefill > 0 for sample in samples])
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(5.2, 4.6))
        for kind, colour, label in ((~prefill, OURS, "decodes only"), (prefill, STOCK, "with prefill")):
            if kind.any():
                points = predicted_ms[kind], measured_ms[kind]
                axes.scatter(*points, s=9, alpha=0.5, color=colour, linewidths=0, label=label)
        ends = [min(predicted_ms.min(), measured_ms.min()), max(predicted_ms.max(), measured_ms.max())]
        axes.plot(ends, ends, color=INK, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="predicted step time, ms", ylabel="measured step time, ms")
        axes.set_title("Performance model: predicted and measured")
        axes.legend(loc="upper left")
        save(figure, path)


def attainment_figure(systems: Mapping[str, Sequence[Row]]) -> Any:
    """Draw attainment by rate, all requests and each class, one line per system. `systems[name]`: entries."""
    classes = sorted({name for entries in systems.values() for entry in entries for name in entry["by_class"]})
    with style() as pyplot:
        columns = 1 + len(classes)
        figure, grid = pyplot.subplots(1, columns, figsize=(2.9 * columns, 2.9), sharey=True, squeeze=False)
        for axes, name in zip(grid[0], ["", *classes], strict=True):
            for system, entries in systems.items():
                points = [
                    (entry["rate_rps"], part["attainment"] * 100)
                    for entry in sorted(entries, key=lambda entry: entry["rate_rps"])
                    if (part := entry["by_class"].get(name) if name else entry) and part["attainment"] is not None
                ]
                if points:
                    colour = SYSTEM_COLOURS.get(system, GREY)
                    label = SYSTEM_NAMES.get(system, system)
                    axes.plot(*zip(*points, strict=True), marker="o", color=colour, linewidth=2, label=label)
            axes.axhline(90, color=INK, linewidth=1, linestyle=":")
            axes.set(ylim=(-3, 103), xlabel="requests per second")
            axes.set_title(name or "all requests")
        grid[0][0].set_ylabel("SLO attainment, %")
        grid[0][0].legend(loc="lower left", fontsize=8)
        figure.tight_layout()
        return figure


def timeline_figure(runs: Mapping[str, Sequence[Row]], *, start_s: float, end_s: float) -> Any:
    """Draw a burst: for each request its wait for the first token, and how late its latest token was.

    `runs[system]`: the rows of one run (see `grade.request_row`), the same requests for each system.
    """
    with style() as pyplot:
        figure, grid = pyplot.subplots(3, 1, figsize=(10, 7.4), sharex=True, height_ratios=(1, 2, 2))
        arrivals, waits, late = grid
        first = next(iter(runs.values()))
        width = max(0.25, (end_s - start_s) / 80)
        edges = [start_s + i * width for i in range(int((end_s - start_s) / width) + 2)]
        arrivals.hist([row["sent_s"] for row in first], bins=edges, color=GREY)
        arrivals.set_title("Arrivals")
        arrivals.set_ylabel("requests")
        waits.set_yscale("log")
        late.set_yscale("symlog", linthresh=1.0)
        for offset, (system, rows) in enumerate(runs.items()):
            shown = [(row["sent_s"] + offset * width / 4, row) for row in rows if start_s <= row["sent_s"] <= end_s]
            ratios = [
                (x, row["ttft_s"] / row["slo"]["ttft_s"], row["outcome"] == "declined")
                for x, row in shown
                if row["ttft_s"] and "ttft_s" in row["slo"]
            ]
            _stems(waits, ratios, system, baseline=1.0)
            lateness = [
                (x, row["lateness_s"], row["outcome"] == "declined")
                for x, row in shown
                if row["lateness_s"] is not None
            ]
            _stems(late, lateness, system, baseline=0.0)
        waits.axhline(1, color=INK, linewidth=1)
        waits.set_title("Time to first token, as a multiple of what its SLO allows (above 1: late; hollow: declined)")
        waits.set_ylabel("TTFT / allowed")
        waits.yaxis.set_major_formatter("{x:g}")
        late.axhline(0, color=INK, linewidth=1)
        late.set_title("Latest token of each request against its deadline (above 0: late)")
        late.yaxis.set_major_formatter("{x:g}")
        late.set(ylabel="seconds late", xlabel="time of arrival, s", xlim=(start_s, end_s))
        figure.tight_layout()
        handles, labels = waits.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=len(labels), fontsize=9)
        return figure


def _stems(axes: Any, points: Sequence[tuple[float, float, bool]], system: str, *, baseline: float) -> None:
    """Draw values against a baseline; hollow where the request was declined."""
    colour = SYSTEM_COLOURS.get(system, GREY)
    label: str | None = SYSTEM_NAMES.get(system, system)
    for hollow in (False, True):
        part = [(x, y) for x, y, is_declined in points if is_declined == hollow]
        if not part:
            continue
        xs, ys = zip(*part, strict=True)
        axes.vlines(xs, [min(y, baseline) for y in ys], [max(y, baseline) for y in ys], color=colour, lw=1, alpha=0.3)
        fill = {"facecolors": "none", "edgecolors": colour} if hollow else {"color": colour, "linewidths": 0}
        axes.scatter(xs, ys, s=18, label=label, zorder=3, **fill)
        label = None


def difference_figure(points: Sequence[Row]) -> Any:
    """Draw ours minus the best stock setting by rate, with its interval. Rows: rate_rps, difference, low, high."""
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(6, 3.2))
        rates = [row["rate_rps"] for row in points]
        middle = [row["difference"] * 100 for row in points]
        below = [max(0.0, (row["difference"] - row["low"]) * 100) for row in points]
        above = [max(0.0, (row["high"] - row["difference"]) * 100) for row in points]
        axes.errorbar(rates, middle, yerr=[below, above], marker="o", color=OURS, capsize=4, linewidth=2)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set(xlabel="requests per second", ylabel="points of attainment")
        axes.set_title("slos-serve minus the best vLLM setting (95 % interval)")
        figure.tight_layout()
        return figure
