"""Runs at capacity, looked at request by request: who misses, what the declined wait for, and the bursts.

A count of requests met would favour a scheduler that gives up the long ones. So each scenario's own
capacity is run again for our system and the opponents of its ratios, and attainment is told by quartile
of prompt length, beside the share that was promised, the share that was declined and how late those came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.sim.capacity.runs import Cell, deploy, offered, simulate
from slos_serve.sim.capacity.search import index_of, rate_at
from slos_serve.sim.capacity.table import OURS, OURS_AR
from slos_serve.sim.hardware import load_hardware

if TYPE_CHECKING:
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.core.types import Slo
    from slos_serve.sim.capacity.study import Site, Study

MAX_WINDOWS = 3
QUARTILES = (25, 50, 75)

Entry = Mapping[str, Any]
Graded = list[tuple["GradedRequest", "Slo | None"]]


def compared(entry: Entry) -> list[str]:
    """Return our system, the whole one first, and the opponents of the ratios, as far as they were run."""
    ours = [name for name in (OURS, OURS_AR) if entry["capacity_rps"].get(name)]
    names = [*ours[:1], entry["best_baseline"], entry["best_baseline_spec"]]
    return [name for name in dict.fromkeys(names) if name is not None]


def near(rate_rps: float) -> float:
    """Return the rate of the search's grid next to `rate_rps`."""
    return rate_at(index_of(rate_rps))


def graded(cell: Cell) -> Graded:
    """Run a cell; return its requests by arrival, with their promises; None for rounds that waited for others."""
    hardware = load_hardware(cell.hardware)
    workload = offered(cell, hardware, deploy(cell)[1].num_replicas)
    # requests of one class and length that come together are promised the same
    requests = [sim.request for sim in workload.arrivals]
    slos = {(one.arrival_s, one.slo_class, one.num_prompt_tokens): one.slo for one in requests}
    grades = sorted(simulate(cell).graded, key=lambda grade: grade.arrival_s)
    return [
        (grade, slos.get((grade.arrival_s, grade.slo_class, grade.num_prompt_tokens)))
        for grade in grades
        if grade.outcome not in {"none", "cancelled"}
    ]


def look_closer(document: Mapping[str, Any], study: Study) -> None:
    """Add `num_dropped` to every scenario, and `at_capacity` at the sites with the fewest replicas."""
    for site in study.sites:
        for scenario, entry in document["hardware"][site.name]["scenarios"].items():
            entry["num_dropped"] = num_dropped(study, site, scenario)
            if site.replicas == study.replicas[0]:
                entry["at_capacity"] = at_capacity(entry, study, site, scenario)


def num_dropped(study: Study, site: Site, scenario: str) -> int:
    """Return how many requests of the reporting windows were longer than the context, and so not offered."""
    cell = study.cell(site, scenario, study.systems[0])
    hardware = load_hardware(cell.hardware)
    windows = range(study.effort.num_windows)
    return sum(offered(replace(cell, window=window), hardware, site.replicas).num_dropped for window in windows)


def at_capacity(entry: Entry, study: Study, site: Site, scenario: str) -> dict[str, dict[str, Any]]:
    """Return, for each system that is compared, what became of the requests at its own capacity."""
    found = {}
    for system in compared(entry):
        settings, rate_rps = json.dumps(entry["settings"][system]), near(entry["capacity_rps"][system])
        first = study.cell(site, scenario, system, settings=settings, rate_rps=rate_rps)
        windows = range(min(MAX_WINDOWS, study.effort.num_windows))
        rows = [row for window in windows for row in graded(replace(first, window=window))]
        if rows:
            found[system] = {"rate_rps": first.rate_rps, **summary(rows)}
    return found


def summary(rows: Graded) -> dict[str, Any]:
    """Return attainment by quartile of prompt length, shares promised and declined, and the p99 of the declined.

    Quartiles are of the prompts in `rows`; the p99 is of the time to the first token as a multiple of what
    its class promises, None where nobody was declined.
    """
    prompts = np.array([grade.num_prompt_tokens for grade, _ in rows])
    ends = np.percentile(prompts, QUARTILES)
    quarter = np.searchsorted(ends, prompts, side="left")
    met = np.array([grade.outcome == "met" for grade, _ in rows])
    declined = [
        multiple for grade, slo in rows if grade.outcome == "declined" and (multiple := first_share(grade, slo))
    ]
    promised = [grade for grade, _ in rows if grade.promised]
    return {
        "num_requests": len(rows),
        "prompt_tokens": ends.tolist(),
        "attainment_by_prompt": [float(met[quarter == i].mean()) if (quarter == i).any() else None for i in range(4)],
        "promised": len(promised),
        "kept": sum(grade.outcome == "met" for grade in promised),
        "declined": sum(grade.outcome == "declined" for grade, _ in rows),
        "declined_ttft_p99": float(np.percentile(declined, 99)) if declined else None,
    }


def first_share(grade: GradedRequest, slo: Slo | None) -> float | None:
    """Return the time to the first token as a multiple of what is promised."""
    return grade.ttft_s / slo.ttft_s if slo is not None and grade.ttft_s and slo.ttft_s else None


def last_share(grade: GradedRequest) -> float | None:
    """Return the time to the last token as a multiple of what is promised."""
    if grade.finish_s is None or grade.last_due_s is None or not math.isfinite(grade.last_due_s):
        return None
    return (grade.finish_s - grade.arrival_s) / (grade.last_due_s - grade.arrival_s)


def burst_runs(entry: Entry, study: Study, site: Site, scenario: str) -> dict[str, list[dict[str, Any]]]:
    """Run what is compared on the whole first window, all at our capacity; return rows for the burst figure.

    A system that needs several GPUs is offered the same requests so many times faster: its time is stretched to
    that of the others, and its name says so.
    """
    names = compared(entry)
    rate_rps = entry["capacity_rps"][names[0]] if names and names[0] in {OURS, OURS_AR} else None
    if not rate_rps:
        return {}
    runs = {}
    for name in names:
        settings = json.dumps(entry["settings"][name])
        cell = study.cell(site, scenario, name, settings=settings, rate_rps=near(rate_rps), max_requests=None)
        pace = deploy(cell)[1].num_replicas / site.replicas
        label = name if pace == 1 else f"{name} ({pace:g} times the GPUs and rate, time stretched)"
        runs[label] = list(burst_rows(graded(cell), pace))
    return runs


def burst_rows(rows: Graded, pace: float) -> Iterator[dict[str, Any]]:
    """Yield each request's times as multiples of its promises; arrivals at 1 / `pace` of the rate they came at."""
    for grade, slo in rows:
        yield {
            "arrival_s": pace * grade.arrival_s,
            "first": first_share(grade, slo),
            "last": last_share(grade),
            "accepted": grade.outcome != "declined",
        }
