"""The report of `slos-serve capacity`: report.json, report.md, PNG plots and one page to click through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve import figures, pages
from slos_serve.cache import complete_file
from slos_serve.errors import MissingExtraError
from slos_serve.sim.capacity import plots
from slos_serve.sim.capacity.detail import burst_runs
from slos_serve.sim.capacity.table import (
    CLOSER_HEADS,
    OURS,
    RATIOS,
    as_text,
    closer_cells,
    is_ours,
    labels,
    number,
    with_interval,
)
from slos_serve.sim.hardware import load_hardware

if TYPE_CHECKING:
    from slos_serve.sim.capacity.study import Site, Study

BURSTY = ("coding", "mixed", "chatbot")  # the burst is shown in the first of these that was run
BURST_BINS = 60
PIXELS_PER_INCH = 104
TAB_STYLE = """
.tabs > input { position: absolute; opacity: 0; pointer-events: none; }
.tabs > label { display: inline-block; padding: .35rem .9rem; margin: 0 .3rem .5rem 0; border-radius: 99px;
  background: var(--card); cursor: pointer; font-size: .92rem; }
.tabs > input:checked + label { background: var(--ours); color: var(--page); }
.tabs > input:focus-visible + label { outline: 2px solid var(--ink); }
.tabs > .panels > div { display: none; }
nav a { margin-right: 1.1rem; color: var(--ours); text-decoration: none; } nav a:hover { text-decoration: underline; }
td.best { font-weight: 600; } details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } main { max-width: 76rem; }
"""
EXPLANATION = """
<p><b>Capacity</b> is the highest rate per GPU at which every class of the workload attains 90 % and no window's last
accepted request ends more than 20 s after its last deadline. <b>Attainment</b> counts offered requests: those that a
system declines, drops or serves late are misses. Requests longer than the context are left out before the rate is
set.</p>
<p>Every system is shown at its best settings, chosen on windows of the traces that are not reported. The same windows,
time stretched to the same rates, are offered to all; intervals come from drawing windows with replacement, the same
draws for both sides of a ratio. The opponent of a ratio is the one that did best on the reported windows. Output
lengths are hidden from every scheduler.</p>
<p>These are simulations: step times come from the hardware file named beside each table, whose figures are a paper's
own constants (<i>published</i>), fitted to measured steps (<i>measured</i>) or put together (<i>derived</i>). A result
that holds under one set of constants only is no result.</p>
"""


def write_report(document: Mapping[str, Any], study: Study, folder: Path) -> str:
    """Write everything; without matplotlib no figures, and why that is comes back."""
    write_tables(document, folder)
    drawn: dict[str, list[tuple[str, str]]] = {}
    note = ""
    try:
        for site in study.sites:
            if document["hardware"][site.name]["scenarios"]:
                drawn[site.name] = list(draw(document["hardware"], study, site, folder))
    except MissingExtraError as error:
        note = str(error)
    (folder / "report.html").write_text(page(document, drawn, note=note), encoding="utf-8")
    return note


def draw(hardware: Mapping[str, Any], study: Study, site: Site, folder: Path) -> Iterator[tuple[str, str]]:
    """Write a site's figures as PNG; yield heading and SVG of each."""
    for key, heading, figure in drawings(hardware, study, site):
        shown = sized(figure)
        figures.save(figure, folder / f"{key}-{Path(site.name).stem.replace(' ', '-')}.png")
        yield heading, shown


def write_tables(document: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.md, each at once."""
    for name, text in (("report.json", json.dumps(document, indent=2)), ("report.md", as_text(document))):
        with complete_file(folder / name) as draft:
            draft.write_text(text + "\n", encoding="utf-8")


def drawings(hardware: Mapping[str, Any], study: Study, site: Site) -> Iterator[tuple[str, str, Any]]:
    """Yield (file name, heading, figure) of one site; scaling is drawn at the first of its hardware."""
    scenarios = hardware[site.name]["scenarios"]
    systems = list(dict.fromkeys(name for entry in scenarios.values() for name in entry["capacity_rps"]))
    yield "capacity", "Capacity", plots.capacity_figure(scenarios, systems)
    yield "attainment", "Attainment by rate", plots.attainment_figure(scenarios, systems)
    parts = [name for name in systems if is_ours(name) and name != OURS]
    if OURS in systems and parts:
        yield "ablation", "What each part is worth", plots.ablation_figure(scenarios, parts, OURS)
    bursty = next((name for name in BURSTY if name in scenarios), None)
    if bursty is not None:
        runs = burst_runs(scenarios[bursty], study, site, bursty)
        if runs:
            end_s = max(row["arrival_s"] for rows in runs.values() for row in rows)
            figure = plots.burst_figure(runs, width_s=max(1.0, round(end_s / BURST_BINS)))
            yield "burst", f"Through the bursts of {bursty}, at our capacity", figure
    if site.name == site.hardware and len(study.replicas) > 1:
        counts = scaling(hardware, study, site.hardware)
        yield "scaling", "Scaling with replicas", plots.scaling_figure(counts)
    file = next(iter(scenarios.values()))["hardware"]
    figure = plots.feasible_figure(load_hardware(file).perf_model, acceptance=study.acceptance)
    yield "feasible", f"What can be promised on {Path(file).stem}", figure


def scaling(hardware: Mapping[str, Any], study: Study, name: str) -> dict[str, dict[str, dict[int, float | None]]]:
    """Return capacity per GPU by scenario, system (and its router, where there are several) and number of replicas."""
    found: dict[str, dict[str, dict[int, float | None]]] = {}
    first, *others = [site for site in study.sites if site.hardware == name]
    for site in others:
        for scenario, entry in hardware[site.name]["scenarios"].items():
            alone = hardware[first.name]["scenarios"].get(scenario, {"capacity_rps": {}})["capacity_rps"]
            for system, rps in entry["capacity_rps"].items():
                label = system if len(study.routers) == 1 else f"{system}, {site.router}"
                line = found.setdefault(scenario, {}).setdefault(label, {first.replicas: alone.get(system)})
                line[site.replicas] = rps
    return found


def page(document: Mapping[str, Any], drawn: Mapping[str, Sequence[tuple[str, str]]], *, note: str = "") -> str:
    """Return the whole page."""
    tiles = []
    fewest = min(entry["replicas"] for entry in document["hardware"].values())
    for name, entry in document["hardware"].items():
        if entry["replicas"] > fewest:
            continue
        for key, what in (("ratio", "without drafts"), ("ratio_spec", "of all")):
            mean = entry["geomean"]
            if mean[key] is not None:
                ends = mean[f"{key}_interval"]
                between = f" ({number(ends[0])} to {number(ends[1])})" if ends else ""
                what_it_is = (
                    f"times the best system {what}{between}, {Path(name).stem}, {mean['num_scenarios']} scenarios"
                )
                tiles.append((f"{mean[key]:.2f} x", what_it_is, "ours" if mean[key] > 1 else "stock"))
    panels = [
        (Path(name).stem, hardware_panel(entry, drawn.get(name, ()), group=f"scenario-{i}"))
        for i, (name, entry) in enumerate(document["hardware"].items())
        if entry["scenarios"]
    ]
    errors = document.get("errors", {})
    sections = [("Results", f"<style>{TAB_STYLE}</style>" + tabs("hardware", panels))]
    if errors:
        rows = "".join(f"<li>{pages.text(name)}: {pages.text(error)}</li>" for name, error in errors.items())
        sections.append(("Searches without an answer", f"<ul>{rows}</ul>"))
    sections.append(("What the numbers mean", EXPLANATION))
    lead = "The highest rate per GPU at which each scheduler keeps every class's promises to 90 % of its requests."
    lead = " ".join([lead, *(f"Here {pages.text(label)}." for label in labels(document))])
    return pages.page(
        title="Capacity within latency promises", lead=lead + pages.text(note and f" ({note})"), tiles=tiles,
        sections=sections,
    )  # fmt: skip


def hardware_panel(entry: Mapping[str, Any], drawn: Sequence[tuple[str, str]], *, group: str) -> str:
    """Return what is shown of one hardware."""
    scenarios = entry["scenarios"]
    parts = [("Capacity in requests per second and GPU", table(entry))]
    if drawn:
        parts.append(("Figures", tabs(f"figure-{group}", drawn)))
    parts.append(("By scenario", tabs(group, [(name, scenario_panel(one)) for name, one in scenarios.items()])))
    return "".join(f"<h3>{pages.text(heading)}</h3>{content}" for heading, content in parts)


def sized(figure: Any) -> str:
    """Return a figure as SVG no wider than it was drawn for."""
    return f'<div style="max-width: {PIXELS_PER_INCH * figure.get_figwidth():.0f}px">{pages.inline(figure)}</div>'


def table(entry: Mapping[str, Any]) -> str:
    """Return capacities and ratios as an HTML table."""
    scenarios = entry["scenarios"]
    systems = list(dict.fromkeys(name for one in scenarios.values() for name in one["capacity_rps"]))
    heads = ["", *scenarios, "geometric mean"]
    rows = []
    for system in systems:
        cells = []
        for one in scenarios.values():
            best = system in {one["best_baseline"], one["best_baseline_spec"]}
            spread = one["spread"].get(system)
            title = f' title="{number(spread[0])} to {number(spread[1])}"' if spread else ""
            mark = ' class="best"' if best else ""
            cells.append(f"<td{mark}{title}>{number(one['capacity_rps'].get(system))}</td>")
        style = ' class="ours"' if system.startswith("slos-serve") else ""
        rows.append(f"<tr><td{style}>{pages.text(system)}</td>{''.join(cells)}<td></td></tr>")
    names = {
        "ratio": "ratio to the best without drafts",
        "ratio_spec": "ratio to the best of all",
        "ratio_ar": "ours without drafts",
    }
    for key in RATIOS:
        cells = [f"<td>{with_interval(one[key], one[f'{key}_interval'])}</td>" for one in scenarios.values()]
        mean = with_interval(entry["geomean"][key], entry["geomean"][f"{key}_interval"])
        rows.append(f'<tr class="all"><td>{names[key]}</td>{"".join(cells)}<td>{mean}</td></tr>')
    return pages.table(heads, rows) + (
        '<p class="soft">Bold: the opponents of the ratios. Hover over a figure for its 95 % interval.</p>'
    )


def scenario_panel(one: Mapping[str, Any]) -> str:
    """Return settings, capacities at every target, and attainment by rate of one scenario."""
    keys = ("capacity_rps", "capacity_95_rps", "capacity_99_rps")
    rows = []
    for system, settings in one["settings"].items():
        chosen = ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"
        cells = "".join(f"<td>{number(one[key].get(system))}</td>" for key in keys)
        spread = one["spread"].get(system) or (math.nan, math.nan)
        interval = f"{number(spread[0])} to {number(spread[1])}"
        rows.append(f"<tr><td>{pages.text(system)}</td><td>{pages.text(chosen)}</td>{cells}<td>{interval}</td></tr>")
    heads = ["system", "settings", "at 90 %", "at 95 %", "at 99 %", "95 % interval"]
    text = (
        f'<p class="soft">{one["num_windows"]} windows, {one["num_requests"]} requests'
        f" ({one.get('num_dropped', 0)} more are longer than the context), {pages.text(one['hardware'])}"
    )
    share = one["share_of_clairvoyant"]
    text += f"; {share:.0%} of what a clairvoyant scheduler serves</p>" if share else "</p>"
    closer = [
        f"<tr><td>{pages.text(system)}</td>{''.join(f'<td>{text}</td>' for text in closer_cells(found))}</tr>"
        for system, found in one.get("at_capacity", {}).items()
    ]
    details = [pages.table(["at its own capacity", *CLOSER_HEADS], closer)] if closer else []
    for system, curve in one["attainment"].items():
        classes = sorted({name for row in curve for name in row["by_class"]})
        lines = [
            f"<tr><td>{number(row['rate_rps'])}/s</td>"
            + "".join(f"<td>{100 * row['by_class'].get(name, math.nan):.1f} %</td>" for name in classes)
            + f"<td>{row['kept']} of {row['promised']}</td></tr>"
            for row in curve
        ]
        inner = pages.table(["rate", *classes, "promises kept"], lines)
        details.append(f"<details><summary>{pages.text(system)}, rate by rate</summary>{inner}</details>")
    return text + pages.table(heads, rows) + "".join(details)


def tabs(group: str, panels: Sequence[tuple[str, str]]) -> str:
    """Return panels of which one is shown, chosen by clicking or with the arrow keys; `group` is their name."""
    buttons, rules = [], []
    for i, (name, _) in enumerate(panels):
        checked = " checked" if i == 0 else ""
        buttons.append(f'<input type="radio" name="{group}" id="{group}-{i}"{checked}>')
        buttons.append(f'<label for="{group}-{i}">{pages.text(name)}</label>')
        rules.append(f"#{group}-{i}:checked ~ .panels > div:nth-child({i + 1}) {{ display: block; }}")
    shown = "".join(f"<div>{content}</div>" for _, content in panels)
    return (
        f'<style>{" ".join(rules)}</style><div class="tabs">{"".join(buttons)}<div class="panels">{shown}</div></div>'
    )
