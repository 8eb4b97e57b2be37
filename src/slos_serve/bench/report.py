"""What a comparison found, for a terminal and as one self-contained page.

The page holds its figures as SVG that takes its ink from the page, so that it reads in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slos_serve.bench import plots
from slos_serve.pages import inline, percent, table, text

Entry = Mapping[str, Any]
Document = Mapping[str, Any]

NAMES = plots.SYSTEM_NAMES

EXPLANATION = """
<p><b>SLO attainment</b> is the share of offered requests whose every promise held: the first token by its deadline, and
tokens 10, 20, … and the last no later than the promised pace allows, counted from the moment the request was sent to
the moment its bytes came back. Requests that a server refuses, fails or demotes count as misses.</p>
<p><b>Promised</b> requests are those that slos-serve said it would serve in time, and <b>kept</b> are those that then
were. A request that it cannot promise is <b>declined</b>: the client is told, and it is served with what is left over.
It counts as a miss even where it happened to be in time, and it may wait longer than with plain vLLM, which delays
everybody a little instead. Plain vLLM promises nothing.</p>
<p>Both sides served the same requests, with the same lengths, at the same moments, whatever was still running; they
ran one at a time on this machine. The promises are fixed multiples of what the idle engine needs, measured once,
before any load.</p>
"""


def entry_at(entries: Sequence[Entry], rate_rps: float) -> Entry | None:
    """Return the entry at a rate."""
    return next((entry for entry in entries if math.isclose(entry["rate_rps"], rate_rps)), None)


def rates_of(systems: Mapping[str, Sequence[Entry]]) -> list[float]:
    """Return every rate, ascending."""
    return sorted({entry["rate_rps"] for entries in systems.values() for entry in entries})


def comparison_rows(systems: Mapping[str, Sequence[Entry]], rate_rps: float) -> list[dict[str, Any]]:
    """Return one row per class (and "all" first): offered, and each system's part of the entry."""
    entries = {name: entry_at(rows, rate_rps) for name, rows in systems.items()}
    present = {name: entry for name, entry in entries.items() if entry is not None}
    classes = sorted({name for entry in present.values() for name in entry["by_class"]})
    rows = []
    for name in ("", *classes):
        parts = {system: (entry if not name else entry["by_class"].get(name)) for system, entry in present.items()}
        known = [part for part in parts.values() if part is not None]
        rows.append({"name": name or "all", "offered": known[0]["num_requests"], "parts": parts})
    return rows


def text_table(systems: Mapping[str, Sequence[Entry]], *, labels: Mapping[str, str] | None = None) -> str:
    """Return the comparison as a table for a terminal: attainment by class and rate, and promises kept."""
    names = {**NAMES, **(labels or {})}
    width = max(len(names.get(name, name)) for name in systems) + 2
    promising = [name for name in systems if any(entry["promised"] for entry in systems[name])]
    lines = []
    for rate in rates_of(systems):
        lines.append(f"{rate:.2f} requests per second")
        header = f"  {'class':<15}{'offered':>8}" + "".join(f"{names.get(name, name):>{width}}" for name in systems)
        lines.append(header + ("   promises kept" if promising else ""))
        for row in comparison_rows(systems, rate):
            cells = "".join(
                f"{percent(part['attainment'] if (part := row['parts'].get(name)) else None):>{width}}"
                for name in systems
            )
            kept = [f"{part['kept']} of {part['promised']}" for name in promising if (part := row["parts"].get(name))]
            lines.append(f"  {row['name']:<15}{row['offered']:>8}{cells}" + "".join(f"{text:>16}" for text in kept))
        lines.append("")
    return "\n".join(lines).rstrip()


def html_table(systems: Mapping[str, Sequence[Entry]]) -> str:
    """Return the comparison as an HTML table."""
    promising = [name for name in systems if any(entry["promised"] for entry in systems[name])]
    heads = ["class", "offered", *(NAMES.get(name, name) for name in systems)]
    heads += [title for _ in promising for title in ("promised", "kept", "declined")]
    body = []
    for rate in rates_of(systems):
        body.append(f'<tr class="rate"><td colspan="{len(heads)}">{rate:.2f} requests per second</td></tr>')
        for row in comparison_rows(systems, rate):
            cells = [f"<td>{text(row['name'])}</td><td>{row['offered']}</td>"]
            for name in systems:
                part = row["parts"].get(name)
                style = ' class="ours"' if name == "slos-serve" else ""
                cells.append(f"<td{style}>{percent(part['attainment'] if part else None)}</td>")
            for name in promising:
                part = row["parts"].get(name) or {}
                cells += [f"<td>{part.get(key, '–')}</td>" for key in ("promised", "kept", "declined")]
            body.append(f'<tr class="{"all" if row["name"] == "all" else ""}">{"".join(cells)}</tr>')
    return table(heads, body)


def latency_table(systems: Mapping[str, Sequence[Entry]]) -> str:
    """Return time to first token and time per token, median and 99 %, by rate and system."""
    rows = []
    for rate in rates_of(systems):
        for name, entries in systems.items():
            entry = entry_at(entries, rate)
            if entry is None:
                continue
            cells = [_seconds(entry[key][rank]) for key in ("ttft_s", "tpot_s") for rank in ("p50", "p99")]
            numbers = "".join(f"<td>{cell}</td>" for cell in cells)
            goodput = f"<td>{entry['goodput_rps']:.2f}</td>"
            rows.append(f"<tr><td>{rate:.2f}/s, {text(NAMES.get(name, name))}</td>{numbers}{goodput}</tr>")
    return table(("", "TTFT p50", "p99", "per token p50", "p99", "met per second"), rows)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1e3:.0f} ms" if value < 10 else f"{value:.1f} s"


def comparison_sections(
    systems: Mapping[str, Sequence[Entry]], *, timeline: Mapping[str, Sequence[Mapping[str, Any]]] | None, rate: str
) -> list[tuple[str, str]]:
    """Return the sections that every comparison has. `timeline[system]`: the requests of one run at `rate`."""
    sections = [
        ("Attainment by class", html_table(systems)),
        ("Attainment by rate", inline(plots.attainment_figure(systems))),
    ]
    if timeline:
        start_s, end_s = 0.0, max(row["sent_s"] for rows in timeline.values() for row in rows) + 0.5
        figure = plots.timeline_figure(timeline, start_s=start_s, end_s=end_s)
        sections.append((f"Through the bursts, at {rate}", inline(figure)))
    sections += [("Latency", latency_table(systems)), ("What the numbers mean", EXPLANATION)]
    return sections
