"""`slos-serve serve --replicas N`: the same options, on Ray Serve instead of one server of vLLM's own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from slos_serve.errors import ConfigError, MissingExtraError
from slos_serve.serving import launch
from slos_serve.serving.arguments import EngineArguments
from slos_serve.serving.platforms import InstalledVllm, num_cores
from slos_serve.serving.prepare import Launch, logging_settings, measure, prepare, remove_scratch, say
from slos_serve.serving.profiles import SPEED_ENVIRONMENT, set_aside
from slos_serve.terminal.signals import ending_by_signal

# What belongs to vLLM's HTTP server or to its own way of scaling; Ray Serve has others.
REFUSED = (
    *("api-key", "middleware", "uds", "headless", "api-server-count", "grpc", "root-path", "ssl-keyfile"),
    *("ssl-certfile", "ssl-ca-certs", "allowed-origins", "allowed-methods", "allowed-headers", "allow-credentials"),
    *("distributed-executor-backend", "data-parallel-size", "data-parallel-backend", "data-parallel-address"),
)
REFUSED_ENVIRONMENT = ("VLLM_API_KEY",)
SECRET = ("api-key",)  # never repeated in a message
NOT_ENGINE = ("model", "host", "port", "served_model_name", "middleware", "additional_config", "scheduler_cls")
EMULATED_CORES = 0.25  # a device that computes nothing; its API server, scheduler and tokenizer are real
OF_ONE_ENGINE = ("profile_key", "channel_dir")  # settings that each replica has its own of
PATIENCE_S = 310.0
CONNECT_S = 5.0


def run(args: argparse.Namespace, engine: InstalledVllm) -> int:
    """Serve until told to end; what is promised is finished first. 0 where that took no longer than patience."""
    num_replicas = args.replicas or 1
    bundle = bundle_of(args, engine)
    check(args, bundle)
    if args.ray_address is not None:
        check_address(args.ray_address)
    plan = prepare(args, engine, os.environ, share=1 if args.ray_address else num_replicas)
    os.environ.update(logging_settings(args, os.environ))  # for the ingress, whose Ray inherits this process's
    try:
        with quiet_stdout(args.json):
            build_openai_app, RayCluster = _import()  # noqa: N806
            for note in plan.notes:
                say(note)
            with (
                RayCluster(args.ray_address, num_cpus=num_cores()) as cluster,
                ending_by_signal(),
            ):  # Ray's handlers abort
                cluster.check_room(num_replicas, bundle)
                document = application(args, engine, plan, profile_of(args, plan), bundle)
                say(f"starting {num_replicas} replicas of {plan.model_name} on Ray Serve ({plan.mode})")
                app = build_openai_app(document)
                try:
                    cluster.run(app, host=args.host, port=args.port)
                    say(f"ready: {plan.url}/v1, {num_replicas} replicas")
                    _tell(args, plan, num_replicas)
                    cluster.wait()
                except KeyboardInterrupt:
                    say("finishing what is under way; again to stop at once")
                return 0 if cluster.drain(PATIENCE_S) else 1
    finally:
        remove_scratch(plan)


def _import() -> tuple[Any, Any]:
    try:
        from slos_serve.ray_serve.app import build_openai_app  # noqa: PLC0415
        from slos_serve.ray_serve.cluster import RayCluster  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtraError(module=error.name or "ray", extra="ray") from error
    return build_openai_app, RayCluster


def check(args: argparse.Namespace, bundle: dict[str, float]) -> None:
    """Raise `ConfigError` for a flag that would have no effect on Ray Serve, or more replicas than there are cores."""
    most = int(num_cores() / bundle.get("CPU", 1e-9)) if args.ray_address is None else sys.maxsize
    if (args.replicas or 1) > most:
        expected = f"at most {most}: each takes {bundle['CPU']:g} core, this machine has {num_cores()}"
        raise ConfigError(where="arguments", key="--replicas", value=args.replicas, expected=expected)
    if args.router is not None:
        from slos_serve.named import check_router  # noqa: PLC0415

        check_router(args.router, where="arguments", key="--router", more=("ray",))
    if args.ray_address is not None and args.log_format != "text":
        expected = "text with --ray-address: how a cluster's processes log is for its own environment to say"
        raise ConfigError(where="arguments", key="--log-format", value=args.log_format, expected=expected)
    arguments = EngineArguments(args.extra)
    for name in REFUSED:
        if arguments.has(name):
            expected = "none with --replicas or --ray-address (a proxy in front of them can do that)"
            value = "..." if name in SECRET else arguments.get(name)
            raise ConfigError(where="arguments", key=f"--{name}", value=value, expected=expected)
    for name in REFUSED_ENVIRONMENT:
        if os.environ.get(name):
            expected = "to be unset with --replicas or --ray-address: nobody would ask for it (a proxy in front can)"
            raise ConfigError(where="environment", key=name, value="...", expected=expected)


def check_address(address: str) -> None:
    """Raise `ConfigError` for an address where nobody answers: Ray itself would try for a minute."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdigit():
        raise ConfigError(
            where="arguments", key="--ray-address", value=address, expected="HOST:PORT of a head, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        expected = f"the address of a running cluster ({error.strerror or error})"
        raise ConfigError(where="arguments", key="--ray-address", value=address, expected=expected) from error


def bundle_of(args: argparse.Namespace, engine: InstalledVllm) -> dict[str, float]:
    """Return what one replica takes of a cluster: a GPU for each of vLLM's workers, or one core."""
    arguments = EngineArguments(args.extra)
    sizes = [arguments.get(name) or "1" for name in ("tensor-parallel-size", "pipeline-parallel-size")]
    workers = 1
    for size in sizes:
        workers *= int(size) if size.isdigit() else 1
    if engine.emulation is not None:
        return {"CPU": EMULATED_CORES}
    return {"CPU" if engine.is_cpu else "GPU": float(workers)}


def application(
    args: argparse.Namespace, engine: InstalledVllm, plan: Launch, profile: str | None, bundle: dict[str, float]
) -> dict[str, Any]:
    """Return what `ray_serve.app.build_openai_app` takes, from the launch of a single server."""
    from slos_serve.vllm_plugin.flags import engine_kwargs  # noqa: PLC0415

    flags = engine_kwargs(plan.arguments)
    additional = dict(flags.get("additional_config") or {})
    slo = {key: value for key, value in (additional.pop("slo", None) or {}).items() if key not in OF_ONE_ENGINE}
    slo |= {"profile": profile, "router": args.router or "slo"}
    if args.record is None:
        slo.pop("record", None)
    kwargs = {name: value for name, value in flags.items() if name not in NOT_ENGINE}
    if additional:
        kwargs["additional_config"] = additional
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": plan.model_name, "model_source": flags["model"]},
        "engine_kwargs": {**kwargs, "scheduler_cls": flags["scheduler_cls"]},
        "deployment_config": {"num_replicas": args.replicas or 1},
    }
    env = {name: os.environ[name] for name in SPEED_ENVIRONMENT if name in os.environ} | plan.env
    if env:
        config["runtime_env"] = {"env_vars": env}
    if engine.is_cpu:
        config["placement_group_config"] = {"bundles": [bundle]}
        config["deployment_config"]["ray_actor_options"] = {"num_cpus": 0}
    return {"llm_configs": [config], "slo": slo}


def profile_of(args: argparse.Namespace, plan: Launch) -> str | None:
    """Return the profile's file; measured now, on one server, where there is none. None: observe only."""
    if not plan.must_profile or plan.profile is None or plan.record is None:
        return str(plan.profile) if plan.profile else None
    if args.ray_address:
        say("no profile of the cluster's machines: observing only, until --profile names one")
        return None
    say("no profile yet: measuring on one server first")
    with set_aside(plan.profile):
        child = launch.start(plan.command, plan.env, stdout_to_stderr=True)
        try:
            launch.wait_healthy(child, plan.url, probe=True)
            measure(plan, plan.profile, plan.record)
        finally:
            launch.end(child)
    return str(plan.profile)


def _tell(args: argparse.Namespace, plan: Launch, num_replicas: int) -> None:
    if args.json:
        document = {"url": plan.url, "model": plan.model_name, "mode": plan.mode, "replicas": num_replicas}
        os.write(_STDOUT[-1], json.dumps(document).encode() + b"\n")


_STDOUT: list[int] = [1]


@contextlib.contextmanager
def quiet_stdout(wanted: bool) -> Iterator[None]:
    """Send what Ray prints to standard error, so that standard output holds one document."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    _STDOUT.append(os.dup(1))
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        real = _STDOUT.pop()
        os.dup2(real, 1)
        os.close(real)
