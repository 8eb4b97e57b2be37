"""The verb `serve`: check what can be checked, then serve on one machine or on a cluster."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from slos_serve.errors import ConfigError
from slos_serve.logs import use_json
from slos_serve.serving import launch, single
from slos_serve.serving.arguments import EngineArguments
from slos_serve.serving.platforms import check_emulation
from slos_serve.serving.prepare import check_engine, check_model, find_engine, logger, prepare, remove_scratch, say
from slos_serve.serving.profiles import read_profile

HELP = "Start an OpenAI-compatible server on vLLM that keeps latency promises."
TAKES_UNKNOWN = True

EMULATE_HELP = "run no model: steps take as long as this hardware file says (see docs/rehearse.md)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.usage = "slos-serve serve MODEL [options] [any flag of vLLM]"
    parser.epilog = (
        "Every other flag goes to vLLM unchanged; give MODEL before them.\n\n"
        "examples:\n"
        "  slos-serve serve Qwen/Qwen3-8B --port 8000\n"
        "  slos-serve serve ./my-model --slo-config classes.yaml --slo-mode observe --max-model-len 8192\n"
        "  slos-serve serve Qwen/Qwen3-8B --replicas 4"
    )
    parser.add_argument("model", metavar="MODEL", help="a local model folder or a Hugging Face name")
    parser.add_argument("--host", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--slo-config", type=Path, metavar="FILE", help="application classes, YAML (default: shipped)")
    parser.add_argument(
        "--slo-mode",
        choices=("observe", "enforce"),
        help="observe: change nothing and report; enforce (default): keep promises, on GPUs where verify has passed",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured profile to use (default: the cache)")
    parser.add_argument("--reprofile", action="store_true", help="measure again, even where a profile exists")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append one JSON line for each engine step")
    parser.add_argument("--replicas", type=int, metavar="N", help="serve with N replicas behind one port, on Ray Serve")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="run them on this Ray cluster: HOST:PORT, or auto (default: a new one)"
    )
    parser.add_argument("--router", metavar="NAME", help="how replicas are chosen (default: slo)")
    parser.add_argument("--emulate", metavar="NAME|FILE", help=EMULATE_HELP)
    parser.add_argument("--no-slo", action="store_true", help="vLLM alone, for comparison")
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: log one JSON object a line"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document when ready; logs go to stderr")


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; return vLLM's own exit status."""
    engine = find_engine(args.emulate)
    check(args)
    if args.log_format == "json":
        use_json(logger)
    if not args.no_slo:
        check_engine(engine)
    check_emulation(engine, EngineArguments(args.extra), os.environ, args.model)
    if is_cluster(args):
        from slos_serve.serving import replicas  # noqa: PLC0415

        return replicas.run(args, engine)
    plan = prepare(args, engine, os.environ)
    try:
        for note in plan.notes:
            say(note)
        return single.serve(plan, as_json=args.json)
    finally:
        remove_scratch(plan)


def is_cluster(args: argparse.Namespace) -> bool:
    """Tell whether replicas on Ray are asked for, rather than one server of vLLM's own."""
    return args.ray_address is not None or (args.replicas or 1) > 1


def check(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for what would only fail after a minute of loading."""
    if args.replicas is not None and args.replicas < 1:
        raise ConfigError(where="arguments", key="--replicas", value=args.replicas, expected="1 or more")
    if args.router is not None and not is_cluster(args):
        raise ConfigError(where="arguments", key="--router", value=args.router, expected="--replicas beside it")
    if args.no_slo:
        for name in ("slo_config", "slo_mode", "profile", "record", "reprofile", "ray_address", "router", "replicas"):
            if getattr(args, name):
                key = "--" + name.replace("_", "-")
                raise ConfigError(
                    where="arguments", key=key, value=getattr(args, name), expected="no --no-slo beside it"
                )
    _check_order(args)
    check_model(args.model)
    if args.slo_config is not None:
        from slos_serve.config import load_slo_config  # noqa: PLC0415

        load_slo_config(args.slo_config)
    if args.profile is not None and not args.reprofile:
        read_profile(args.profile)
    problem = launch.port_problem(args.host, args.port)
    if problem and not EngineArguments(args.extra).has("uds", "headless"):
        expected = f"a free port ({problem}); try another --port"
        raise ConfigError(where="arguments", key="--port", value=args.port, expected=expected)


def _check_order(args: argparse.Namespace) -> None:
    # Behind a flag that only vLLM knows, its value and MODEL cannot be told apart.
    before = args.arguments[: args.arguments.index(args.model)] if args.model in args.arguments else []
    for token in before:
        if token in args.extra:
            raise ConfigError(where="arguments", key="MODEL", value=args.model, expected=f"MODEL before {token}")
