"""Many replicas on this machine, for real: what faults cost, what routing is worth, what Ray adds.

    python benchmarks/cluster.py demo      two replicas, one killed under load: what its clients see
    python benchmarks/cluster.py faults    kill, hang, slow, drain, late: a table of what became of every request
    python benchmarks/cluster.py routers   attainment by router at equal load with square bursts, three seeds each
    python benchmarks/cluster.py path      TTFT and token gaps of one replica behind Ray against a bare engine

A real vLLM serves the demo's small model in every replica, one thread each; classes, promises and rates follow
from its measured profile, as in the demo (`bench/scaled.py`). Nothing is tuned on what is reported. Results go
to `--out` as JSON, a table to the terminal. Times are the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ray import serve

from slos_serve.bench.client import BenchRequest, StreamResult, offer
from slos_serve.bench.grade import entry, grade_run
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.profile_file import Profile
from slos_serve.bench.profiling import warm_up
from slos_serve.bench.scaled import LENGTHS, MIX, Scaled
from slos_serve.bench.workload import build_requests, synthetic_trace
from slos_serve.ray_serve.app import build_openai_app
from slos_serve.ray_serve.cluster import APPLICATION, Cluster
from slos_serve.serving import launch, replicas, verb
from slos_serve.serving.platforms import num_cores

MODEL = "demo"
FLAGS = (
    *("--served-model-name", MODEL, "--max-model-len", "2048", "--max-num-seqs", "32"),
    *("--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager"),
)
BURSTS = "bursts:4:20:0.3"  # four times the base rate during the first 6 s of every 20
FAULTS = ("kill", "hang", "slow", "drain", "late")
FAULT_AT_S, FAULT_FOR_S, LATE_FOR_S = 10.0, 30.0, 90.0
RECOVERY_S = 240.0
BENCH_ROUTERS = ("slo", "ray", "round-robin")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bed:
    """A cluster of its own in this process, and the application on it."""

    def __init__(self, options: argparse.Namespace, router: str, count: int) -> None:
        self.count = count
        self.router = router
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.args = arguments(options, self.port, count, router)
        self.plan = verb.prepare(self.args, verb.find_engine(), os.environ, share=options.replicas)
        self.cluster = Cluster(None, num_cpus=max(num_cores(), count))

    def deploy(self, count: int) -> None:
        """Bring the application to `count` replicas, from none or from what runs."""
        engine = verb.find_engine()
        profile = str(self.plan.profile)
        document = replicas.application(self.args, engine, self.plan, profile, replicas.bundle_of(self.args, engine))
        document["llm_configs"][0]["deployment_config"]["num_replicas"] = count
        app = build_openai_app(document)
        if self.cluster.is_deployed():
            serve.run(app, name=APPLICATION, route_prefix="/")
        else:
            self.cluster.run(app, host="127.0.0.1", port=self.port)

    def status(self) -> list[dict[str, Any]]:
        """Return what the front door knows of the replicas."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/slo/status", timeout=5) as response:
                return (json.load(response).get("snapshot") or {}).get("replicas") or []
        except OSError:
            return []

    def usable(self) -> int:
        """Return how many replicas can be used."""
        return sum(one["usable"] for one in self.status())

    def wait_usable(self, count: int, patience_s: float) -> float | None:
        """Return the seconds until `count` replicas can be used, None where they never could."""
        started = time.monotonic()
        while time.monotonic() - started < patience_s:
            if self.usable() >= count:
                return time.monotonic() - started
            time.sleep(0.25)
        return None

    def wait_usable_below(self, count: int, patience_s: float) -> float:
        """Return the seconds until fewer than `count` replicas can be used."""
        started = time.monotonic()
        while time.monotonic() - started < patience_s and self.usable() >= count:
            time.sleep(0.25)
        return time.monotonic() - started

    def close(self) -> None:
        """End everything."""
        self.cluster.__exit__(None, None, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arguments(options: argparse.Namespace, port: int, count: int, router: str) -> argparse.Namespace:
    """Return what `slos-serve serve` would be given."""
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    model = options.model or ensure_demo_model()
    given = [str(model), "--host", "127.0.0.1", "--port", str(port), "--slo-mode", "enforce", *FLAGS]
    given += ["--replicas", str(count), "--router", router]
    given += ["--profile", str(options.profile)] if options.profile else []
    given += ["--slo-config", str(options.slo_config)] if options.slo_config else []
    if options.dummy:  # its steps are so short that planning takes a large share of them, and it would step down
        safety = {"slo": {"safety": {"is_enabled": False}}}
        given += ["--load-format", "dummy", "--additional-config", json.dumps(safety)]
    args, extra = parser.parse_known_args(given)
    args.extra, args.arguments = extra, given
    return args


def measure(options: argparse.Namespace) -> Scaled:
    """Measure the engine once on its own, fix the workload by it, and write the classes."""
    args = arguments(options, free_port(), options.replicas, "slo")
    plan = verb.prepare(args, verb.find_engine(), os.environ, share=options.replicas)
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


def requests_of(scaled: Scaled, rate_rps: float, duration_s: float, seed: int, process: str) -> list[BenchRequest]:
    rng = np.random.default_rng(seed)
    trace = synthetic_trace(LENGTHS, MIX, process=process, rate_rps=rate_rps, duration_s=duration_s, rng=rng)
    limits = {name: lengths.max_tokens for name, lengths in LENGTHS.items()}
    reference = scaled.profile.reference_s
    return build_requests(
        trace, config=scaled.config, reference=reference, rng=rng, limits=limits, id_prefix=f"c{seed}-"
    )


def warmed(bed: Bed) -> Bed:
    asyncio.run(warm_up(bed.url, MODEL, budget_s=4.0 * bed.count))
    return bed


# -- faults -----------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def fault(name: str, bed: Bed) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield a function that does it, to the busiest replica, and says to which; undo it at the end.

    kill: SIGKILL to all its processes. hang: SIGSTOP. slow: stopped half of the time. drain: a rolling update, each
    replica drained and replaced. late: killed before the load, so that its successor joins under it.
    """
    stop = threading.Event()
    hit: list[int] = []

    def strike() -> dict[str, Any]:
        busiest = max(bed.status(), key=lambda one: one.get("num_running") or 0)
        pids = family(int(busiest["pid"]))
        if name in ("kill", "late"):
            send(pids, signal.SIGKILL)
        elif name == "hang":
            hit.extend(pids)
            send(pids, signal.SIGSTOP)
        elif name == "slow":
            threading.Thread(target=slow_down, args=(pids[1:], stop), daemon=True).start()
        elif name == "drain":
            bed.deploy(bed.count)
        return busiest

    try:
        yield strike
    finally:
        stop.set()
        send(hit, signal.SIGCONT)


def slow_down(pids: Sequence[int], stop: threading.Event) -> None:
    """Let processes run half of the time."""
    try:
        while not stop.is_set():
            send(pids, signal.SIGSTOP)
            time.sleep(0.05)
            send(pids, signal.SIGCONT)
            time.sleep(0.05)
    finally:
        send(pids, signal.SIGCONT)


def run_fault(name: str, bed: Bed, scaled: Scaled, options: argparse.Namespace) -> dict[str, Any]:
    """Offer a steady load, strike once, and say what became of every request."""
    rate = options.rate or 0.35 * scaled.service_capacity_rps * bed.count
    strike_at_s, load_s = (0.0, LATE_FOR_S) if name == "late" else (FAULT_AT_S, FAULT_FOR_S)
    requests = requests_of(scaled, rate, load_s, options.seed, "poisson")
    struck: dict[str, Any] = {}
    with fault(name, bed) as strike:

        def hit() -> None:
            struck["at"] = time.perf_counter()
            struck.update(strike())
            if name in ("kill", "hang", "late"):
                bed.wait_usable_below(bed.count, 60.0)
            if name != "slow" and bed.wait_usable(bed.count, RECOVERY_S) is not None:
                struck["recovered"] = time.perf_counter()

        started = time.perf_counter()
        timer = threading.Timer(strike_at_s, hit)
        timer.start()
        results = asyncio.run(offer(bed.url, MODEL, requests, drain_timeout_s=90.0))
        timer.join()
    recovery_s = round(struck["recovered"] - struck["at"], 1) if "recovered" in struck else None
    return {"fault": name, **tally(requests, results, struck["at"] - started), "recovery_s": recovery_s}


def tally(requests: Sequence[BenchRequest], results: Sequence[StreamResult], at_s: float) -> dict[str, Any]:
    """Count ends.

    `unfinished`: still served when the run was over. `lost`: no end that says what happened. `doubled`: more tokens
    than were asked for.
    """
    counts = {"offered": len(results), "in_flight": 0, "completed": 0, "retried": 0, "failed_clearly": 0,
              "unfinished": 0, "lost": 0, "doubled": 0}  # fmt: skip
    for request, result in zip(requests, results, strict=True):
        begun = result.sent_s <= at_s
        counts["in_flight"] += begun and (result.finished_s is None or result.finished_s > at_s)
        counts["retried"] += bool((result.slo or {}).get("hops"))
        counts["doubled"] += result.num_output_tokens > request.output_tokens
        if result.error is None:
            whole = result.num_output_tokens == request.output_tokens
            counts["completed" if whole else "lost"] += 1
        elif "breaks off here" in result.error or result.status in (429, 503):
            counts["failed_clearly"] += 1
        elif result.error.startswith("cut off"):
            counts["unfinished"] += 1
        else:
            counts["lost"] += 1
            say(f"  lost: {result.error}")
    streams = grade_run(requests, results)
    graded = entry(streams, system="cluster", scenario="faults", span_s=FAULT_FOR_S)
    return {**counts, "attainment": graded["attainment"]}


def faults(options: argparse.Namespace) -> list[dict[str, Any]]:
    scaled = measure(options)
    rows = []
    bed = Bed(options, "slo", options.replicas)
    try:
        bed.deploy(options.replicas)
        bed.wait_usable(options.replicas, RECOVERY_S)
        warmed(bed)
        for name in options.only or FAULTS:
            say(f"fault: {name}")
            rows.append(run_fault(name, bed, scaled, options))
            say(json.dumps(rows[-1]))
            if bed.wait_usable(options.replicas, RECOVERY_S) is None:
                say("the cluster did not recover: no more faults")
                break
    finally:
        bed.close()
    return rows


# -- routers ----------------------------------------------------------------------------------------


def routers(options: argparse.Namespace) -> list[dict[str, Any]]:
    scaled = measure(options)
    rate = options.load * scaled.service_capacity_rps * options.replicas
    rows = []
    for router in options.only or BENCH_ROUTERS:
        bed = Bed(options, router, options.replicas)
        try:
            bed.deploy(options.replicas)
            warmed(bed)
            for seed in range(options.seed, options.seed + options.runs):
                requests = requests_of(scaled, rate, options.seconds, seed, BURSTS)
                results = asyncio.run(offer(bed.url, MODEL, requests))
                graded = entry(grade_run(requests, results), system=router, scenario="bursts", span_s=options.seconds)
                hops = sum(bool((one.slo or {}).get("hops")) for one in results)
                keys = ("num_requests", "met", "missed", "declined", "failed", "promised", "kept", "attainment")
                rows.append({"router": router, "seed": seed, "rate_rps": rate, **{k: graded[k] for k in keys},
                             "passed_on": hops, "ttft_s": graded["ttft_s"]})  # fmt: skip
                say(json.dumps(rows[-1]))
        finally:
            bed.close()
    return rows


# -- the path ---------------------------------------------------------------------------------------


def one_by_one(url: str, count: int, seed: int) -> dict[str, Any]:
    """Send requests one after the other; return TTFT and gaps in ms."""
    rng = np.random.default_rng(seed)
    ttft, gaps = [], []
    for i in range(count):
        ids = rng.integers(1000, 30_000, 64).tolist()
        request = BenchRequest(
            request_id=f"p{i}", offset_s=0.0, prompt_token_ids=ids, output_tokens=32, hidden_max_tokens=64
        )
        (result,) = asyncio.run(offer(url, MODEL, [request], slo_form="none"))
        assert result.error is None, result.error
        times = [at for at, _ in result.chunks]
        ttft.append(times[0] - result.sent_s)
        gaps += np.diff(times).tolist()
    return {"ttft_ms": quantiles(ttft), "gap_ms": quantiles(gaps)}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"mean": round(float(np.mean(seconds)) * 1e3, 2), "p50": round(float(p50), 2), "p99": round(float(p99), 2)}


def path(options: argparse.Namespace) -> list[dict[str, Any]]:
    measure(options)
    rows = []
    args = arguments(options, free_port(), 1, "slo")
    plan = verb.prepare(args, verb.find_engine(), os.environ, share=options.replicas)
    child = launch.start(plan.command, plan.env, stdout_to_stderr=True)
    try:
        launch.wait_healthy(child, plan.url, probe=True)
        asyncio.run(warm_up(plan.url, MODEL, budget_s=4.0))
        rows.append({"server": "bare", **one_by_one(plan.url, options.requests, options.seed)})
        say(json.dumps(rows[-1]))
    finally:
        launch.end(child)
    bed = Bed(options, "slo", 1)
    try:
        bed.deploy(1)
        warmed(bed)
        rows.append({"server": "ray", **one_by_one(bed.url, options.requests, options.seed)})
        say(json.dumps(rows[-1]))
    finally:
        bed.close()
    return rows


# -- the demo ---------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> list[dict[str, Any]]:
    scaled = measure(options)
    bed = Bed(options, "slo", options.replicas)
    try:
        say(f"starting {options.replicas} replicas (about a minute)")
        bed.deploy(options.replicas)
        warmed(bed)
        say(f"serving at {bed.url}/v1; in {FAULT_AT_S:.0f} s one replica is killed")
        row = run_fault("kill", bed, scaled, options)
    finally:
        bed.close()
    return [row]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row.get(name)) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_cell(one)}" for key, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "faults", "routers", "path"))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--profile", type=Path, help="measured profile (default: the cache, or measured first)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's)")
    parser.add_argument("--dummy", action="store_true", help="random weights: a folder with a config.json is enough")
    parser.add_argument("--rate", type=float, help="faults, demo: requests/s (default: 0.35 of the capacity)")
    parser.add_argument("--only", action="append", help="one fault or router; may be given more than once")
    parser.add_argument("--load", type=float, default=0.5, help="routers: share of the replicas' capacity")
    parser.add_argument("--seconds", type=float, default=40.0, help="routers: length of one run")
    parser.add_argument("--runs", type=int, default=3, help="routers: seeds for each")
    parser.add_argument("--requests", type=int, default=60, help="path: requests for each server")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("cluster-report"))
    options = parser.parse_args()
    options.slo_config = None
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {"demo": demo, "faults": faults, "routers": routers, "path": path}[options.what](options)
    (options.out / f"{options.what}.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
