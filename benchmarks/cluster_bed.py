"""A real cluster on this machine for the benchmarks: Ray, replicas of a small vLLM, and the load for them.

A real vLLM serves the demo's small model in every replica, one thread each, or on an emulated device (`--emulate`),
which loads no weights and takes no core; classes, promises and rates follow from its measured profile, as in the demo
(`bench/scaled.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from cluster_terminal import say
from ray import serve

from slos_serve.bench.client import BenchRequest
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.profiling import warm_up
from slos_serve.bench.scaled import LENGTHS, MIX, Scaled
from slos_serve.bench.workload import build_requests, synthetic_trace
from slos_serve.commands.serve import configure
from slos_serve.emulated.emulation import LEAVES_OUT, notice
from slos_serve.ray_serve.app import STATS_PERIOD_S, build_openai_app
from slos_serve.ray_serve.cluster import APPLICATION, RayCluster
from slos_serve.records.profile import Profile
from slos_serve.serving import prepare, replicas
from slos_serve.serving.platforms import num_cores

MODEL = "demo"
FLAGS = (
    *("--served-model-name", MODEL, "--max-model-len", "2048", "--max-num-seqs", "32"),
    *("--max-num-batched-tokens", "512"),
)
CPU_FLAGS = ("--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager")
POLL_S = 0.25
PATH_TOKEN_S = 6.6e-3  # CPU time of a token's way through Ray, engine apart: cluster.py path


class Bed:
    """A Ray of its own in this process with room for all replicas; a context manager, leaving ends everything."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.num_replicas = options.replicas
        self.port = free_port()
        self.args = arguments(options, self.port, self.num_replicas)
        self.engine = prepare.find_engine(options.emulate)
        self.plan = prepare.prepare(self.args, self.engine, os.environ, share=self.num_replicas)
        self.cluster = RayCluster(None, num_cpus=max(num_cores(), self.num_replicas))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__(None, None, None)

    def deploy(self, *, switch: Path | None = None, scaling: dict[str, Any] | None = None) -> App:
        """Bring up the application, or roll it over to a new version of itself; `switch`: see `cluster_switch`."""
        bundle = replicas.bundle_of(self.args, self.engine)
        document = replicas.application(self.args, self.engine, self.plan, str(self.plan.profile), bundle)
        settings = document["llm_configs"][0]["deployment_config"]
        if switch is not None:
            settings["request_router_config"] = {
                "request_router_class": "cluster_switch.SwitchedRouter",
                "request_router_kwargs": {"switch": str(switch.resolve())},
                "request_routing_stats_period_s": STATS_PERIOD_S,
            }
        if scaling is None:
            settings["num_replicas"] = self.num_replicas
        else:
            del settings["num_replicas"]
            settings["autoscaling_config"] = scaling
        built = build_openai_app(document)
        if self.cluster.is_deployed():
            serve.run(built, name=APPLICATION, route_prefix="/")
        else:
            self.cluster.run(built, host="127.0.0.1", port=self.port)
        return App(f"http://127.0.0.1:{self.port}")


class App:
    """The application, seen from outside."""

    def __init__(self, url: str) -> None:
        self.url = url

    def status(self) -> list[dict[str, Any]]:
        """Return what the front door knows of the replicas."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/slo/status", timeout=5) as response:
                return (json.load(response).get("snapshot") or {}).get("replicas") or []
        except OSError:
            return []

    def num_usable(self) -> int:
        """Return how many replicas can be used."""
        return sum(one["usable"] for one in self.status())

    def wait_until(self, holds: Callable[[int], bool], patience_s: float) -> float | None:
        """Return the seconds until that holds of the number of usable replicas, None where it never did."""
        started = time.monotonic()
        while time.monotonic() - started < patience_s:
            if holds(self.num_usable()):
                return time.monotonic() - started
            time.sleep(POLL_S)
        return None

    def warm(self, num_replicas: int) -> None:
        """Send one round of shapes, so that no first call is part of a measurement."""
        asyncio.run(warm_up(self.url, MODEL, budget_s=4.0 * num_replicas))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arguments(options: argparse.Namespace, port: int, count: int) -> argparse.Namespace:
    """Return what `slos-serve serve` would be given."""
    parser = argparse.ArgumentParser()
    configure(parser)
    model = options.model or ensure_demo_model()
    given = [str(model), "--host", "127.0.0.1", "--port", str(port), "--slo-mode", "enforce", *FLAGS]
    given += ["--replicas", str(count), *(["--emulate", options.emulate] if options.emulate else CPU_FLAGS)]
    given += ["--profile", str(options.profile)] if options.profile else []
    given += ["--slo-config", str(options.slo_config)] if options.slo_config else []
    given += ["--record", str(options.record)] if options.record else []
    if options.dummy:  # its steps are so short that planning takes a large share of them, and it would step down
        safety = {"slo": {"safety": {"is_enabled": False}}}
        given += ["--load-format", "dummy", "--additional-config", json.dumps(safety)]
    args, extra = parser.parse_known_args(given)
    args.extra, args.arguments = extra, given
    return args


def measure(options: argparse.Namespace) -> Scaled:
    """Measure the engine once on its own, fix the workload by it, and write the classes."""
    args = arguments(options, free_port(), options.replicas)
    engine = prepare.find_engine(options.emulate)
    plan = prepare.prepare(args, engine, os.environ, share=options.replicas)
    if engine.emulation is not None:
        say(f"the device is EMULATED ({engine.emulation.text}): {LEAVES_OUT}")
    if plan.must_profile:
        say("measuring how long the engine's steps take, on one replica (two minutes, once)")
    options.profile = options.profile or Path(str(replicas.profile_of(args, plan)))
    scaled = Scaled(profile=Profile.load(options.profile))
    options.slo_config = options.out / "classes.yaml"
    config = scaled.config
    classes = {name: {k: v for k, v in one.to_json().items() if k != "name"} for name, one in config.classes.items()}
    document = {"ttft_floor_ms": config.ttft_floor_ms, "ttft_allowance_ms": config.ttft_allowance_ms}
    options.slo_config.write_text(yaml.safe_dump({**document, "classes": classes}))
    say(f"one replica alone: decode step {scaled.profile.decode_step_s * 1e3:.0f} ms, "
        f"capacity {scaled.service_capacity_rps:.2f} requests/s")  # fmt: skip
    return scaled


def capacity_rps(scaled: Scaled, num_replicas: int) -> float:
    """Return what so many replicas can serve here: all their capacity, or what the cores can carry, path included."""
    tokens = sum(share * LENGTHS[name].mean_tokens()[1] for name, share in MIX.items())
    each_s = 1.0 / scaled.service_capacity_rps
    core_s = 0.0 if notice(scaled.profile.document.get("key")) else each_s  # an emulated device computes nothing
    return min(num_replicas / each_s, num_cores() / (core_s + tokens * PATH_TOKEN_S))


def requests_of(scaled: Scaled, rate_rps: float, duration_s: float, seed: int, process: str) -> list[BenchRequest]:
    """Return the requests of one run; the same for everything that is compared."""
    rng = np.random.default_rng(seed)
    trace = synthetic_trace(LENGTHS, MIX, process=process, rate_rps=rate_rps, duration_s=duration_s, rng=rng)
    limits = {name: lengths.max_tokens for name, lengths in LENGTHS.items()}
    reference = scaled.profile.reference_s
    return build_requests(
        trace, config=scaled.config, reference=reference, rng=rng, limits=limits, id_prefix=f"c{seed}-"
    )
