"""`slos-serve show`: the live page of a run that is over, as one HTML file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slos_serve.commands import shown
from slos_serve.errors import SlosServeError
from slos_serve.http.live import holding
from slos_serve.terminal.progress import Bar

HELP = "Make the live page of a run that is over: a record, or what bench and simulate wrote."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `show`."""
    parser.epilog = (
        "examples:\n"
        "  slos-serve show run.jsonl                # of serve --record\n"
        "  slos-serve show results --out page.html  # of bench --out, simulate --out"
    )
    parser.add_argument("file", metavar="FILE|DIR", type=Path, help="a record, a folder of --out, or a --json document")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page to write (default: NAME.html, here)")
    parser.add_argument(
        "--explain",
        metavar="N",
        type=int,
        default=10,
        help="plan the moments of the last N requests in trouble again (10)",
    )
    parser.add_argument("--json", action="store_true", help="print what the page would show as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    with Bar("explaining", max(1, args.explain), counted="requests") as bar:
        document = shown.read(args.file, num_explained=max(0, args.explain), on_progress=lambda done: bar(done, done))
    if args.json:
        print(json.dumps(document))
        return 0
    out = args.out or Path(f"{args.file.resolve().stem}.html")
    try:
        out.write_text(holding(document), encoding="utf-8")
    except OSError as error:
        raise SlosServeError(f"{out} cannot be written: {error.strerror}") from None
    print(f"{out}: {len(document['requests'])} requests, {document['said']}")
    return 0
