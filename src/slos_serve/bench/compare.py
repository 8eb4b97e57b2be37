"""Runs to compare: one engine, one rate, one seed each, saved as it ends.

A *setting* is a system with its token budget. vLLM is given several settings and the best one of them at
each rate is the opponent. Every run offers the same requests to every setting.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slos_serve.bench.client import BenchRequest, StreamResult, offer
from slos_serve.bench.grade import entry, grade_run, request_row
from slos_serve.bench.profiling import warm_up
from slos_serve.bench.scaled import Scaled
from slos_serve.cache import write_json

OURS, STOCK = "slos-serve", "vllm"
WARM_UP_SEED = 1_000_003

Run = dict[str, Any]


def setting_name(system: str, budget: int) -> str:
    """Return the name of a setting, for files and tables."""
    return f"{system}-{budget}"


def warm(url: str, model: str, scaled: Scaled, *, shapes_s: float) -> None:
    """Show an engine every kind of step and every class's lengths, so that nothing is seen first under load.

    The same for every setting; none of the requests is offered again later.
    """
    asyncio.run(warm_up(url, model, budget_s=shapes_s))
    requests = scaled.requests(rate_rps=6.0, duration_s=4.0, seed=WARM_UP_SEED)
    asyncio.run(offer(url, model, requests))


def run_once(
    url: str,
    model: str,
    scaled: Scaled,
    *,
    system: str,
    budget: int,
    rate_rps: float,
    duration_s: float,
    seed: int,
    on_result: Callable[[StreamResult], None] | None = None,
) -> Run:
    """Offer one workload to one engine; return its graded entry and its requests."""
    requests = scaled.requests(rate_rps=rate_rps, duration_s=duration_s, seed=seed)
    results = asyncio.run(offer(url, model, requests, on_result=on_result))
    return graded_run(
        requests, results, system=system, budget=budget, rate_rps=rate_rps, duration_s=duration_s, seed=seed
    )


def graded_run(
    requests: Sequence[BenchRequest],
    results: Sequence[StreamResult],
    *,
    system: str,
    budget: int,
    rate_rps: float,
    duration_s: float,
    seed: int,
    setting: str = "",
    scenario: str = "mixed",
) -> Run:
    """Return the run of what came back; `setting` names it where system and budget do not."""
    streams = grade_run(requests, results)
    graded = entry(streams, system=system, scenario=scenario, span_s=duration_s, rate_rps=rate_rps)
    rows = [request_row(stream) for stream in streams]
    return {
        "schema": "slos-serve-run/1",
        "setting": setting or setting_name(system, budget),
        "system": system,
        "budget": budget,
        "rate_rps": rate_rps,
        "duration_s": duration_s,
        "seed": seed,
        "entry": graded,
        "max_lag_s": max(row["lag_s"] for row in rows),
        "errors": sorted({row["error"] for row in rows if row["error"]}),
        "requests": rows,
    }


def best_setting(runs: Iterable[Run]) -> str:
    """Return the setting with the highest mean attainment; more goodput, then the name, decide ties."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        score = (run["entry"]["attainment"] or 0.0, run["entry"]["goodput_rps"])
        scores.setdefault(run["setting"], []).append(score)
    if not scores:
        raise ValueError("no runs: expected at least one to choose the best setting from")
    means = {name: tuple(sum(part) / len(part) for part in zip(*rows, strict=True)) for name, rows in scores.items()}
    return max(sorted(means), key=lambda name: means[name])


def save_run(run: Run, folder: Path) -> Path:
    """Write a run under a name that says what it was."""
    path = folder / run_file(run["setting"], run["rate_rps"], run["seed"])
    write_json(run, path)
    return path


def run_file(setting: str, rate_rps: float, seed: int) -> str:
    """Return the file name of a run."""
    return f"{setting}-rate{rate_rps:.3f}-seed{seed}.json"


def load_run(path: Path) -> Run | None:
    """Return a saved run, None where there is none that can be read."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(run) if isinstance(run, Mapping) and run.get("schema") == "slos-serve-run/1" else None


def pooled(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Return counts over several runs, by class and "" for all: requests, met, promised, kept."""
    counts: dict[str, dict[str, int]] = {}
    for run in runs:
        parts = {"": run["entry"], **run["entry"]["by_class"]}
        for name, part in parts.items():
            into = counts.setdefault(name, dict.fromkeys(("offered", "met", "promised", "kept"), 0))
            into["offered"] += part["num_requests"] - part["cancelled"]
            for key in ("met", "promised", "kept"):
                into[key] += part[key]
    return counts
