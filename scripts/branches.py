"""Which branches of the decision core and of the HTTP edge their own tests take.

    python scripts/branches.py                   # both rooms: an hour on one core, most of it core's
    python scripts/branches.py --rooms http      # three minutes
    python scripts/branches.py --missing         # each module's lines and branches that no test takes, too

Compiled functions run as Python (`NUMBA_DISABLE_JIT`), or nobody would see their branches, and are so much slower that
each property is tried with a few examples only. Ends with a Markdown table; exit status 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "http")
NOT_HERE = "not engine and not abuse"  # they start servers in other processes, which nothing here sees
HYPOTHESIS = "_hypothesis_internal_use_settings"  # where Hypothesis keeps the settings of a test


class FewExamples:
    """A pytest plug-in: at most so many examples of each property, however many it asks for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Change the settings of the properties among the tests."""
        from hypothesis import settings  # noqa: PLC0415 - pytest is to import it first

        for item in items:
            known = getattr(item.obj, HYPOTHESIS, None)
            if known is not None:
                few = settings(known, max_examples=min(known.max_examples, self.count), deadline=None)
                setattr(getattr(item.obj, "__func__", item.obj), HYPOTHESIS, few)


def modules(room: str, summaries: dict[str, Any]) -> dict[str, Any]:
    """Return the summaries of a room's modules by their path within the package."""
    start = f"src/slos_serve/{room}/"
    return {name.removeprefix("src/slos_serve/"): one for name, one in summaries.items() if name.startswith(start)}


def share(summaries: list[dict[str, Any]], covered: str, all_of_them: str) -> str:
    """Return how much is covered, as a cell."""
    whole = sum(one[all_of_them] for one in summaries)
    return f"{sum(one[covered] for one in summaries)} of {whole}" if whole else "none"


def main() -> int:
    """Run the tests under coverage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS)
    parser.add_argument("--examples", type=int, default=10, help="of each property (default: 10)")
    parser.add_argument("--missing", action="store_true", help="say what no test takes")
    parser.add_argument("--tests", nargs="+", help="these tests instead of those of the rooms")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"NUMBA_DISABLE_JIT": "1", "CI": "true"}
    measured = coverage.Coverage(
        branch=True, data_file=None, source=[f"src/slos_serve/{room}" for room in options.rooms]
    )
    measured.start()
    tests = options.tests or [f"tests/{room}" for room in options.rooms]
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", "--timeout=3600", "-m", NOT_HERE]
    status = pytest.main([*flags, *tests], plugins=[FewExamples(options.examples)])
    measured.stop()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        measured.json_report(outfile=file.name)
        files = json.loads(Path(file.name).read_text())["files"]
    print("| | lines | branches |\n|---|---|---|")
    for room in options.rooms:
        found = modules(room, {name: one["summary"] for name, one in files.items()})
        for name, one in [(f"**{room}**", list(found.values())), *((name, [one]) for name, one in found.items())]:
            lines, branches = (
                share(one, "covered_lines", "num_statements"),
                share(one, "covered_branches", "num_branches"),
            )
            print(f"| {name} | {lines} | {branches} |")
    if options.missing:
        measured.report(show_missing=True, skip_covered=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
