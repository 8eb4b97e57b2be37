"""Measure the claims on a real engine: vLLM at three token budgets against slos-serve, five rates, several seeds.

    python benchmarks/engine_study.py [--quick] [--seeds 3] [--seconds 30] [--out bench-report]

Half an hour and more; interrupted, it goes on where it stopped. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slos_serve.bench.engines import ending_by_signal
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.study import Options, run_study, text


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds by rate and setting (3)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="length of a run (30)")
    parser.add_argument("--quick", action="store_true", help="one seed, runs of 10 s")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), metavar="DIR", help="bench-report")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = range(100, 101 if arguments.quick else 100 + arguments.seeds)
    seconds = 10.0 if arguments.quick else arguments.seconds
    with ending_by_signal():
        options = Options(model=str(ensure_demo_model()), out=arguments.out, seeds=list(seeds), seconds=seconds)
        document = run_study(options, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
