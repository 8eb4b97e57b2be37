"""`slos-serve compare`: what `plan` foretold beside what `bench` measured, class by class."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slos_serve.errors import ConfigError

HELP = "Lay a plan beside a measured deployment, class by class."
SAME_RATE, SAME_SHARE = 0.05, 0.05  # a rate or a mix that differs by more is said


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.epilog = (
        "example:\n"
        "  slos-serve plan --trace mine.csv --rate 4 --json > plan.json\n"
        "  slos-serve bench --target URL --trace mine.csv --rate 4 --out results\n"
        "  slos-serve compare plan.json results"
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="what plan --json printed")
    parser.add_argument(
        "bench", metavar="BENCH", type=Path, help="a folder of bench --out, or what bench --json printed"
    )
    parser.add_argument("--hardware", metavar="NAME", help="of the plan's (default: its best)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 where the deployment misses what the plan aims at."""
    plan, measured = _plan(args.plan, args.hardware), _measured(args.bench)
    document = compare(plan, measured)
    print(json.dumps(document, indent=2) if args.json else as_text(document))
    return 0 if document["holds"] else 1


def _read(path: Path, key: str, expected: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            where="arguments", key=key, value=str(path), expected=f"{expected} ({error.strerror})"
        ) from None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ConfigError(where="arguments", key=key, value=str(path), expected=f"{expected}, one JSON document")
    return document


def _plan(path: Path, hardware: str | None) -> dict[str, Any]:
    expected = "what slos-serve plan --json printed"
    document = _read(path, "PLAN", expected)
    if not isinstance(document.get("hardware"), dict) or "target_attainment" not in document:
        raise ConfigError(where="arguments", key="PLAN", value=str(path), expected=expected)
    name = hardware or document.get("best") or next(iter(document["hardware"]), None)
    if name not in document["hardware"]:
        expected = f"one of {', '.join(document['hardware'])}"
        raise ConfigError(where="arguments", key="--hardware", value=name, expected=expected)
    entry = document["hardware"][name]
    return {**entry, "hardware": name, **{key: document.get(key) for key in ("target_attainment", "system")}}


def _measured(path: Path) -> dict[str, Any]:
    expected = "a folder that bench --out wrote, or what bench --json printed"
    document = _read(path / "results.json" if path.is_dir() else path, "BENCH", expected)
    systems = document.get("systems")
    entries = [one for every in systems.values() for one in every] if isinstance(systems, dict) else []
    if len(entries) != 1 or "by_class" not in entries[0]:
        raise ConfigError(
            where="arguments", key="BENCH", value=str(path), expected=f"{expected}: one run of one system"
        )
    return {**entries[0], "target": document.get("target"), "device": document.get("device")}


def compare(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison: attainment by class, foretold and measured, and what makes the two differ in kind."""
    foretold: Mapping[str, float] = plan.get("attainment_by_class") or {}
    counts = plan["workload"]["by_class"]
    classes = {
        name: {
            "planned": foretold.get(name),
            "measured": (measured["by_class"].get(name) or {}).get("attainment"),
            "num_requests": (measured["by_class"].get(name) or {}).get("num_requests", 0),
        }
        for name in sorted({*foretold, *counts, *measured["by_class"]})
    }
    known = [one["measured"] for one in classes.values() if one["measured"] is not None]
    worst = min(known, default=None)
    return {
        "hardware": plan["hardware"],
        "replicas": plan["replicas"],
        "target_attainment": plan["target_attainment"],
        "target": measured["target"],
        "planned": plan["attainment"],
        "planned_interval": plan.get("attainment_interval"),
        "measured": worst,
        "rate_rps": {"planned": plan["workload"]["rate_rps"], "measured": measured["rate_rps"]},
        "classes": classes,
        "notes": list(_notes(plan, measured)),
        "holds": worst is not None and worst >= plan["target_attainment"],
    }


def _notes(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> Any:
    planned_rps, rate_rps = plan["workload"]["rate_rps"], measured["rate_rps"]
    if abs(rate_rps / planned_rps - 1) > SAME_RATE:
        yield f"the rate differs: planned for {planned_rps:.2f}/s, offered {rate_rps:.2f}/s"
    counts, served = plan["workload"]["by_class"], measured["by_class"]
    total, offered = sum(counts.values()), sum(one["num_requests"] for one in served.values())
    for name in sorted({*counts, *served}):
        before = counts.get(name, 0) / max(1, total)
        after = (served.get(name) or {"num_requests": 0})["num_requests"] / max(1, offered)
        if abs(before - after) > SAME_SHARE:
            yield f"the mix differs: {name} is {before:.0%} of the plan, {after:.0%} of what was offered"
    if not str(plan["system"]).startswith(str(measured["system"])):
        yield f"the system differs: planned {plan['system']}, measured {measured['system']}"
    if measured.get("device"):
        yield f"an emulated device was measured ({measured['device']}), no GPU"


def as_text(document: Mapping[str, Any]) -> str:
    """Return the comparison for people, in 80 columns."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    rates, count = document["rate_rps"], document["replicas"]
    sized = "no number of replicas" if count is None else f"{count} replica{'' if count == 1 else 's'}"
    lines = [
        f"planned: {sized} of {document['hardware']} at {rates['planned']:.2f} requests/s",
        f"measured: {document['target']} at {rates['measured']:.2f} requests/s",
        f"{'class':20}{'requests':>10}{'planned':>12}{'measured':>12}{'difference':>12}",
    ]
    for name, one in document["classes"].items():
        both = one["planned"] is not None and one["measured"] is not None
        gap = f"{100 * (one['measured'] - one['planned']):+.1f}" if both else "-"
        lines.append(
            f"{name[:19]:20}{one['num_requests']:>10}{share(one['planned']):>12}{share(one['measured']):>12}{gap:>12}"
        )
    lines += [f"note: {note}" for note in document["notes"]]
    verb = "holds" if document["holds"] else "misses"
    worst, target = share(document["measured"]), share(document["target_attainment"])
    interval = document["planned_interval"]
    likely = f", {share(interval[0])} to {share(interval[1])}" if interval else ""
    lines.append(f"the deployment {verb} {target}: its worst class attains {worst}")
    lines.append(f"(the plan said {share(document['planned'])}{likely})")
    return "\n".join(lines)
