"""Long runs: does anything grow? Mixed traffic on a real server, and a week of virtual time.

    python benchmarks/soak.py server --minutes 60      # vLLM with an emulated device, as in faults.py: soak-report/
    python benchmarks/soak.py virtual --days 7         # the simulator: what planner and learners keep

On the server: requests of every class, unknown tenants, sessions, clients that leave, malformed ones, and the live page
open all the time; every few seconds memory, descriptors and threads of each process, files in its private folder and
its record, sizes that `/v1/slo/status` tells. At the end, idle, what a look of the live page costs the server.
Growth is the slope of a line through the second half of a curve, per hour and relative to its mean; the first half
is warm-up. Curves as PNG, samples and slopes as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from faults import MODEL, Bed, prepare, say

from slos_serve import figures
from slos_serve.bench.client import BenchRequest, Client, StreamResult
from slos_serve.bench.endings import account
from slos_serve.bench.engines import ServerProcesses, free_port
from slos_serve.bench.http_json import get_json
from slos_serve.bench.scaled import Scaled
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Request, Slo
from slos_serve.places import private_folder
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.replica.requests import SimRequest
from slos_serve.sim.run import run_workload
from slos_serve.sim.workloads.workload import Workload
from slos_serve.terminal.signals import ending_by_signal

SAMPLE_S = 5.0
PAGE_ASKS, PAGE_EVERY_S = ("/v1/slo/status", "/v1/slo/requests", "/metrics"), 4.0
IDLE_S, NUM_LOOKS = 10.0, 50
MAX_GROWTH = 0.05  # of the mean, over the second half of the run


def sample(bed: Bed, record: Path) -> dict[str, float]:
    """Return what the server holds now."""
    found: dict[str, float] = {}
    for process in bed.processes():
        with suppress(psutil.Error):
            name = role(process)
            found[f"{name} memory MB"] = found.get(f"{name} memory MB", 0.0) + process.memory_info().rss / 1e6
            found[f"{name} descriptors"] = found.get(f"{name} descriptors", 0) + process.num_fds()
            found[f"{name} threads"] = found.get(f"{name} threads", 0) + process.num_threads()
    found["private files"] = sum(1 for path in private_folder().rglob("*") if not path.is_dir())
    found["record MB"] = sum(path.stat().st_size for path in record.parent.glob(f"{record.name}*")) / 1e6
    with suppress(Exception):
        status = get_json(f"{bed.url}/v1/slo/status")
        found["status bytes"] = len(json.dumps(status))
    return found


def role(process: psutil.Process) -> str:
    """Return which part of a server a process is."""
    words = " ".join([process.name(), *process.cmdline()])
    if "EngineCor" in words:
        return "engine"
    return "launcher" if "slos_serve.cli" in words else "API server" if "vllm_command" in words else "other"


async def load(bed: Bed, scaled: Scaled, options: argparse.Namespace, until: float) -> dict[str, int]:
    """Offer traffic until a time, a minute's worth at a time; return the ends of all of it."""
    totals: dict[str, int] = {}
    rng, minute = random.Random(options.seed), 0
    rate = 0.8 * min(scaled.service_capacity_rps, options.most_rps)
    async with Client(bed.url, MODEL) as client:
        while time.monotonic() < until:
            span = min(60.0, until - time.monotonic())
            offered = [mixed(one, rng) for one in scaled.requests(rate_rps=rate, duration_s=span, seed=minute)]
            leaving = asyncio.create_task(leave(client, offered[:3]))
            refused = asyncio.create_task(nonsense(bed, rng))
            results = await client.offer(offered, drain_timeout_s=60.0)
            await asyncio.gather(leaving, refused)
            for name, count in account(offered, results).items():
                totals[name] = totals.get(name, 0) + count
            minute += 1
    return totals


def mixed(request: BenchRequest, rng: random.Random) -> BenchRequest:
    """Give a request a name of many for its tenant and session, as strangers do."""
    extra = {"session_id": f"s{rng.randrange(10**9)}", "user": f"u{rng.randrange(10**9)}"}
    return replace(request, extra={**request.extra, **extra})


async def nonsense(bed: Bed, rng: random.Random) -> None:
    """Send a request that is refused."""
    slo = rng.choice(
        ({"class": "x" * 500}, {"ttft_ms": -1}, {"ttft_ms": 1e300}, [], {"tenant": "\0"}, {"clas": "chat"})
    )
    async with aiohttp.ClientSession() as session:
        with suppress(aiohttp.ClientError):
            body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "slo": slo}
            await (await session.post(f"{bed.url}/v1/completions", json=body)).read()


def look(bed: Bed) -> None:
    """Ask what the live page asks."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path in PAGE_ASKS:
        with opener.open(bed.url + path, timeout=10) as response:
            response.read()


async def keep_page_open(bed: Bed, until: float) -> None:
    """Ask as often as an open page does."""
    while time.monotonic() < until:
        with suppress(OSError):
            await asyncio.to_thread(look, bed)
        await asyncio.sleep(PAGE_EVERY_S)


def page_cost(bed: Bed) -> dict[str, float]:
    """Return what looks of the page cost the server's processes, in CPU time, beyond what idling costs them."""

    def used() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in bed.processes())

    began, started = used(), time.monotonic()
    time.sleep(IDLE_S)
    idle = (used() - began) / (time.monotonic() - started)
    began, started = used(), time.monotonic()
    for _ in range(NUM_LOOKS):
        look(bed)
    each = (used() - began - idle * (time.monotonic() - started)) / NUM_LOOKS
    return {"idle_share_of_a_core": idle, "ms_a_look": 1000 * each, "share_of_a_core_while_open": each / PAGE_EVERY_S}


async def leave(client: Client, requests: Sequence[BenchRequest]) -> None:
    """Send requests and go before they are answered."""
    for request in requests:
        result = StreamResult(request_id=request.request_id, sent_s=client.now_s())
        with suppress(TimeoutError):
            await asyncio.wait_for(client.stream(client.body(request), result), 0.5)


def on_server(options: argparse.Namespace) -> dict[str, Any]:
    """Run the server under load; return samples and ends."""
    scaled, record = prepare(options), options.out / "record.jsonl"
    samples: list[dict[str, float]] = []
    with ending_by_signal(), ServerProcesses(options.out) as fleet:
        bed = Bed(fleet, options, options.port or free_port(), ("--record", str(record.resolve())))
        bed.start()
        started = time.monotonic()
        until = started + 60 * options.minutes

        async def watch() -> None:
            while time.monotonic() < until:
                samples.append({"s": time.monotonic() - started, **await asyncio.to_thread(sample, bed, record)})
                await asyncio.sleep(SAMPLE_S)

        async def both() -> dict[str, int]:
            watching = [asyncio.create_task(watch()), asyncio.create_task(keep_page_open(bed, until))]
            try:
                return await load(bed, scaled, options, until)
            finally:
                await asyncio.gather(*watching)

        ends = asyncio.run(both())
        cost = page_cost(bed)
    return {"kind": "server", "ends": ends, "page": cost, "samples": samples}


def virtual(options: argparse.Namespace) -> dict[str, Any]:
    """Serve days of virtual time at a light load; return what the simulator's learners and this process keep."""
    rng = np.random.default_rng(options.seed)
    count = int(options.days * 86400 * options.rate)
    times = np.sort(rng.uniform(0, options.days * 86400, count))
    prompts, outputs = rng.integers(20, 1500, count), rng.integers(2, 300, count)
    kinds = rng.choice(["chat", "coding", "best-effort"], count, p=[0.5, 0.3, 0.2])
    slos = {"chat": Slo(ttft_s=1.0, tpot_s=0.1), "coding": Slo(ttft_s=0.5, tpot_s=0.05), "best-effort": Slo()}
    sims = [
        SimRequest(
            request=Request(
                request_id=f"v{i}", arrival_s=float(times[i]), num_prompt_tokens=int(prompts[i]),
                max_output_tokens=512, slo=slos[str(kinds[i])], slo_class=str(kinds[i]),
            ),
            num_output_tokens=int(outputs[i]),
        )
        for i in range(count)
    ]  # fmt: skip
    work = Workload(name="days", arrivals=sims, duration_s=float(times[-1]))
    process, samples, planner = psutil.Process(), [], SloPlanner()

    def on_progress(done: int) -> None:
        if done % max(1, count // 200) == 0:
            samples.append({"s": float(times[min(done, count - 1)]), "memory MB": process.memory_info().rss / 1e6,
                            "planner bytes": float(len(repr(vars(planner))))})  # fmt: skip

    started = time.perf_counter()
    result = run_workload(work, planner, load_hardware("a100-80g-7b-measured"), on_progress=on_progress,
                          options=ReplicaOptions(learns_times=True))  # fmt: skip
    replica = result.replica
    held = {"rows left": len(replica.table), "blocks left": replica.limits.num_kv_blocks - replica.engine.pool.num_free,
            "lengths bytes": len(json.dumps(replica.lengths.to_json()))}  # fmt: skip
    entry = result.entry(system="slos-serve", wall_s=time.perf_counter() - started)
    keys = ("num_requests", "met", "missed", "declined", "failed", "attainment", "num_steps", "simulated_s", "wall_s")
    return {"kind": "virtual", "ends": {key: entry[key] for key in keys}, "held": held, "samples": samples}


def growth(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return for each curve its mean and growth over the second half: absolute, and as a share of the mean."""
    later = samples[len(samples) // 2 :]
    found = {}
    for name in sorted({key for one in later for key in one} - {"s"}):
        points = [(one["s"], one[name]) for one in later if name in one]
        if len(points) < 3:
            continue
        at, values = np.array(points).T
        slope = float(np.polyfit(at - at[0], values, 1)[0]) * float(at[-1] - at[0])
        mean = float(values.mean())
        found[name] = {"mean": round(mean, 3), "growth": round(slope, 4), "share": round(slope / max(mean, 1e-9), 4)}
    return found


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw every curve, one below the other."""
    names = list(document["growth"])
    with figures.style() as pyplot:
        figure, axes = pyplot.subplots(len(names), 1, figsize=(7, 1.5 * len(names)), sharex=True, squeeze=False)
        for axis, name in zip(axes[:, 0], names, strict=True):
            points = [(one["s"] / 3600, one[name]) for one in document["samples"] if name in one]
            axis.plot(*zip(*points, strict=True))
            axis.set_title(name, fontsize=8, loc="left")
            axis.set_ylim(0, 1.15 * max(value for _, value in points))
        axes[-1, 0].set_xlabel("hours")
        figures.save(figure, path)


def main() -> int:
    """Run, write and judge; 1 where something grew that should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("server", "virtual"))
    parser.add_argument("--device", choices=("emulated", "cpu"), default="emulated")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--rate", type=float, default=0.1, help="virtual requests a second (default: 0.1)")
    parser.add_argument("--most-rps", type=float, default=12.0, help="what this machine can carry (default: 12)")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("soak-report"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    document = on_server(options) if options.kind == "server" else virtual(options)
    document["growth"] = growth(document["samples"])
    (options.out / f"{options.kind}.json").write_text(json.dumps(document, indent=1, default=float))
    plot(document, options.out / f"{options.kind}.png")
    say(json.dumps({key: value for key, value in document.items() if key not in ("samples", "growth")}, default=float))
    for name, one in document["growth"].items():
        print(f"{name:<24} mean {one['mean']:>12.2f}   grew by {one['share']:>8.2%} over the second half")
    grew = [name for name, one in document["growth"].items() if one["share"] > MAX_GROWTH and "record" not in name]
    lost = document["ends"].get("lost", 0) + document["ends"].get("doubled", 0)
    print(f"grew: {', '.join(grew) or 'nothing'}; lost or doubled: {lost}")
    return 1 if grew or lost else 0


if __name__ == "__main__":
    sys.exit(main())
