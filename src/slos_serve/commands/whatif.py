"""`slos-serve whatif`: what enforcing would have made of a recorded run, if the replay of it can be trusted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.commands.options import whole
from slos_serve.config import SloConfig, load_slo_config
from slos_serve.records.reader import read_recording
from slos_serve.sim.observed import Observed, attainment

if TYPE_CHECKING:
    from slos_serve.sim.workloads.workload import Workload

HELP = "Project enforcement onto a recorded run, where its replay matches reality."
TOLERANCE = 0.03


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `whatif`."""
    parser.epilog = (
        "The record is replayed on a virtual clock first. Where that differs from what was observed by more than\n"
        "3 points in any class, nothing is projected.\n\n"
        "example: slos-serve whatif run.jsonl --slo-config classes.yaml"
    )
    parser.add_argument("record", metavar="RECORD", type=Path, help="a file that serve --record wrote")
    parser.add_argument("--slo-config", metavar="FILE", help="latency classes to project (default: the recorded ones)")
    parser.add_argument(
        "--runs", metavar="N", type=whole(1), default=3, help="runs to average where drafts are drawn (3)"
    )
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="of the first run (0)")
    parser.add_argument(
        "--trust-planner", action="store_true", help="import the recorded planner even where it is not this package's"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Replay, compare, project; 1 where the replay does not match."""
    config = load_slo_config(args.slo_config) if args.slo_config else None
    recording = read_recording(args.record, trusts_planner=args.trust_planner)
    if recording.num_skipped:
        print(f"slos-serve whatif: {recording.warning()}", file=sys.stderr)
    observed = Observed.of(recording)
    document = what_if(observed, config, seeds=range(args.seed, args.seed + args.runs))
    document |= {"record": str(args.record), "slo_config": args.slo_config}
    print(json.dumps(document, indent=1) if args.json else as_text(document))
    if document["refused"]:
        print(f"slos-serve whatif: refused: {document['refused']}", file=sys.stderr)
    return 1 if document["refused"] else 0


def what_if(observed: Observed, config: SloConfig | None, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the comparison with reality and, where it holds, the projection."""
    seeds = seeds if observed.has_drafts else seeds[:1]  # nothing else is drawn
    replayed = _mean(observed, observed.workload(), enforced=observed.is_enforced, seeds=seeds)
    replay = {
        name: {
            "num_requests": observed.num_by_class[name],
            "observed": real,
            "replayed": replayed.get(name, 0.0),
            "difference": replayed.get(name, 0.0) - real,
        }
        for name, real in observed.attainment.items()
    }
    off = {name: entry for name, entry in replay.items() if abs(entry["difference"]) > TOLERANCE + 1e-9}
    refused = "; ".join(
        f"{name} was {100 * entry['observed']:.1f} %, its replay says {100 * entry['replayed']:.1f} % "
        f"({100 * entry['difference']:+.1f} points of {100 * TOLERANCE:.0f} allowed)"
        for name, entry in off.items()
    )
    document: dict[str, Any] = {
        "schema": "slos-serve-whatif/1",
        "mode": "enforce" if observed.is_enforced else "observe",
        "num_own_numbers": observed.own_numbers,
        "replay": replay,
        "refused": refused,
        "projection": None,
    }
    if not refused:
        workload = observed.workload(config)
        before = _mean(observed, workload, enforced=False, seeds=seeds)
        after = _mean(observed, workload, enforced=True, seeds=seeds)
        document["projection"] = {name: {"vllm": before[name], "enforced": after.get(name, 0.0)} for name in before}
    return document


def _mean(observed: Observed, workload: Workload, *, enforced: bool, seeds: Sequence[int]) -> dict[str, float]:
    runs = [attainment(observed.run(workload, enforced=enforced, seed=seed)) for seed in seeds]
    names = sorted({name for shares in runs for name in shares})
    return {name: sum(shares.get(name, 0.0) for shares in runs) / len(runs) for name in names}


def as_text(document: dict[str, Any]) -> str:
    """Return the comparison and the projection for people."""
    lines = [f"{'class':16}{'requests':>9}{'observed':>10}{'replayed':>10}{'difference':>12}"]
    for name, entry in document["replay"].items():
        shares = [f"{100 * entry[key]:.1f} %" for key in ("observed", "replayed")]
        points = f"{100 * entry['difference']:+.1f}"
        lines.append(f"{name:16}{entry['num_requests']:9}{shares[0]:>10}{shares[1]:>10}{points:>12}")
    if document["projection"] is None:
        return "\n".join(lines)
    lines += ["", f"{'projected':16}{'vLLM':>9}{'enforced':>10}"]
    for name, entry in document["projection"].items():
        shares = [f"{100 * entry[key]:.1f} %" for key in ("vllm", "enforced")]
        lines.append(f"{name:16}{shares[0]:>9}{shares[1]:>10}")
    if document["num_own_numbers"] and document["slo_config"]:
        lines.append(f"{document['num_own_numbers']} requests brought numbers of their own, which stay as they are")
    return "\n".join(lines)
