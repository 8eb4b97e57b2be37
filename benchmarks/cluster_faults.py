"""What a fault costs: one replica is struck under a steady load, and every request is accounted for."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from cluster_bed import MODEL, App, Bed, capacity_rps, measure, requests_of
from cluster_terminal import say
from ray import serve

from slos_serve.bench.client import BenchRequest, StreamResult, offer
from slos_serve.bench.endings import LOST, REFUSED, ending
from slos_serve.bench.grade import entry, grade_run
from slos_serve.bench.scaled import Scaled
from slos_serve.ray_serve.cluster import APPLICATION

FAULTS = ("kill", "hang", "slow", "drain", "late", "pause")
FAULT_AT_S, FAULT_FOR_S, LONG_FOR_S = 10.0, 30.0, 90.0
PAUSE_S = 70.0  # longer than a replica that is not paused may go without a step
SHARE = 0.35  # of the capacity: one of two replicas could nearly carry it
NOTICE_S, RECOVERY_S = 60.0, 240.0


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def each(processes: Sequence[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    """Do something to every process that is still there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            act(process)


@contextmanager
def fault(name: str, bed: Bed, app: App) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield a function that does it, to the busiest replica, and says to which; undo it at the end.

    kill: SIGKILL to all its processes. hang: SIGSTOP. slow: stopped half of the time. drain: a rolling update, each
    replica drained and replaced. late: killed before the load, so that its successor joins under it. pause: by its
    operator, in mode `keep`; whichever replica Ray gives the order to.
    """
    stop = threading.Event()
    stopped: list[psutil.Process] = []

    def strike() -> dict[str, Any]:
        busiest = max(app.status(), key=lambda one: one.get("num_running") or 0)
        processes = family(int(busiest["pid"]))
        if name in ("kill", "late"):
            each(processes, psutil.Process.kill)
        elif name == "hang":
            stopped.extend(processes)
            each(processes, psutil.Process.suspend)
        elif name == "slow":
            threading.Thread(target=slow_down, args=(processes[1:], stop), daemon=True).start()
        elif name == "drain":
            bed.deploy()
        elif name == "pause":
            return pause(app, stop)
        return busiest

    try:
        yield strike
    finally:
        stop.set()
        each(stopped, psutil.Process.resume)


def pause(app: App, stop: threading.Event) -> dict[str, Any]:
    """Pause one replica for `PAUSE_S`, and return what it says of itself then."""
    handle = serve.get_deployment_handle(app.status()[0]["deployment"], APPLICATION)
    handle.pause.remote(mode="keep").result(timeout_s=NOTICE_S)

    def resume() -> None:
        stop.wait(PAUSE_S)
        handle.broadcast("resume").results(timeout_s=NOTICE_S)

    threading.Thread(target=resume, daemon=True).start()
    app.wait_until(lambda _: any(one["paused"] for one in app.status()), NOTICE_S)
    return next(one for one in app.status() if one["paused"])


def slow_down(processes: Sequence[psutil.Process], stop: threading.Event) -> None:
    """Let processes run half of the time."""
    try:
        while not stop.is_set():
            each(processes, psutil.Process.suspend)
            time.sleep(0.05)
            each(processes, psutil.Process.resume)
            time.sleep(0.05)
    finally:
        each(processes, psutil.Process.resume)


def run_fault(name: str, bed: Bed, app: App, scaled: Scaled, options: argparse.Namespace) -> dict[str, Any]:
    """Offer a steady load, strike once, and say what became of every request."""
    rate = options.rate or SHARE * capacity_rps(scaled, bed.num_replicas)
    strike_at_s = 0.0 if name == "late" else FAULT_AT_S
    load_s = LONG_FOR_S if name in ("late", "pause") else FAULT_FOR_S
    requests = requests_of(scaled, rate, load_s, options.seed, "poisson")
    struck: dict[str, Any] = {}
    before = {one["pid"] for one in app.status()}
    with fault(name, bed, app) as strike:

        def hit() -> None:
            struck["at"] = time.perf_counter()
            struck.update(strike())
            say(f"{name}: replica {struck['id']}, {struck['num_running'] or 0} requests under way there")
            if name in ("kill", "hang", "late", "pause"):
                app.wait_until(lambda usable: usable < bed.num_replicas, NOTICE_S)
                say(f"  noticed after {time.perf_counter() - struck['at']:.1f} s")
            if name != "slow" and app.wait_until(lambda usable: usable >= bed.num_replicas, RECOVERY_S) is not None:
                struck["recovered"] = time.perf_counter()
                say(f"  {bed.num_replicas} replicas serve again after {struck['recovered'] - struck['at']:.0f} s")

        started = time.perf_counter()
        timer = threading.Timer(strike_at_s, hit)
        timer.start()
        results = asyncio.run(offer(app.url, MODEL, requests, drain_timeout_s=90.0))
        timer.join()
    recovery_s = round(struck["recovered"] - struck["at"], 1) if "recovered" in struck else None
    ended = tally(requests, results, struck["at"] - started)
    return {"fault": name, **ended, "replaced": len(before - {one["pid"] for one in app.status()}),
            "recovery_s": recovery_s}  # fmt: skip


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
        end = ending(request, result)
        counts["failed_clearly" if end == REFUSED else end] += 1
        if end == LOST:
            say(f"  lost: {result.error}")
    streams = grade_run(requests, results)
    graded = entry(streams, system="cluster", scenario="faults", span_s=FAULT_FOR_S)
    return {**counts, **{key: graded[key] for key in ("promised", "kept", "attainment")}}


def brought_up(bed: Bed) -> App:
    """Return the application, warm, with all its replicas known to the front door."""
    say(f"starting {bed.num_replicas} replicas (about a minute and a half)")
    app = bed.deploy()
    app.warm(bed.num_replicas)
    app.wait_until(lambda usable: usable >= bed.num_replicas, NOTICE_S)
    return app


def faults(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Strike once for each fault, on one cluster that recovers in between."""
    scaled = measure(options)
    rows = []
    with Bed(options) as bed:
        app = brought_up(bed)
        for name in options.only or FAULTS:
            rows.append(run_fault(name, bed, app, scaled, options))
            say(json.dumps(rows[-1]))
            if app.wait_until(lambda usable: usable >= bed.num_replicas, RECOVERY_S) is None:
                say("the cluster did not recover: no more faults")
                break
    return rows


def demo(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kill one of the replicas under load and say what its clients saw."""
    scaled = measure(options)
    with Bed(options) as bed:
        app = brought_up(bed)
        say(f"serving at {app.url}/v1 under load; in {FAULT_AT_S:.0f} s the busier replica is killed, engine and all")
        row = run_fault("kill", bed, app, scaled, options)
        say(told(row, bed.num_replicas))
    return [row]


def told(row: dict[str, Any], num_replicas: int) -> str:
    """Return a row in sentences."""
    recovery = "it had not been replaced when the run ended"
    if row["recovery_s"] is not None:
        recovery = f"{num_replicas} replicas served again after {row['recovery_s']:.0f} s"
    return (
        f"\n{row['offered']} requests, {row['in_flight']} of them under way at the kill. {row['completed']} completed "
        f"({row['retried']} after trying another replica), {row['failed_clearly']} had begun on the killed replica and "
        f"ended with an error that says so, {row['lost']} were lost, {row['doubled']} answered twice. "
        f"{row['kept']} of {row['promised']} promises kept; {recovery}.\n"
    )
