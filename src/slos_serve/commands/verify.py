"""`slos-serve verify`: an acceptance run on the user's own engine, against vLLM alone.

With `--model` it starts our server and vLLM alone with the same flags: side by side on a CPU with memory for both, so
that they can be compared in turns, else one after the other. With `--target` it asks a server that runs; what needs
vLLM alone beside it is left out unless `--stock` names one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.bench.acceptance import (
    Evidence,
    Pairs,
    Size,
    alternate,
    burst_of,
    complete,
    repeat,
    serve_promises,
    take_texts,
)
from slos_serve.bench.http_json import get_json
from slos_serve.emulated.emulation import notice, serve_flags
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.serving import checks
from slos_serve.serving.verification import FAIL, PASS, Check, document_of, verification_path

if TYPE_CHECKING:
    from slos_serve.bench.engines import ServerProcess, ServerProcesses

HELP = "Verify this engine against vLLM alone: what enforcing on a GPU asks for."
TAKES_UNKNOWN = True
START_S = 1800.0
SPARE = 1.5  # free memory, in what our server took, that a second one may be started with
STEERED = {"class": "chat"}
SIZE = Size(num_texts=8, num_requests=24, output_tokens=64, load_s=15.0, num_blocks=16)
QUICK = Size(num_texts=6, num_requests=12, output_tokens=32, load_s=8.0, num_blocks=12)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    parser.usage = "slos-serve verify (--model M | --target URL) [--out FILE] [--quick] [any flag of vLLM]"
    parser.epilog = (
        "Give the flags that you serve with: a verification is about model, machine and flags.\n\n"
        "examples:\n"
        "  slos-serve verify --model Qwen/Qwen3-8B --max-model-len 8192\n"
        "  slos-serve verify --target http://127.0.0.1:8000 --stock http://127.0.0.1:8001 --out verification.json"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="M", help="a model to serve: folder or Hugging Face name")
    source.add_argument("--target", metavar="URL", help="a running server of slos-serve, in enforce mode")
    parser.add_argument("--emulate", metavar="NAME|FILE", help="with --model: on a device emulated by a hardware file")
    parser.add_argument("--stock", metavar="URL", help="with --target: vLLM alone with the same model")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="where to write it (default: where serve looks for it)"
    )
    parser.add_argument("--quick", action="store_true", help="a few minutes: less load, an existing profile is used")
    parser.add_argument("--api-key", metavar="KEY", help="with --target")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="0")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Verify, write the document; 1 where it did not pass."""
    if args.extra and args.model is None:
        raise ConfigError(where="arguments", key=args.extra[0], value="", expected="flags for vLLM only with --model")
    if args.emulate and args.model is None:
        raise ConfigError(where="arguments", key="--emulate", value=args.emulate, expected="--model beside it")
    if args.stock and args.target is None:
        raise ConfigError(where="arguments", key="--stock", value=args.stock, expected="--target beside it")
    for name in ("target", "stock"):
        value = getattr(args, name)
        if value and not value.startswith(("http://", "https://")):
            raise ConfigError(
                where="arguments", key=f"--{name}", value=value, expected="a URL such as http://127.0.0.1:8000"
            )
    found, key, version = verify_model(args) if args.model else verify_target(args)
    document = document_of(found, key=key, vllm=version, quick=args.quick)
    out = args.out or verification_path(key)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.out and args.model and document["passed"]:
        verification_path(key).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1) if args.json else as_text(document, out))
    return 0 if document["passed"] else 1


def as_text(document: Mapping[str, Any], out: Path) -> str:
    """Return the verification for people."""
    lines = [f"{check['status']:8} {check['name']:16} {check['detail']}" for check in document["checks"]]
    verdict = (
        "passed" if document["passed"] else "did not pass: " + ", ".join([*document["failed"], *document["missing"]])
    )
    lines += filter(None, [notice(document["key"])])
    return "\n".join([*lines, f"{verdict}; written to {out}"])


# -- our own servers --------------------------------------------------------------------------------


def verify_model(args: argparse.Namespace) -> tuple[list[Check], dict[str, Any], str]:
    """Start our server, then vLLM alone, and check; returns checks, the engine's key and vLLM's version."""
    from slos_serve.bench.engines import ServerProcesses  # noqa: PLC0415
    from slos_serve.serving.arguments import EngineArguments  # noqa: PLC0415
    from slos_serve.serving.platforms import available_memory  # noqa: PLC0415
    from slos_serve.serving.prepare import check_model, engine_key, find_engine  # noqa: PLC0415
    from slos_serve.terminal.progress import Progress  # noqa: PLC0415
    from slos_serve.terminal.signals import ending_by_signal  # noqa: PLC0415

    engine = find_engine(args.emulate)
    check_model(args.model)
    flags = EngineArguments(args.extra)
    key = engine_key(args.model, engine, args.extra, os.environ)
    found: list[Check] = []
    size = QUICK if args.quick else SIZE
    with (
        tempfile.TemporaryDirectory(prefix="slos-serve-verify-") as name,
        ending_by_signal(),
        ServerProcesses(Path(name)) as fleet,
    ):
        folder = Path(name)
        record, profile = folder / "run.jsonl", folder / "profile.json"
        forced = ["--additional-config", json.dumps({"slo": {"mode": "enforce"}})]
        free_before = available_memory()
        ours = fleet.start(
            "slos-serve", args.model, [*forced, "--record", str(record), *_profiled(args, profile), *_given(args)]
        )
        with Progress("starting the server, measuring its steps where nobody has"):
            fleet.wait([ours], timeout_s=START_S)
        with Progress("serving with promises"):
            load = serve_promises(ours.url, size, seed=args.seed)
        ours.check()
        free = available_memory()
        # Where others gave memory back meanwhile, what ours took is not known.
        fits = engine.is_cpu and 0 < SPARE * (free_before - free) < free
        if fits:
            stock = _start_stock(fleet, args)
            with Progress("serving without promises, in turns with vLLM alone"):
                pairs = _in_turns(ours.url, stock.url, size, args)
        else:
            with Progress("serving without promises"):
                alone = repeat(burst_of(ours.url, size, seed=args.seed))
        mine = take_texts(ours.url, size, slo=STEERED)
        snapshot = _status(ours.url, None)
        if fits:
            theirs = take_texts(stock.url, size, slo=None)
        fleet.stop()
        has_graphs = not engine.is_cpu and not flags.has("enforce-eager")
        has_drafter = flags.has("speculative-config")
        found += _of_record(snapshot, record, load, has_drafter=has_drafter, has_graphs=has_graphs)
        if engine.is_cpu and engine.emulation is None:
            found.append(checks.skipped("async", "on CPUs vLLM schedules synchronously"))
        elif flags.has("no-async-scheduling"):
            found.append(checks.skipped("async", "asynchronous scheduling is switched off by a flag"))
        else:
            found.append(_other_scheduling(fleet, args, forced))
        if not fits:
            stock = _start_stock(fleet, args)
            with Progress("serving on vLLM alone"):
                pairs = list(zip(alone, repeat(burst_of(stock.url, size, seed=args.seed)), strict=True))
                theirs = take_texts(stock.url, size, slo=None)
    return [*found, *_against(pairs, mine, theirs, quick=args.quick)], key, engine.version


def _given(args: argparse.Namespace) -> list[str]:
    """Return what every server is started with, as the user gave it."""
    return [*serve_flags(args.emulate), *args.extra]


def _start_stock(fleet: ServerProcesses, args: argparse.Namespace) -> ServerProcess:
    """Start vLLM alone and wait for it."""
    from slos_serve.terminal.progress import Progress  # noqa: PLC0415

    stock = fleet.start("vllm", args.model, ["--no-slo", *_given(args)])
    with Progress("starting vLLM alone"):
        fleet.wait([stock], timeout_s=START_S)
    return stock


def _in_turns(ours: str, stock: str, size: Size, args: argparse.Namespace) -> Pairs:
    """Compare the throughputs of two servers that are up."""
    bursts = [burst_of(url, size, seed=args.seed, api_key=args.api_key) for url in (ours, stock)]
    decided = partial(checks.is_decided, quick=args.quick)
    return alternate(*bursts, num_blocks=size.num_blocks, is_decided=decided)


def _profiled(args: argparse.Namespace, profile: Path) -> list[str]:
    return [] if args.quick else ["--profile", str(profile), "--reprofile"]


def _other_scheduling(fleet: Any, args: argparse.Namespace, forced: Sequence[str]) -> Check:
    """Serve a little with synchronous scheduling: the other of the two scheduler classes."""
    engine = fleet.start("slos-serve-sync", args.model, [*forced, "--no-async-scheduling", *_given(args)])
    fleet.wait([engine], timeout_s=START_S)
    texts = [
        complete(engine.url, f"Tell me something about {topic}.", slo=STEERED, tokens=16) for topic in ("rain", "glass")
    ]
    snapshot = _status(engine.url, None)
    fleet.stop()
    counts = sum((snapshot.get("planner_faults") or {}).values())
    good = all(texts) and not counts and snapshot.get("effective_mode") == "enforce"
    return Check(name="async", status=PASS if good else FAIL, detail=f"both kinds of scheduling, {counts} faults")


def _of_record(
    snapshot: Mapping[str, Any],
    record: Path | None,
    load: Mapping[str, Any] | None,
    *,
    has_drafter: bool = False,
    has_graphs: bool = False,
) -> list[Check]:
    """Return the checks that need our server alone."""
    found = [checks.hook(snapshot), checks.enforcing(snapshot), checks.faults(snapshot)]
    found.append(checks.margin_coverage(None, snapshot))
    if load is not None:
        found.append(checks.promises(load))
    if record is None:
        return found
    from slos_serve.records.reader import read_recording  # noqa: PLC0415
    from slos_serve.records.replay import replay  # noqa: PLC0415

    recording = read_recording(record)
    steps = [step for step in recording.steps if step.get("predicted_s")]
    found += [checks.plans(replay(recording).to_json()), checks.overhead(snapshot, steps)]
    return [*found, checks.graph_sizes(steps, has_graphs=has_graphs), checks.drafts(steps, has_drafter=has_drafter)]


def _against(pairs: Pairs, ours: Evidence, stock: Evidence, *, quick: bool) -> list[Check]:
    return [checks.throughput(pairs, quick=quick), checks.outputs(ours.texts, stock.texts, stock.batched)]


# -- a server that runs -----------------------------------------------------------------------------


def verify_target(args: argparse.Namespace) -> tuple[list[Check], dict[str, Any], str]:
    """Check a running server; `SlosServeError` where it does not answer or is none of ours."""
    size = QUICK if args.quick else SIZE
    _status(args.target, args.api_key)
    load = serve_promises(args.target, size, seed=args.seed, api_key=args.api_key)
    pairs = _in_turns(args.target, args.stock, size, args) if args.stock else []
    mine = take_texts(args.target, size, slo=STEERED, api_key=args.api_key)
    snapshot = _status(args.target, args.api_key)
    found = _of_record(snapshot, None, load)
    if args.stock:
        theirs = take_texts(args.stock, size, slo=None, api_key=args.api_key)
        found += _against(pairs, mine, theirs, quick=args.quick)
    else:
        found += [checks.skipped(name, "needs vLLM alone: --stock URL") for name in ("throughput", "outputs")]
    key = (snapshot.get("profile") or {}).get("key")
    return found, dict(key) if isinstance(key, Mapping) else {"model": str(key), "target": args.target}, ""


def _status(url: str, api_key: str | None) -> dict[str, Any]:
    document = get_json(f"{url.rstrip('/').removesuffix('/v1')}/v1/slo/status", api_key)
    if not isinstance(document.get("snapshot"), Mapping):
        raise SlosServeError(f"{url} is heard from no engine of slos-serve: is its scheduler ours?")
    return dict(document["snapshot"])
