"""`slos-serve profile`: measure an engine, fit the performance model, say how good it is."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.bench.client import discover_model
from slos_serve.bench.engines import ServerProcesses
from slos_serve.bench.plots import plot_fit
from slos_serve.bench.profiling import profile_server
from slos_serve.cache import write_json
from slos_serve.commands.options import number, whole
from slos_serve.core.fit import fit_perf_model, from_records
from slos_serve.emulated.emulation import notice, serve_flags
from slos_serve.errors import ConfigError
from slos_serve.records.profile import Profile, profile_document, read_records
from slos_serve.serving.profiles import beyond_measured
from slos_serve.terminal.progress import Progress
from slos_serve.terminal.signals import ending_by_signal

HELP = "Measure how long an engine's steps take, fit the performance model, say how good it is."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `profile`."""
    parser.epilog = (
        "examples:\n"
        "  slos-serve profile --model Qwen/Qwen3-8B --out profile.json --plot profile.png\n"
        "  slos-serve profile --target http://127.0.0.1:8000 --record steps.jsonl --out profile.json\n"
        "  slos-serve profile --from-steps steps.jsonl --out profile.json"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="start a server with this model, measure it and stop it")
    what.add_argument("--target", metavar="URL", help="measure this running server; needs --record")
    what.add_argument("--from-steps", type=Path, metavar="FILE", help="fit recorded steps, measure nothing")
    parser.add_argument("--emulate", metavar="NAME|FILE", help="with --model: on a device emulated by a hardware file")
    parser.add_argument("--record", type=Path, metavar="FILE", help="the file that the target records its steps to")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("profile.json"), help="profile.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted against measured step times, PNG")
    parser.add_argument(
        "--seconds", type=number(above=0), default=45.0, metavar="S", help="with --target: time to measure for (45)"
    )
    parser.add_argument("--max-num-batched-tokens", type=whole(1), metavar="N", help="token budget (default: as seen)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="0")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


TAKES_UNKNOWN = True  # flags for vLLM, with --model


def run(args: argparse.Namespace) -> int:
    """Write the profile and say how good it is."""
    _check(args)
    if args.from_steps is not None:
        records = read_records(args.from_steps)
        key: dict[str, Any] = {"model": "", "hardware": "", "flags": [f"steps from {args.from_steps.name}"]}
        _fit(records, key, args)
    else:
        with tempfile.TemporaryDirectory(prefix="slos-serve-") as scratch:
            record = args.record or Path(scratch) / "steps.jsonl"
            start = record.stat().st_size if record.exists() else 0
            if args.model is not None:
                _measure_model(args, record, Path(scratch))
            else:
                _measure_target(args, record)
            records = read_records(record, start=start)
            document = json.loads(args.out.read_text(encoding="utf-8"))
            if args.max_num_batched_tokens:
                write_json({**document, "max_num_batched_tokens": args.max_num_batched_tokens}, args.out)
    profile = Profile.load(args.out)
    if args.plot is not None:
        plot_fit(profile.perf_model, from_records(records), args.plot)
    if args.json:
        print(json.dumps(profile.document))
    else:
        print(as_text(profile))
        print(f"written to {args.out}" + (f" and {args.plot}" if args.plot else ""))
    return 0


def _check(args: argparse.Namespace) -> None:
    where = "profile"
    if args.extra and args.model is None:
        raise ConfigError(where=where, key=args.extra[0], value="", expected="flags for vLLM only with --model")
    serve_flags(args.emulate)
    if args.emulate and args.model is None:
        raise ConfigError(where=where, key="--emulate", value=args.emulate, expected="--model beside it")
    if args.target is not None and args.record is None:
        expected = "--record FILE, the file that the server was started with (serve --record FILE)"
        raise ConfigError(where=where, key="--target", value=args.target, expected=expected)


def _fit(records: list[dict[str, Any]], key: dict[str, Any], args: argparse.Namespace) -> None:
    report = fit_perf_model(from_records(records), rng=np.random.default_rng(args.seed))
    seen = max(int(record["num_tokens"]) for record in records)
    budget = args.max_num_batched_tokens or seen
    write_json(profile_document(report, key=key, max_num_batched_tokens=budget), args.out)


def _measure_target(args: argparse.Namespace, record: Path) -> None:
    model = asyncio.run(discover_model(args.target))
    key = {"model": model, "hardware": args.target, "flags": []}
    with Progress("measuring steps") as progress:
        profile_server(
            args.target, record, args.out, model, key=key, seed=args.seed, budget_s=args.seconds, on_progress=progress
        )


def _measure_model(args: argparse.Namespace, record: Path, scratch: Path) -> None:
    """Let `serve` measure the model as it does for itself, then end it."""
    flags = ["--slo-mode", "observe", "--record", str(record.resolve()), "--profile", str(args.out.resolve())]
    with ending_by_signal(), ServerProcesses(scratch) as fleet:
        engine = fleet.start("server", args.model, [*flags, "--reprofile", *serve_flags(args.emulate), *args.extra])
        with Progress("starting the server and measuring its steps"):
            fleet.wait([engine], timeout_s=1800)


def as_text(profile: Profile) -> str:
    """Return the profile for people."""
    document, model = profile.document, profile.perf_model
    names = {
        "per_token_s": ("per token", 1e6, "us"),
        "per_request_s": ("per request", 1e6, "us"),
        "per_context_token_s": ("per context token", 1e9, "ns"),
        "per_draft_step_s": ("per draft step", 1e6, "us"),
        "per_pair_s": ("per chunk x context", 1e9, "ns"),
        "fixed_s": ("fixed", 1e3, "ms"),
    }
    error, covered = document["mape_heldout"] * 100, document["margin_coverage"] * 100
    margins = f"x{model.margin_prefill:.2f} with prefill, x{model.margin_decode:.2f} decodes"
    lines = [f"{document['num_steps']} steps: R2 {document['r2']:.3f}, held-out error {error:.1f} %"]
    lines.append(f"{covered:.0f} % of held-out steps within the margin ({margins})")
    for line in model.to_json()["lines"]:
        parts = [f"{names[t][0]} {v * names[t][1]:.3g} {names[t][2]}" for t, v in line.items() if v > 0]
        lines.append("step time: " + ", ".join(parts))
    lines.append(
        f"alone: a decode step takes {profile.decode_step_s * 1e3:.1f} ms, a prompt of 512 tokens "
        f"{profile.reference_s(512) * 1e3:.0f} ms (token budget {profile.max_num_batched_tokens})"
    )
    lines += filter(None, [beyond_measured(document), notice(document.get("key"))])
    return "\n".join(lines)
