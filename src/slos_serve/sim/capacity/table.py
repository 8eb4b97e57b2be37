"""What the searches found, as the document of `capacity --json` and as a table for people.

Ratios are of capacities at 90 %: `ratio` is ours over the best system without drafts, `ratio_spec` over
the best of all, `ratio_ar` ours without drafts over the best without. The best is chosen on the reported
windows, which favours the opponent. Intervals are bootstrap intervals over windows, the same windows
drawn for both sides; those of geometric means draw every scenario's windows on their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slos_serve.sim.capacity.runs import CLAIRVOYANT
from slos_serve.sim.capacity.search import (
    LOWEST_RPS,
    TARGETS,
    Answer,
    Curve,
    FloatArray,
    interval,
    rate_at,
    ratio_draws,
)
from slos_serve.sim.systems import find_system
from slos_serve.traces.synthetic import SYNTHETIC

OURS, OURS_AR = "slos-serve", "slos-serve-ar"
RATIOS = ("ratio", "ratio_spec", "ratio_ar")
CAPTION = (
    "Capacity in requests per second and GPU (every class attains 90 %), ratios, and 95 % intervals",
    "over windows; with fewer than three the rates that enclose a capacity.",
)
CAPACITY_KEYS = {0.90: "capacity_rps", 0.95: "capacity_95_rps", 0.99: "capacity_99_rps"}

Answers = Mapping[str, Answer]


def is_ours(name: str) -> bool:
    """Tell whether a system is ours, whole or in part."""
    return name != CLAIRVOYANT and find_system(name).makes_promises


def is_baseline(name: str) -> bool:
    """Tell whether a system is one of the opponents."""
    return name != CLAIRVOYANT and not find_system(name).makes_promises


def capacity_of(answers: Answers, name: str | None, target: float = TARGETS[0]) -> float:
    """Return a system's capacity, 0 where it is not known."""
    return (answers[name].curve.capacity(target) or 0.0) if name is not None and name in answers else 0.0


def best_of(answers: Answers, names: Sequence[str]) -> str | None:
    """Return the system with the highest capacity; None where none serves any rate."""
    best = max(names, key=lambda name: capacity_of(answers, name), default=None)
    return best if capacity_of(answers, best) > 0 else None


def draws_of(answers: Answers, ours: str, baseline: str | None) -> FloatArray | None:
    """Return draws of a ratio; None without both, or with fewer than three windows."""
    if baseline is None or ours not in answers or capacity_of(answers, ours) <= 0:
        return None
    if len(answers[ours].curve.offered) < 3:
        return None
    return ratio_draws(answers[ours].curve, answers[baseline].curve, TARGETS[0])


def opponents(answers: Answers) -> dict[str, tuple[str, str | None]]:
    """Return, for each ratio, our system and the best baseline it is compared with."""
    baselines = [name for name in answers if is_baseline(name)]
    plain = [name for name in baselines if not find_system(name).max_draft_length]
    ours = OURS if OURS in answers else OURS_AR
    best = best_of(answers, plain)
    return {"ratio": (ours, best), "ratio_spec": (ours, best_of(answers, baselines)), "ratio_ar": (OURS_AR, best)}


def scenario_entry(answers: Answers, *, hardware: str) -> dict[str, Any]:
    """Return one scenario's part of the document."""
    entry: dict[str, Any] = {"hardware": hardware}
    for target, key in CAPACITY_KEYS.items():
        entry[key] = {name: answer.curve.capacity(target) for name, answer in answers.items()}
    entry["settings"] = {name: json.loads(answer.settings) for name, answer in answers.items()}
    entry["spread"] = {name: _spread(answer.curve) for name, answer in answers.items()}
    pairs = opponents(answers)
    entry["best_baseline"], entry["best_baseline_spec"] = pairs["ratio"][1], pairs["ratio_spec"][1]
    for key, (ours, baseline) in pairs.items():
        left, right = capacity_of(answers, ours), capacity_of(answers, baseline)
        draws = draws_of(answers, ours, baseline)
        entry[key] = left / right if right > 0 and left > 0 else None
        entry[f"{key}_interval"] = None if draws is None else list(interval(draws))
    bound = capacity_of(answers, CLAIRVOYANT)
    entry["clairvoyant_rps"] = bound or None
    entry["share_of_clairvoyant"] = _share(answers, pairs["ratio"][0], bound) if bound > 0 else None
    entry["attainment"] = {name: curve_rows(answer.curve) for name, answer in answers.items()}
    entry["num_windows"] = max((len(answer.curve.offered) for answer in answers.values()), default=0)
    entry["num_requests"] = max((int(answer.curve.offered.sum()) for answer in answers.values()), default=0)
    return entry


def _share(answers: Answers, ours: str, bound_rps: float) -> float | None:
    """Return our capacity on the windows of the bound, relative to it."""
    if not capacity_of(answers, ours) > 0:
        return None
    curve, num_windows = answers[ours].curve, len(answers[CLAIRVOYANT].curve.offered)
    weights = (np.arange(len(curve.offered)) < num_windows).astype(np.float64)
    return float(curve.capacities(TARGETS[0], weights[None, :])[0]) / bound_rps


def _spread(curve: Curve) -> list[float]:
    """Return the bootstrap interval of a capacity; with fewer than three windows, the rates that enclose it."""
    if len(curve.offered) >= 3:
        return list(interval(curve.draws(TARGETS[0])))
    indices, fitted = curve.indices, curve.fitted()
    passing = int((fitted >= TARGETS[0]).sum())
    return [rate_at(indices[max(passing - 1, 0)]), rate_at(indices[min(passing, len(indices) - 1)])]


def curve_rows(curve: Curve) -> list[dict[str, Any]]:
    """Return attainment by rate, ascending."""
    return [
        {
            "rate_rps": rate_at(index),
            "attainment": curve.worst(index),
            "by_class": curve.attainment(index),
            "promised": curve.promises[index][0],
            "kept": curve.promises[index][1],
        }
        for index in curve.indices
    ]


def hardware_entry(answers: Mapping[str, Answers], hardware: Mapping[str, str]) -> dict[str, Any]:
    """Return one hardware's part of the document. `answers[scenario]`; `hardware[scenario]` is the file it ran on."""
    scenarios = {name: scenario_entry(mine, hardware=hardware[name]) for name, mine in answers.items()}
    geomean: dict[str, Any] = {}
    for key in RATIOS:
        geomean[key] = geometric_mean([entry[key] for entry in scenarios.values()])
        draws = [draws_of(mine, *opponents(mine)[key]) for mine in answers.values()]
        known = [np.random.default_rng(i).permutation(one) for i, one in enumerate(draws) if one is not None]
        complete = bool(known) and len(known) == sum(entry[key] is not None for entry in scenarios.values())
        geomean[f"{key}_interval"] = list(interval(np.exp(np.mean(np.log(known), axis=0)))) if complete else None
    geomean["num_scenarios"] = sum(entry["ratio"] is not None for entry in scenarios.values())
    return {"scenarios": scenarios, "geomean": geomean}


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean of the values that are known."""
    known = [value for value in values if value]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def labels(document: Mapping[str, Any]) -> list[str]:
    """Return, in words, what makes a table another one than the usual."""
    facts = document.get("study", {})
    known = "every system knows the true output lengths" if facts.get("known_lengths") else ""
    scale = facts.get("slo_scale", 1.0)
    scaled = f"every promise times {scale:g}" if scale != 1 else ""
    in_turn = "each step planned when the one before has ended" if facts.get("async_lag") is False else ""
    ahead = "each step planned while the one before runs, on all hardware" if facts.get("async_lag") else ""
    quick = f"a quick look: {facts['num_windows']} short windows, few settings" if facts.get("is_quick") else ""
    reused = f"runs of {', '.join(facts['reuse'])} kept from earlier code" if facts.get("reuse") else ""
    made_up = SYNTHETIC if facts.get("data") == SYNTHETIC else ""
    return [text for text in (known, scaled, in_turn, ahead, quick, made_up, reused) if text]


def as_text(document: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [f"({'; '.join(labels(document))})", ""] if labels(document) else []
    for name, hardware in document["hardware"].items():
        scenarios = hardware["scenarios"]
        systems = list(dict.fromkeys(system for entry in scenarios.values() for system in entry["capacity_rps"]))
        heads = ["scenario", *systems, "ratio", "to the best with drafts", "without drafts"]
        lines += [f"### {name}", "", *CAPTION, "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for scenario, entry in scenarios.items():
            cells = [_capacity(entry["capacity_rps"].get(system), entry["spread"].get(system)) for system in systems]
            cells += [with_interval(entry[key], entry[f"{key}_interval"]) for key in RATIOS]
            lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
            for target, key in list(CAPACITY_KEYS.items())[1:]:  # where the rates that were run tell them
                if any(entry[key].get(system) is not None for system in systems):
                    higher = [number(entry[key].get(system)) for system in systems] + [""] * len(RATIOS)
                    lines.append(f"| {scenario} at {100 * target:.0f} % | " + " | ".join(higher) + " |")
        mean = hardware["geomean"]
        cells = [""] * len(systems) + [with_interval(mean[key], mean[f"{key}_interval"]) for key in RATIOS]
        lines += ["| geometric mean | " + " | ".join(cells) + " |", "", *closer_look(scenarios)]
    lines += [f"{name}: no answer, {error}" for name, error in document.get("errors", {}).items()]
    return "\n".join(lines).rstrip()


CLOSER_HEADS = ("rate", "met, by quarter of prompt length", "promises kept", "declined", "their TTFT, p99")


def closer_look(scenarios: Mapping[str, Any]) -> list[str]:
    """Return what became of the requests at capacity as Markdown, nothing where nobody looked."""
    heads = ("at capacity", "system", *CLOSER_HEADS)
    rows = [
        (scenario, system, *closer_cells(found))
        for scenario, entry in scenarios.items()
        for system, found in entry.get("at_capacity", {}).items()
    ]
    table = [heads, ("---",) * len(heads), *rows] if rows else []
    return ["| " + " | ".join(cells) + " |" for cells in table] + [""] * bool(rows)


def closer_cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what became of one system's requests at its capacity, a text for each of `CLOSER_HEADS`."""
    shares = ", ".join("-" if share is None else f"{100 * share:.0f}" for share in found["attainment_by_prompt"])
    late = found["declined_ttft_p99"]
    return (
        f"{found['rate_rps']:.3g}",
        f"{shares} %",
        f"{found['kept']} of {found['promised']}" if found["promised"] else "-",
        f"{100 * found['declined'] / found['num_requests']:.1f} %",
        "-" if late is None else f"{late:.3g} x",
    )


def _capacity(rate_rps: float | None, spread: Sequence[float] | None) -> str:
    """Return a capacity and its interval; where no rate passes, the lowest that was tried."""
    return f"< {LOWEST_RPS:g}" if rate_rps == 0.0 else with_interval(rate_rps, spread)


def number(value: float | None) -> str:
    """Return a figure with three digits, a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:.3g}" if 0 < value < 1 else f"{value:.2f}"


def with_interval(value: float | None, ends: Sequence[float] | None) -> str:
    """Return a figure and its interval."""
    if value is None or ends is None:
        return number(value)
    return f"{number(value)} [{number(ends[0])}, {number(ends[1])}]"
