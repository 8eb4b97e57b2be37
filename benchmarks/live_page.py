"""What open live pages cost: CPU time of a server of these pages, fed as by an engine, with and without them.

    python benchmarks/live_page.py [--pages 1,200] [--seconds 20]
    python benchmarks/live_page.py --browser 60       # one page in a real headless Chromium, for 60 minutes

The server makes 40 steps and ends a request a second, one in ten of them broken or declined. No engine runs. What is
measured is the server's CPU time, which other work on the machine moves little.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import aiohttp
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.http.browser import browser, chromium

from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics
from slos_serve.http.middleware import SloMiddleware

LOAD = {"mode": "enforce", "effective_mode": "enforce", "num_promised": 17, "num_best_effort": 4, "num_waiting": 3}
STEP = (0.02, 0.021, 0.024, 500, 400, 10, 40)
OUTCOMES = (*["met"] * 18, "missed", "declined")
DECLINED = {"verdict": "best-effort", "reason": "compute"}
SETTLE_S = 5.0
SAMPLE_S = 300.0


def feed(hub: Hub) -> None:
    """Fill an hour, then go on as an engine that makes 40 steps and ends a request a second does."""
    for ago_s in range(3600, 0, -10):
        hub.history.take_load(time.time() - ago_s, LOAD)
        hub.history.take_steps(time.time() - ago_s, [STEP] * 40)
        hub.history.take_end(
            time.time() - ago_s, "chat", {"outcome": "met", "promised": True, "stages": {"prefill": "met"}}
        )
    for number in range(1 << 30):
        hub.feed({"snapshot": {**LOAD, "steps": 10 * number}, "steps": [STEP] * 10})
        if number % 4 == 0:
            told = {"slo_id": f"{number:x}", "request_id": f"cmpl-{number}-0", "slo_class": "chat", "tenant": ""}
            outcome = OUTCOMES[number // 4 % len(OUTCOMES)]
            is_promised = outcome != "declined"
            verdict = {"verdict": "promised", "reason": ""} if is_promised else DECLINED
            hub.open(told["slo_id"], slo_class="chat", tenant="", arrival_s=time.time())
            hub.feed({"verdicts": [{**told, **verdict}]})
            hub.feed({"finished": [{**told, "outcome": outcome, "promised": is_promised}]})
        time.sleep(0.25)


def serve(port: int) -> None:
    """Serve the pages of a hub that is fed."""

    async def lost(_request: object, _error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": "Not Found"}}, status_code=404)

    hub = Hub(SloMetrics(CollectorRegistry()))
    threading.Thread(target=feed, args=(hub,), daemon=True).start()
    app = Starlette(middleware=[Middleware(SloMiddleware, hub=hub)], exception_handlers={404: lost})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", ws="none", lifespan="off")


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, pid: int, count: int, seconds: float) -> str:
    """Open pages, and return what the server spends on them."""
    sizes: list[int] = []

    async def page(session: aiohttp.ClientSession) -> None:
        async with session.get(f"{url}/v1/slo/events") as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    sizes.append(len(line))  # noqa: PERF401 -- as they come

    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=None)}
    async with aiohttp.ClientSession(read_bufsize=1 << 22, **limits) as session:
        tasks = [asyncio.create_task(page(session)) for _ in range(count)]
        await asyncio.sleep(SETTLE_S)
        before, spent_s, began_s = len(sizes), cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds)
        share = (cpu_s(pid) - spent_s) / (time.monotonic() - began_s)
        for task in tasks:
            task.cancel()
    told = sizes[before:]
    mean = sum(told) / len(told) if told else 0.0
    return f"{count:4} pages: {100 * share:5.2f} % of a core, {len(told)} events of {mean / 1e3:.1f} kB"


def resident_mb(pid: int) -> float:
    """Return the memory of a process that is resident."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def watch(url: str, pid: int, minutes: float) -> None:
    """Keep the page open in a browser; say every five minutes what server and page hold, and what the server spent."""
    program = chromium() or sys.exit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder:
        async with browser(program, Path(folder)) as tab:
            await tab.open(f"{url}/slo")
            await tab.until("document.querySelector('#list details') !== null")
            for domain in ("Performance", "HeapProfiler"):
                await tab.call(f"{domain}.enable")
            began_s = sampled_s = time.monotonic()
            spent_s = first_s = cpu_s(pid)
            while sampled_s - began_s < 60 * minutes:
                until_s = min(sampled_s + SAMPLE_S, began_s + 60 * minutes)
                while time.monotonic() < until_s:
                    await tab.value("0")  # reads what the browser says meanwhile
                    await asyncio.sleep(1)
                await tab.call("HeapProfiler.collectGarbage")
                page = {one["name"]: one["value"] for one in (await tab.call("Performance.getMetrics"))["metrics"]}
                now_s, cpu = time.monotonic(), cpu_s(pid)
                print(
                    f"{(now_s - began_s) / 60:5.1f} min: server {100 * (cpu - spent_s) / (now_s - sampled_s):.2f} % "
                    f"of a core, {resident_mb(pid):.1f} MB; page {page['JSHeapUsedSize'] / 1e6:.1f} MB of objects, "
                    f"{page['Nodes']:.0f} nodes, {page['JSEventListeners']:.0f} listeners; errors {len(tab.errors)}",
                    flush=True,
                )
                spent_s, sampled_s = cpu, now_s
            print(f"in all: {100 * (cpu_s(pid) - first_s) / (sampled_s - began_s):.2f} % of a core")


async def run(url: str, pid: int, counts: list[int], seconds: float, minutes: float) -> None:
    """Measure without pages and with some, or for so many minutes with one in a browser."""
    async with aiohttp.ClientSession() as session:
        for _ in range(240):
            try:
                async with session.get(f"{url}/v1/slo/live") as answer:
                    print(f"the whole document: {len(await answer.read()) / 1e3:.0f} kB")
                    break
            except aiohttp.ClientError:
                await asyncio.sleep(0.25)
    if minutes:
        await watch(url, pid, minutes)
        return
    for count in (0, *counts):
        print(await measure(url, pid, count, seconds), flush=True)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", default="1,200", help="how many are open, one measurement each (1,200)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (20)")
    parser.add_argument("--browser", type=float, default=0.0, metavar="MINUTES", help="one page in Chromium instead")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    try:
        counts = [int(n) for n in args.pages.split(",")]
        asyncio.run(run(f"http://127.0.0.1:{port}", server.pid or 0, counts, args.seconds, args.browser))
    finally:
        server.kill()
        server.join()


if __name__ == "__main__":
    main()
