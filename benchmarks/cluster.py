"""Many replicas on this machine, for real: what faults cost, what routing is worth, what Ray adds.

    python benchmarks/cluster.py demo         two replicas, one killed under load: what its clients see
    python benchmarks/cluster.py faults       kill, hang, slow, drain, late, pause: what became of every request
    python benchmarks/cluster.py routers      attainment by router at equal load with square bursts, three seeds each
    python benchmarks/cluster.py path         TTFT and token gaps of one replica behind Ray against a bare engine
    python benchmarks/cluster.py autoscaling  from one replica to two under load, and back

A real vLLM serves the demo's small model in every replica, one thread each; classes, promises and rates follow
from its measured profile, as in the demo (`bench/scaled.py`). Nothing is tuned on what is reported. Results go
to `--out` as JSON, with what Ray and vLLM said in `cluster.log`; a table to the terminal. Times are the client's.

With `--emulate h100-8b-derived,slower=32` the replicas are real and their devices emulated (docs/rehearse.md): they
load no weights and need no cores, so that two cores carry several of them; slow enough, for every token still goes
through Ray. Rows and headings say so, and nothing in them is a claim about a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster_terminal import quietly

from slos_serve.emulated.emulation import PREFIX
from slos_serve.errors import SlosServeError

MODULES = {"demo": "faults", "faults": "faults", "routers": "routers", "path": "path", "autoscaling": "autoscaling"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MODULES))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--profile", type=Path, help="measured profile (default: the cache, or measured first)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's)")
    parser.add_argument("--emulate", metavar="NAME|FILE", help="on emulated devices: h100-8b-derived,slower=32 or such")
    parser.add_argument("--dummy", action="store_true", help="random weights: a folder with a config.json is enough")
    parser.add_argument("--rate", type=float, help="faults, demo: requests/s (default: 0.35 of what is possible)")
    parser.add_argument("--only", action="append", help="one fault or router; may be given more than once")
    parser.add_argument("--load", type=float, default=0.5, help="routers: share of what the machine can serve")
    parser.add_argument("--seconds", type=float, help="routers: length of one run (40); autoscaling: of the load (150)")
    parser.add_argument("--runs", type=int, default=3, help="routers: seeds for each")
    parser.add_argument("--requests", type=int, default=60, help="path: requests for each server")
    parser.add_argument("--record", type=Path, help="beside it: what each engine did, and what the router decided")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("cluster-report"))
    options = parser.parse_args()
    options.slo_config = None
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "cluster.log"
    try:
        with quietly(log):
            module = importlib.import_module(f"cluster_{MODULES[options.what]}")  # Ray and vLLM speak while they load
            rows = getattr(module, options.what)(options)
    except SlosServeError as error:
        print(f"{error} (log: {log})", file=sys.stderr)
        return 1
    result = options.out / f"{options.what}.json"
    if options.emulate:
        rows = [{**row, "device": PREFIX + options.emulate} for row in rows]
    result.write_text(json.dumps(rows, indent=1) + "\n")
    if options.what != "demo":  # which tells its story in words
        print(table(rows) + "\n")
    print(f"numbers: {result}; what Ray and vLLM said: {log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
