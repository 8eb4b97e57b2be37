"""Break planner, steering, configuration and safety rules on purpose, one line at a time, and see who notices.

    python scripts/mutations.py [--only NAME] [--list]

Each mutation is made in a copy of `src/`, and the named tests, which must pass without it, run against the copy. A
mutation that no test catches asks for a test. Ends with a table; exit status 1 where one survived, is undecided or no
longer applies.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800.0  # without compiled loops, on a busy machine
PATIENCE, LEAST_S = (5.0, 10.0), 60.0  # times what the tests take without the mutation, at the first and second try


class Mutation(NamedTuple):
    """A line of the package, what it is made into, and the tests that must notice."""

    name: str
    file: str
    line: str
    becomes: str
    tests: str


WEIGHT = "tests/core/test_weight_of_promises.py"
ODD = "tests/vllm_plugin/test_odd_requests.py"
DEMAND, STEP = "core/planning/demand.py", "core/planning/step.py"
PLUGIN, CONFIG = "vllm_plugin", "config.py"

MUTATIONS = (
    Mutation("slack not counted", DEMAND, "    if 0.0 < ahead < math.inf:\n", "    if False:\n", WEIGHT),
    Mutation("silence not counted", DEMAND, "return min(period, demand[GAP, i])", "return period", WEIGHT),
    Mutation(
        "slack spread over one batch more",
        DEMAND,
        "math.ceil(tokens / gain - 1e-9))",
        "math.ceil(tokens / gain) + 1.0)",
        WEIGHT,
    ),
    Mutation("first token of a prompt counted twice", DEMAND, "- now, tokens - 1.0  #", "- now, tokens  #", WEIGHT),
    Mutation(
        "silence hides the schedule",
        DEMAND,
        "demand[LEAD, i] = scheduled - latest if",
        "demand[LEAD, i] = 0.0 if",
        WEIGHT + " tests/sim/test_weight_of_promises.py",
    ),
    Mutation(
        "window by the slowest",
        STEP,
        "needed_each(demand, now).min(initial=math.inf)",
        "needed_each(demand, now).max(initial=0.0)",
        "tests/core/test_planner.py " + WEIGHT,
    ),
    Mutation(
        "every decline crowds",
        "core/planning/columns.py",
        "declined and _is_possible(rows, i, table[TPOT, i], fixed_s, lines)",
        "declined",
        WEIGHT,
    ),
    Mutation(
        "impossible paces are searched for",
        "core/planner.py",
        "too_big | past | too_fast |",
        "too_big | past |",
        WEIGHT,
    ),
    Mutation(
        "best-effort by arrival alone",
        STEP,
        "self.left[rest] > 0, turn, rank",
        "self.left[rest] > 0, rank",
        "tests/core/test_tenants.py",
    ),
    Mutation(
        "turns do not end",
        "core/planning/ageing.py",
        "now_s >= self._turn_ends_s",
        "False",
        "tests/core/test_tenants.py",
    ),
    Mutation(
        "ageing waits for the impossible",
        "core/planning/ageing.py",
        "mask &= tokens <=",
        "mask &= tokens >= 0 *",
        "tests/core/test_tenants.py",
    ),
    Mutation(
        "seniority by the newest",
        "core/planning/ageing.py",
        'rows["arrival_s"][still], served',
        '-rows["arrival_s"][still], served',
        "tests/core/test_tenants.py",
    ),
    Mutation(
        "step-down one promise late",
        f"{PLUGIN}/safety/rules.py",
        "len(self._promises) >= limits.num_promises",
        "len(self._promises) > limits.num_promises",
        "tests/vllm_plugin/test_safety.py",
    ),
    Mutation(
        "step-down by one tenant",
        f"{PLUGIN}/safety/rules.py",
        "if count - self._given[tenant] >= _OTHERS:",
        "if False:",
        "tests/vllm_plugin/test_safety.py",
    ),
    Mutation(
        "hold does not double",
        f"{PLUGIN}/safety/rules.py",
        "max(2.0 * self._hold_s",
        "max(1.0 * self._hold_s",
        "tests/vllm_plugin/test_safety.py",
    ),
    Mutation(
        "misses of clients count",
        f"{PLUGIN}/promises.py",
        'outcome == "missed" and live.has_outrun',
        "False",
        "tests/vllm_plugin/test_outrun.py",
    ),
    Mutation(
        "misses of ours do not count",
        f"{PLUGIN}/engine/live.py",
        "> self.promised_tokens",
        "> 0",
        "tests/vllm_plugin/test_outrun.py",
    ),
    Mutation("one grade stops the others", f"{PLUGIN}/promises.py", 'self._faults.add("grade", error)', "raise", ODD),
    Mutation(
        "no reconciling",
        f"{PLUGIN}/runtime.py",
        "if count := self.tracker.reconcile():",
        "if count := 0:",
        ODD,
    ),
    Mutation(
        "a grammar is not waited for",
        f"{PLUGIN}/engine/tracking.py",
        "return self.num_with_slo > 0 or any(",
        "return self.num_with_slo > 0 and any(",
        ODD,
    ),
    Mutation("time goes on in a pause", f"{PLUGIN}/pauses.py", "tracker.delay(live, ", "tracker.delay(live, 0 * ", ODD),
    Mutation("a pause delays who runs on", f"{PLUGIN}/pauses.py", 'self.kind == "all" or', "True or", ODD),
    Mutation(
        "seats of sessions are free",
        f"{PLUGIN}/next_step.py",
        "return max(1, most - taken)",
        "return max(1, most)",
        ODD,
    ),
    Mutation("sessions uncapped", f"{PLUGIN}/engine/steer.py", "max(1, stock_tokens // len(stock))", "UNCAPPED", ODD),
    Mutation("sessions may stand still", f"{PLUGIN}/engine/steer.py", "max(1, stock_tokens // len(stock))", "0", ODD),
    Mutation("sliding windows are steered", f"{PLUGIN}/engine/view.py", "not _is_plain(scheduler)", "False", ODD),
    Mutation(
        "closed thinking is waited for",
        f"{PLUGIN}/engine/view.py",
        "return not marks.isdisjoint(tail)",
        "return False",
        ODD,
    ),
    Mutation(
        "bounds of clients off by one",
        CONFIG,
        "if not least <= value <= most:",
        "if not least < value <= most:",
        "tests/test_config.py",
    ),
    Mutation(
        "bounds of clients not looked at", CONFIG, "if not least <= value <= most:", "if False:", "tests/test_config.py"
    ),
    Mutation(
        "client numbers though forbidden",
        CONFIG,
        "if not self.client_numbers:",
        "if self.client_numbers is None:",
        "tests/test_config.py",
    ),
)


class Run(NamedTuple):
    """What tests said: pytest's exit status (None where they did not end in time), who failed first, the seconds."""

    status: int | None
    failed: str
    seconds: float


def run_tests(tests: str, source: Path, limit_s: float) -> Run:
    """Run tests against a copy of the package, to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_DISABLE_JIT": "1"}
    environment["CI"] = "true"  # Hypothesis then draws the same examples each time, however slow the machine is
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Run(None, "", limit_s)
    names = re.findall(r"^(?:FAILED|ERROR) \S+/(\S+)", done.stdout, re.MULTILINE)
    return Run(done.returncode, names[0] if names else "", time.monotonic() - began)


@cache
def unbroken(tests: str) -> Run:
    """Return what the tests say of the package as it is."""
    return run_tests(tests, ROOT / "src", TIMEOUT_S)


def verdict(mutation: Mutation) -> tuple[str, str]:
    """Return caught, survived, undecided, or what is wrong with the mutation; and the test that caught it.

    Where the tests fail without the mutation too, or do not end with it in many times what they take without it, tried
    twice, nothing is decided: a busy machine looks alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / "slos_serve" / mutation.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutation.line) != 1:
            return f"the line is there {text.count(mutation.line)} times", ""
        before = unbroken(mutation.tests)
        if before.status != 0:
            return f"undecided: without it {before.failed or 'the tests'} failed or did not end", ""
        file.write_text(text.replace(mutation.line, mutation.becomes), encoding="utf-8")
        run = Run(None, "", 0.0)
        for patience in PATIENCE:
            if run.status is None:
                run = run_tests(mutation.tests, copy, max(LEAST_S, patience * before.seconds))
    outcomes = {None: "undecided: does not end", 0: "survived", 1: "caught"}
    return outcomes.get(run.status, f"pytest ended with {run.status}"), run.failed


def main() -> int:
    """Run the mutations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="mutations whose name or tests contain this")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    arguments = parser.parse_args()
    chosen = [one for one in MUTATIONS if not arguments.only or arguments.only in f"{one.name} {one.tests}"]
    if arguments.list:
        print("\n".join(f"{one.name}: {one.file}" for one in chosen))
        return 0
    rows = []
    for one in chosen:
        began = time.monotonic()
        rows.append((one, verdict(one)))
        print(
            f"{one.name}: {': '.join(filter(None, rows[-1][1]))} ({time.monotonic() - began:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
    print("| mutation | file | outcome | by |\n|---|---|---|---|")
    for one, (outcome, test) in rows:
        print(f"| {one.name} | {one.file} | {outcome} | {test and f'`{test}`'} |")
    return 0 if all(outcome == "caught" for _, (outcome, _) in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
