"""`slos-serve data`: public traces, fetched, checked and converted."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from slos_serve.errors import ConfigError
from slos_serve.terminal.progress import Bar
from slos_serve.traces.datasets import DATASETS, Dataset, fetch, find_dataset

HELP = "Fetch public traces, with checksum and licence."
SCENARIOS = "they carry the scenarios chatbot, coding, summarization and mixed"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data`."""
    parser.epilog = f"example: slos-serve data fetch all --to data   ({SCENARIOS})"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = actions.add_parser("fetch", help="download a trace, check it, convert it", allow_abbrev=False)
    one.add_argument("name", metavar="NAME", help=f"one of {', '.join(DATASETS)}, or all")
    one.add_argument("--to", metavar="DIR", type=Path, default=Path("data"), help="data folder (data)")
    one.add_argument("--from", metavar="FILE", type=Path, dest="local", help="convert this copy, download nothing")
    every = actions.add_parser("list", help="say what there is", allow_abbrev=False)
    for sub in (one, every):
        sub.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """List or fetch."""
    if args.action == "list":
        _show([describe(dataset) for dataset in DATASETS.values()], as_json=args.json)
        return 0
    datasets = list(DATASETS.values()) if args.name == "all" else [find_dataset(args.name)]
    if args.local is not None and len(datasets) > 1:
        raise ConfigError(where="data", key="name", value=args.name, expected="one name, with --from")
    if args.local is not None and not args.local.is_file():
        raise ConfigError(where="data", key="from", value=str(args.local), expected="a file")
    done = []
    for dataset in datasets:
        print(as_text(describe(dataset)), file=sys.stderr)
        with Bar(dataset.name, 1, counted="bytes") as bar:
            path = fetch(
                dataset, args.to, local=args.local, progress=lambda now, _, bar=bar: bar(0, now)  # type: ignore[misc]
            )  # fmt: skip
        done.append({**describe(dataset), "file": str(path)})
    _show(done, as_json=args.json)
    return 0


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return what a user should know before fetching."""
    return {
        "name": dataset.name,
        "url": dataset.url,
        "licence": dataset.licence,
        "cite": dataset.cite,
        "num_requests": dataset.num_requests,
        "checksum": f"sha256 of arrivals and lengths {dataset.digest}",
    }


def as_text(entry: dict[str, Any]) -> str:
    """Return a description for people."""
    if "file" in entry:
        return f"{entry['name']}: {entry['num_requests']} requests, checked, in {entry['file']}"
    return "\n  ".join([entry["name"], *(f"{key}: {entry[key]}" for key in ("url", "licence", "cite", "checksum"))])


def _show(entries: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        json.dump({"datasets": entries}, sys.stdout, indent=2)
        print()
    else:
        print("\n".join(as_text(entry) for entry in entries))
