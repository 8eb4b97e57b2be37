"""What the plug-in costs inside a real engine under load: thread CPU per step, device idle time, token gaps.

    python benchmarks/in_place.py --hardware h100-8b-derived,a100-80g-7b-measured --scheduling async,sync --running 8,64

The device is emulated, everything else is real: vLLM's server, engine core and scheduler, and the plug-in. For each
number of running requests the same closed-loop load is put in turns on plain vLLM and on ours, without SLOs and with
one on every request. Of each window it prints, per engine step:

    cpu      CPU time of the engine core's own thread, from the kernel's count (every cost of ours is in it)
    threads  the same of all its other threads
    idle     time that the device stood still between two batches, of the window (log of the emulated device)
    gap      from the end of one batch to the end of the next, p50 and p99: a running request's token gap
    plan     the plug-in's own measure, wall time: p50 of its latest plans, and of all it does in its latest steps (they
             may reach back into the window before)

Ours minus plain vLLM, in turns, is the cost, and ours over plain vLLM what to compare between machines: other jobs on
this one lengthen gaps and idle time, and CPU time too where they take the caches. Ctrl-C ends the windows, and what was
measured till then is printed; with `--json` it is in the file after every window.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from slos_serve.bench.engines import ServerProcess, ServerProcesses
from slos_serve.bench.lab import read_status
from slos_serve.bench.model import ensure_demo_model
from slos_serve.emulated.emulation import LEAVES_OUT
from slos_serve.sim.hardware import load_hardware
from slos_serve.terminal.signals import ending_by_signal

VARIANTS = ("vllm", "ours, no SLOs", "ours, SLOs")
SLO = {"ttft_ms": 120_000, "tpot_ms": 10_000}  # loose: everybody is promised, so nobody is served differently
PROMPT_WORDS, OUTPUT_TOKENS = 100, (100, 300)
RAMP_S = 3.0
START_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One window of one variant. Microseconds per step, milliseconds of gaps, shares of the window."""

    hardware: str
    scheduling: str
    variant: str
    asked: int
    running: float
    steps: int
    tokens_per_s: float
    cpu_us: float
    threads_us: float
    idle: float
    gap_p50_ms: float
    gap_p99_ms: float
    plan_us: float | None = None
    overhead_us: float | None = None
    mode: str = ""
    step_downs: int = 0


def main() -> int:
    args = parse()
    rows: list[Row] = []
    is_whole = False
    with tempfile.TemporaryDirectory(prefix="slos-serve-in-place-") as name, ending_by_signal():
        try:
            for number, (hardware, scheduling) in enumerate(product(args.hardware, args.scheduling)):
                for row in measure(args, Path(name, str(number)), hardware, scheduling):
                    rows.append(row)
                    print(line(row), file=sys.stderr, flush=True)
                    if args.json:
                        args.json.write_text(
                            json.dumps({"emulated": LEAVES_OUT, "rows": list(map(asdict, rows))}, indent=1)
                        )
            is_whole = True
        except KeyboardInterrupt:
            print("stopped: this is what was measured", file=sys.stderr)
    for hardware, scheduling in dict.fromkeys((row.hardware, row.scheduling) for row in rows):
        print(f"\nemulated {hardware}, {scheduling}: {LEAVES_OUT}\n")
        print(table([row for row in rows if (row.hardware, row.scheduling) == (hardware, scheduling)]))
    return 0 if is_whole else 130


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", type=names, default=["h100-8b-derived"], help="names or files")
    parser.add_argument("--scheduling", type=names, default=["async"], help="async, sync, or both")
    parser.add_argument("--running", type=names, default="8,32,64,128,256", help="numbers of running requests")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of one window")
    parser.add_argument("--rounds", type=int, default=1, help="windows of each variant at each number, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not set(args.scheduling) <= {"async", "sync"}:
        parser.error(f"--scheduling {','.join(args.scheduling)}: expected async, sync, or both")
    return args


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def measure(args: argparse.Namespace, folder: Path, hardware: str, scheduling: str) -> Iterator[Row]:
    """Yield the windows on one device, under one way of scheduling."""
    folder.mkdir()
    levels = [int(part) for part in args.running]
    flags = ["--no-async-scheduling"] if scheduling == "sync" else []
    flags += ["--max-num-seqs", str(max(levels))]
    with ServerProcesses(folder) as fleet:
        engines = {name: start(fleet, name, flags, folder, hardware) for name in ("vllm", "ours")}
        fleet.wait(list(engines.values()), timeout_s=START_S)
        for level, number in product(levels, range(args.rounds)):
            for variant in VARIANTS[::-1] if number % 2 else VARIANTS:
                name = variant.split(",")[0]
                log = folder / f"{name}.batches"
                found = asyncio.run(window(engines[name], log, variant, level, args.seconds))
                yield row_of(variant, level, **found, hardware=hardware, scheduling=scheduling)


def start(fleet: ServerProcesses, name: str, own: Sequence[str], folder: Path, hardware: str) -> ServerProcess:
    """Start plain vLLM or ours on the emulated device; ours knows the device's true step times."""
    model = str(ensure_demo_model())
    flags = ["--emulate", f"{hardware},output_tokens=0,log={folder / name}.batches", *own]
    flags += ["--served-model-name", "m", "--disable-uvicorn-access-log", "--no-enable-prefix-caching"]
    if name == "vllm":
        return fleet.start(name, model, ["--no-slo", *flags])
    model_s = load_hardware(hardware).perf_model
    profile = {"schema": "slos-serve-profile/1", "key": "the file itself", "perf_model": model_s.to_json()}
    (folder / "profile.json").write_text(json.dumps(profile))
    flags += ["--profile", str(folder / "profile.json"), "--slo-mode", "enforce"]
    return fleet.start(name, model, [*flags, "--additional-config", json.dumps({"slo": {"state": False}})])


async def window(engine: ServerProcess, log: Path, variant: str, level: int, seconds: float) -> dict[str, Any]:
    """Keep `level` requests running; measure the window after the ramp."""
    rng = np.random.default_rng(level)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        slo = SLO if variant.endswith(", SLOs") else None
        tasks = [asyncio.create_task(client(session, engine.url, np.random.default_rng(s), slo))
                 for s in rng.integers(0, 1 << 30, level)]  # fmt: skip
        core = core_process(engine.process.pid)
        await asyncio.sleep(RAMP_S)
        began, before = time.perf_counter(), cpu_s(core)
        await asyncio.sleep(seconds)
        ended, after = time.perf_counter(), cpu_s(core)
        status = await asyncio.to_thread(read_status, engine.url)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1.5)  # what was aborted leaves, and the log of the device reaches its file
        async with session.post(f"{engine.url}/v1/completions", json=body(rng, None, tokens=2)) as reply:
            await reply.read()
    batches = read_batches(log, began, ended)
    return {"batches": batches, "times": (began, ended), "cpus": (before, after), "status": status}


async def client(session: aiohttp.ClientSession, url: str, rng: np.random.Generator, slo: Any) -> None:
    """Send one request after the other; none is streamed, so that the client costs nearly nothing."""
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post(f"{url}/v1/completions", json=body(rng, slo)) as reply:
                await reply.read()


def body(rng: np.random.Generator, slo: Any, tokens: int | None = None) -> dict[str, Any]:
    prompt = rng.integers(20_000, 30_000, PROMPT_WORDS).tolist()
    document = {"model": "m", "prompt": prompt, "ignore_eos": True, "temperature": 0}
    document["max_tokens"] = tokens or int(rng.integers(*OUTPUT_TOKENS))
    return document | ({"slo": slo} if slo else {})


def row_of(
    variant: str,
    level: int,
    *,
    batches: np.ndarray,
    times: tuple[float, float],
    cpus: tuple[tuple[float, float], tuple[float, float]],
    status: dict[str, Any],
    hardware: str = "",
    scheduling: str = "",
) -> Row:
    ends, starts = batches[:, 2], batches[:, 1]
    gaps = np.diff(ends)
    steps = len(batches)
    (own_before, others_before), (own, others) = cpus
    snapshot = (status.get("snapshot") or {}) if variant != "vllm" else {}
    return Row(
        hardware=hardware,
        scheduling=scheduling,
        variant=variant,
        asked=level,
        running=float(batches[:, 4].mean()),
        steps=steps,
        tokens_per_s=float(batches[:, 4].sum() / (times[1] - times[0])),
        cpu_us=(own - own_before) / steps * 1e6,
        threads_us=(others - others_before) / steps * 1e6,
        idle=float(np.maximum(starts[1:] - ends[:-1], 0).sum() / (ends[-1] - ends[0])),
        gap_p50_ms=float(np.quantile(gaps, 0.5) * 1e3),
        gap_p99_ms=float(np.quantile(gaps, 0.99) * 1e3),
        plan_us=micro(snapshot, "plan_s"),
        overhead_us=micro(snapshot, "overhead_s"),
        mode=snapshot.get("effective_mode", ""),
        step_downs=snapshot.get("step_downs", 0),
    )


def micro(snapshot: dict[str, Any], key: str) -> float | None:
    p50 = (snapshot.get(key) or {}).get("p50")
    return None if p50 is None else p50 * 1e6


def read_batches(log: Path, began: float, ended: float) -> np.ndarray:
    """Return the batches that were handed over in the window: handed, start, end, tokens, requests, context."""
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("]")]
    found = np.array([row for row in rows if began <= row[0] < ended])
    if len(found) < 10:
        raise SystemExit(f"{log}: {len(found)} batches in the window: the engine did not run")
    return found


def core_process(pid: int) -> int:
    """Return the process of the engine core below a server."""
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text():
                return child
    raise SystemExit(f"no engine core below process {pid}")


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def cpu_s(pid: int) -> tuple[float, float]:
    """Return the CPU seconds of a process's first thread, and of all its others."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            seconds[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    own = seconds.pop(pid)
    return own, sum(seconds.values())


def line(row: Row) -> str:
    plan = "" if row.plan_us is None else f"{row.plan_us:6.0f} {row.overhead_us or 0:6.0f}"
    mode = f"{row.mode}{f' ({row.step_downs} step-downs)' if row.step_downs else ''}"
    return (
        f"{row.variant:14} {row.running:7.1f} {row.steps:6} {row.tokens_per_s:8.0f} {row.cpu_us:7.0f} "
        f"{row.threads_us:8.0f} {100 * row.idle:6.1f} {row.gap_p50_ms:7.2f} {row.gap_p99_ms:7.2f}  {plan:13}  {mode}"
    )


def table(rows: Sequence[Row]) -> str:
    head = f"{'':14} {'running':>7} {'steps':>6} {'tokens/s':>8} {'cpu us':>7} {'threads':>8} {'idle %':>6} "
    head += f"{'gap p50':>7} {'p99 ms':>7}  {'plan all us':13}  mode"
    lines = [head]
    for level in dict.fromkeys(row.asked for row in rows):
        here = [row for row in rows if row.asked == level]
        lines += [line(row) for row in here]
        stock = [row for row in here if row.variant == VARIANTS[0]]
        for variant in VARIANTS[1:]:
            ours = [row for row in here if row.variant == variant]
            lines.append(f"  {variant}: {against(ours, stock)}")
    return "\n".join(lines)


def against(ours: Sequence[Row], stock: Sequence[Row]) -> str:
    """Say what ours adds to plain vLLM in the same turns, and how many times as much that makes."""
    if not ours or not stock:
        return "nothing to compare"
    added = {key: mean(ours, key) - mean(stock, key) for key in ("cpu_us", "threads_us", "idle")}
    cpu, tokens = (mean(ours, key) / mean(stock, key) for key in ("cpu_us", "tokens_per_s"))
    text = f"{added['cpu_us']:+.0f} us of the engine's thread a step (x{cpu:.2f}), "
    text += f"{added['threads_us']:+.0f} us of others, "
    return text + f"{100 * added['idle']:+.1f} points of device idle time; tokens/s x{tokens:.3f}"


def mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([getattr(row, key) for row in rows]))


if __name__ == "__main__":
    sys.exit(main())
