"""The page of a plan: how attainment grows with replicas, on each hardware, and what the cheapest costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slos_serve import pages
from slos_serve.figures import ACCENT, GREY, INK, OURS, STOCK, style

COLOURS, MARKS = (OURS, STOCK, ACCENT, GREY), ("o", "s", "^", "D")


def page_of(document: Mapping[str, Any], text: str) -> str:
    """Return the page of a plan, `text` being what it says at a terminal."""
    best = document["best"]
    entry = document["hardware"][best or document["closest"]]
    load = entry["workload"]
    lead = f"{load['name']} at {load['rate_rps']:.2f} requests per second, {load['num_requests']} requests simulated."
    tiles = [(best or "none", "cheapest hardware that serves it" if best else "hardware serves it", "ours")]
    if best:
        tiles.append((str(entry["replicas"]), f"replicas, {entry['gpus']} GPUs", ""))
        tiles.append((f"{entry['headroom_factor']:.2f} x", "the rate that these replicas still hold", ""))
    tiles.append(
        (pages.percent(entry["attainment"]), f"of the worst class (aim {document['target_attainment']:.0%})", "")
    )
    sections = [
        ("Attainment by replicas", pages.inline(curves_figure(document))),
        ("In words", f'<pre class="scroll">{pages.text(text)}</pre>'),
    ]
    return pages.page(title="Plan", lead=pages.text(lead), tiles=tiles, sections=sections)


def curves_figure(document: Mapping[str, Any]) -> Any:
    """Draw attainment of the worst class, with its 95 % interval, by number of replicas, a line for each hardware."""
    with style() as pyplot:
        figure, axes = pyplot.subplots(figsize=(7.5, 3.6))
        for number, (name, entry) in enumerate(document["hardware"].items()):
            rows = entry["curve"]
            counts = [row["replicas"] for row in rows]
            shares = [100 * row["attainment"] for row in rows]
            below = [max(0.0, share - 100 * row["low"]) for share, row in zip(shares, rows, strict=True)]
            above = [max(0.0, 100 * row["high"] - share) for share, row in zip(shares, rows, strict=True)]
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "capsize": 3}
            axes.errorbar(counts, shares, yerr=[below, above], label=name, linewidth=2, **look)
        axes.axhline(100 * document["target_attainment"], color=INK, linewidth=1, linestyle=":")
        axes.set(xlabel="replicas", ylabel="attainment of the worst class, %", ylim=(-3, 103))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower right")
        figure.tight_layout()
        return figure
