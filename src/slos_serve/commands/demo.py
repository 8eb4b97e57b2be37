"""`slos-serve demo`: vLLM against vLLM with slos-serve, same load, same machine, in a few minutes."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

from slos_serve.bench import report
from slos_serve.bench.compare import OURS, STOCK
from slos_serve.bench.demo import Options, run_demo, systems_of
from slos_serve.commands.options import number, whole
from slos_serve.emulated.emulation import LEAVES_OUT, serve_flags
from slos_serve.errors import ConfigError
from slos_serve.terminal.signals import ending_by_signal

HELP = "Compare vLLM with and without slos-serve on this machine: a few minutes, a report."

NEXT_STEPS = """
Serve your own model (any vLLM flag works):
  {command} serve Qwen/Qwen3-0.6B --port 8000
  curl http://localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "Qwen/Qwen3-0.6B", "messages": [{{"role": "user", "content": "Hi"}}], "slo": {{"class": "chat"}}}}'
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    parser.epilog = "example: slos-serve demo --out demo-report"
    parser.add_argument("--model", metavar="FOLDER", help="a small model's folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="demo-report")
    parser.add_argument(
        "--seconds", type=number(least=1), default=32.0, metavar="S", help="length of one of the runs (32)"
    )
    parser.add_argument("--rates", metavar="R,R", help="requests per second (default: two, from the profile)")
    parser.add_argument("--emulate", metavar="NAME|FILE", help="on a device emulated by this hardware file")
    parser.add_argument("--seed", type=whole(0), default=7, metavar="N", help="7")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Run the demo, print its table and where the report is."""
    rates = _rates(args.rates)
    serve_flags(args.emulate)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with ending_by_signal():
        model = args.model or _demo_model()
        options = Options(
            model=str(model),
            out=args.out,
            seconds=args.seconds,
            seed=args.seed,
            rates_rps=rates,
            emulate=args.emulate,
        )
        outcome = run_demo(options, say=_say)
    if args.json:
        print((args.out / "report.json").read_text(encoding="utf-8"), end="")
        return 0
    chosen, best = systems_of(outcome.runs)
    systems = {name: [run["entry"] for run in chosen[name]] for name in (STOCK, OURS)}
    labels = {STOCK: "vLLM (best budget)"}
    if args.emulate:
        print(f"\nThe device is EMULATED ({args.emulate}): {LEAVES_OUT}.")
    print("\nSLO attainment: requests with every token in time, of all that were offered\n")
    print(report.text_table(systems, labels=labels))
    budgets = ", ".join(f"{name.removeprefix(STOCK + '-')} at {rate:.2f}/s" for rate, name in best.items())
    print(f"\nBest token budget of plain vLLM: {budgets}. Minutes: {(time.monotonic() - started) / 60:.1f}.")
    print(f"Report: {args.out}/report.html, report.json, attainment.png, timeline.png, profile.png")
    print(NEXT_STEPS.format(command=_command()).rstrip())
    return 0


def _rates(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ConfigError(where="demo", key="--rates", value=text, expected="positive numbers, such as 0.8,1.6")
    return rates


def _command() -> str:
    """Return how the user starts this command: by its path where they did."""
    return sys.argv[0] if Path(sys.argv[0]).name == "slos-serve" else "slos-serve"


def _demo_model() -> Path:
    from slos_serve.bench.model import ensure_demo_model  # noqa: PLC0415

    return ensure_demo_model()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
