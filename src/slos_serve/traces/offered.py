"""What `bench`, `simulate` and `plan` offer from a trace: one set of options, applied in one order.

File and window; the first N; other arrivals; another rate; a class for every request that names none.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from slos_serve.errors import ConfigError
from slos_serve.traces.formats.lengths import NAME as LENGTHS_ONLY
from slos_serve.traces.rows import TIME_UNITS, ReadOptions
from slos_serve.traces.trace import SMALL_TRACE, Trace, read_trace, synthetic_arrivals

STREAM = 2  # of the seed, for arrivals and classes
MAX_RATE_RPS = 1e6
SMALL = "mixed_small"
DEFAULT_CLASS = "chat"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all verbs that read a trace understand the same way."""
    parser.add_argument(
        "--trace",
        metavar="FILE[@start:duration]",
        help="arrivals and lengths, in any format of docs/traces.md (default: a small trace that is shipped)",
    )
    parser.add_argument(
        "--time-unit", choices=TIME_UNITS, help="unit of the file's times, where its content does not say"
    )
    parser.add_argument(
        "--block-tokens", metavar="N", type=int, help="prompt tokens behind a block id of the file; 0: no prefix hits"
    )
    parser.add_argument(
        "--rate", "--request-rate", metavar="R", type=float, help="requests per second in all, by stretching time"
    )
    parser.add_argument(
        "--arrivals", metavar="PROCESS", help="replace arrivals: poisson, gamma:CV, bursts:FACTOR:S:SHARE"
    )
    parser.add_argument(
        "--burstiness",
        metavar="B",
        type=float,
        help="replace arrivals as `vllm bench` does: 1 Poisson, less is burstier",
    )
    parser.add_argument("--num-requests", "--num-prompts", metavar="N", type=int, help="only the first N requests")
    parser.add_argument("--mix", metavar="CLASS=SHARE,..", help="classes of requests that name none, drawn by the seed")
    parser.add_argument(
        "--slo-class", metavar="NAME", default=DEFAULT_CLASS, help=f"class of requests that name none ({DEFAULT_CLASS})"
    )


def check_options(where: str, args: argparse.Namespace) -> None:
    """Raise `ConfigError` for an option that is out of range, or that contradicts another."""
    for key in ("rate", "burstiness", "num_requests"):
        value = getattr(args, key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(where=where, key=_flag(key), value=value, expected="a positive number")
    if args.rate is not None and args.rate >= MAX_RATE_RPS:
        raise ConfigError(where=where, key="--rate", value=args.rate, expected=f"below {MAX_RATE_RPS:g}")
    if args.burstiness is not None and args.arrivals is not None:
        expected = "either --burstiness or --arrivals"
        raise ConfigError(where=where, key="--burstiness", value=args.burstiness, expected=expected)
    if getattr(args, "scenario", None) is not None:
        for key in ("trace", "arrivals", "burstiness", "num_requests", "mix", "time_unit", "block_tokens"):
            if getattr(args, key) is not None:
                expected = f"either --scenario or {_flag(key)}"
                raise ConfigError(where=where, key=key, value=getattr(args, key), expected=expected)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def offered_trace(args: argparse.Namespace, *, max_total_tokens: int | None, stretch: bool = True) -> Trace:
    """Return what the options say to offer, without what is longer than the context, whose `origin` counts it.

    `stretch` false: the caller sets the rate, of the part that it takes.
    """
    options = ReadOptions(time_unit=args.time_unit, block_tokens=args.block_tokens, max_total_tokens=max_total_tokens)
    source = SMALL_TRACE if args.trace is None else args.trace
    trace = read_trace(source, options, num_requests=args.num_requests)
    if args.trace is None:
        trace = replace(trace, source=SMALL)
    rng = np.random.default_rng([args.seed, STREAM])
    process = args.arrivals if args.burstiness is None else f"gamma:{args.burstiness**-0.5!r}"
    if process is not None:
        rate = args.rate or (trace.rate_rps if math.isfinite(trace.rate_rps) else 1.0)
        trace = trace.with_arrivals(synthetic_arrivals(process, rate, len(trace), rng), span_s=len(trace) / rate)
    elif trace.origin.format == LENGTHS_ONLY:
        raise ValueError(f"{trace.source}: {LENGTHS_ONLY}: say --arrivals poisson --rate R")
    if args.rate is not None and stretch:
        trace = trace.at_rate(args.rate)
    asked = (
        f"--mix {args.mix}" if args.mix else "" if args.slo_class == DEFAULT_CLASS else f"--slo-class {args.slo_class}"
    )
    if asked and (trace.slo_class != "").all():
        note = f"{asked} changes nothing: every request names its class"
        trace = replace(trace, origin=replace(trace.origin, notes=(*trace.origin.notes, note)))
    return with_classes(trace, parse_mix(args.mix) if args.mix else {args.slo_class: 1.0}, rng)


def parse_mix(text: str) -> dict[str, float]:
    """Parse `chat=0.5,coding=0.5` into shares that add up to 1; `ValueError` names what is wrong."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not (name and equals and math.isfinite(share) and share > 0) or name in shares:
            raise ValueError(f"--mix {text!r}: {part!r}: expected CLASS=SHARE with a positive share, each class once")
        shares[name] = share
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def with_classes(trace: Trace, mix: Mapping[str, float], rng: np.random.Generator) -> Trace:
    """Return the trace with a class for every request that has none, drawn from `mix`."""
    drawn = rng.choice(list(mix), len(trace), p=list(mix.values()))
    return replace(trace, slo_class=np.where(trace.slo_class == "", drawn, trace.slo_class))


def tell(name: str, num_requests: int, span_s: float, trace: Trace | None = None) -> None:
    """Say on standard error what is offered, over which time, how it was read, and what was left out and why."""
    rate = f"{num_requests / span_s:.4g}/s" if span_s > 0 else "all at one instant: rates count them over 1 s"
    origin = None if trace is None else trace.origin
    read_as = f", read as {origin.format}" if origin is not None and origin.format else ""
    lines = [f"{num_requests} requests over {span_s:.6g} s ({rate}){read_as}"]
    if origin is not None:
        lines += [f"left out: {count} {reason}" for reason, count in origin.left_out.items()]
        lines += origin.notes
    sys.stderr.writelines(f"{name}: {line}\n" for line in lines)


def summary(trace: Trace) -> dict[str, object]:
    """Return the same for a JSON document."""
    origin = trace.origin
    return {
        "format": origin.format,
        "num_requests": len(trace),
        "span_s": trace.span_s,
        "left_out": dict(origin.left_out),
        "notes": list(origin.notes),
    }
