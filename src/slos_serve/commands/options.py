"""Options that several verbs have in the same words, and argument types: numbers within bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from slos_serve.sim.replica.replica import ASYNC_LAG
from slos_serve.sim.workloads.scenarios import SCENARIOS
from slos_serve.traces.offered import add_options

MAX_REPLICAS = 1024


def number(
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    convert: Callable[[str], float] = float,
) -> Callable[[str], float]:
    """Return an argument's type: a finite number within bounds, `above` and `below` themselves left out."""
    words = {"at least": least, "more than": above, "at most": most, "below": below}
    kind = "a whole number" if convert is int else "a number"
    expected = ", ".join([kind, *(f"{word} {bound:g}" for word, bound in words.items() if math.isfinite(bound))])

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return value

    return parse


def whole(least: int, most: float = math.inf) -> Callable[[str], float]:
    """Return an argument's type: a whole number from `least` to `most`, both included."""
    return number(least=least, most=most, convert=int)


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add what is simulated: a scenario or a trace, and its classes."""
    parser.add_argument("--scenario", metavar="NAME", help=f"one of {', '.join(SCENARIOS)}")
    add_options(parser)
    parser.add_argument("--slo-config", metavar="FILE", help="latency classes (default: the shipped ones)")


def add_simulation(parser: argparse.ArgumentParser) -> None:
    """Add what every simulation asks for."""
    parser.add_argument("--data", metavar="DIR", help="folder of public trace files (default: synthetic stand-ins)")
    parser.add_argument(
        "--acceptance", metavar="A", type=number(least=0, below=1), default=0.7, help="chance of a draft token (0.7)"
    )
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="behind all chance (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add how the simulated engine runs, and what is known of it."""
    parser.add_argument("--async-lag", action=argparse.BooleanOptionalAction, default=None, help=ASYNC_LAG)
    parser.add_argument("--known-lengths", action="store_true", help="let every system know true output lengths")
