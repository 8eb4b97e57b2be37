"""`slos-serve replay`: plan recorded inputs again, and say what the engine made of the plans."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from slos_serve.errors import ConfigError
from slos_serve.records.reader import Recording, read_recording
from slos_serve.records.replay import replay

HELP = "Plan a record's inputs again, and compare plans with what the engine ran."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `replay`."""
    parser.epilog = "example: slos-serve serve MODEL --record run.jsonl, some traffic, then slos-serve replay run.jsonl"
    parser.add_argument("record", metavar="RECORD", type=Path, help="a file that serve --record wrote")
    parser.add_argument(
        "--trust-planner", action="store_true", help="import the recorded planner even where it is not this package's"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 where a plan differs."""
    recording = read_recording(args.record, trusts_planner=args.trust_planner)
    if recording.num_skipped:
        print(f"slos-serve replay: {recording.warning()}", file=sys.stderr)
    if not recording.plans:
        expected = "at least one plan (are there requests with an SLO in it?)"
        raise ConfigError(where=str(args.record), key="plan", value="none", expected=expected)
    result = replay(recording)
    document = {"record": str(args.record), "vllm": recording.engine.get("vllm"), **result.to_json()}
    print(json.dumps(document, indent=1) if args.json else as_text(recording, document))
    return 0 if result.num_same == result.num_plans else 1


def as_text(recording: Recording, document: dict[str, Any]) -> str:
    """Return the comparison for people."""
    lines = [f"{document['num_same']} of {document['num_plans']} recorded plans come out the same, byte by byte"]
    lines += [f"  differs: {text}" for text in document["differing"][:10]]
    if document["num_steered"]:
        lines.append(
            f"{document['num_exact']} of {document['num_steered']} steered steps ran exactly as planned "
            f"({100 * document['share_exact']:.2f} %)"
        )
        lines += [f"  {count} x {what}" for what, count in sorted(document["divergences"].items())]
    else:
        lines.append(f"no plan was carried out: the engine ran in mode {recording.engine.get('mode')}")
    return "\n".join(lines)
