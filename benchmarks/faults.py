"""What trouble costs on one server: struck under load, and every request is accounted for.

    make faults                            # all, about 20 minutes on a quiet machine: a table, and faults.json
    make faults ARGS="--quick"             # the three that need no restart
    make faults ARGS="--only SIGTERM"      # one; rows of earlier calls stay in the table
    make faults ARGS="--device cpu"        # the demo's model on the CPU instead of an emulated device

Real vLLM, our plug-in, our HTTP edge. By default the device is emulated: steps last as long as a hardware file says, so
that a busy machine does not change them. Load comes in three phases of equal length: normal (half of what the device
can serve), overflow (two and a half times that), recovery (normal again, once it answers); the fault strikes as the
overflow begins, or where its name says so. Where the server ends by it, or `/livez` says that it does not live, it is
started again, as whoever supervises it would. `recovered_s`: from the fault to the first short request with an SLO that
is answered in full; for faults that a server is started with, from its start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from slos_serve.bench.client import BenchRequest, StreamResult, offer
from slos_serve.bench.endings import account
from slos_serve.bench.engines import EngineError, ServerProcess, ServerProcesses, free_port
from slos_serve.bench.http_json import get_json
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.scaled import LENGTHS, Scaled
from slos_serve.records.profile import Profile
from slos_serve.sim.hardware import load_hardware
from slos_serve.terminal.signals import ending_by_signal

MODEL = "demo"
HARDWARE, SLOWER = "h100-8b-derived", 32.0  # slow enough for two cores to carry its tokens
LONGEST_OUTPUT = 48  # so that a run is over soon after its load
SHORT = {name: replace(one, output_range=(4, LONGEST_OUTPUT)) for name, one in LENGTHS.items()}
FLAGS = (
    *("--served-model-name", MODEL, "--max-model-len", "2048", "--max-num-seqs", "32", "--slo-mode", "enforce"),
    *("--max-num-batched-tokens", "512"),
)
CPU_FLAGS = ("--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager")
PHASES = {"normal": 0.5, "overflow": 1.25, "recovery": 0.5}
PRELOAD, CLOCK_FILE = "LD_PRELOAD", "SET_CLOCK_FILE"
STARTING, STARTING_S = "starting", 4.0
STRIKES_AFTER_S = 1.0  # into its phase
PROBE_SLO = {"ttft_ms": 5000.0, "tpot_ms": 2000.0}
START_S, RECOVER_S, DRAIN_S = 600.0, 600.0, 180.0  # a busy machine takes minutes over a start
COLUMNS = ("offered", "met", "missed", "declined", "rejected", "failed_clearly", "lost", "doubled")


@dataclass(slots=True)
class Bed:
    """A server on a fixed port, and how to bring it up again."""

    fleet: ServerProcesses
    options: argparse.Namespace
    port: int
    flags: tuple[str, ...] = ()
    engine: ServerProcess | None = None
    is_over: bool = False  # nothing is started any more

    @property
    def url(self) -> str:
        """Return where the server answers."""
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> ServerProcess:
        """Start, and return at once; `EngineError` where somebody else has the port."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise EngineError(f"port {self.port} is taken")
        flags = [*FLAGS, *self.options.flags, *self.flags]
        self.engine = self.fleet.start("server", self.options.model, flags, port=self.port)
        return self.engine

    def start(self) -> None:
        """Start, and return when it serves."""
        self.fleet.wait([self.launch()], timeout_s=START_S)

    def has_ended(self) -> bool:
        """Tell whether it must be started."""
        return self.engine is None or self.engine.process.poll() is not None

    def is_alive(self) -> bool:
        """Ask as a liveness probe does."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/livez", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """End the server."""
        self.fleet.stop()
        self.engine = None

    def processes(self) -> list[psutil.Process]:
        """Return the launcher, the API server and what below it runs the engine."""
        assert self.engine is not None
        top = psutil.Process(self.engine.process.pid)
        return [top, *top.children(recursive=True)]

    def engine_core(self) -> psutil.Process:
        """Return the process that schedules and runs the model: the one that vLLM names so, else the busiest."""
        below = self.processes()[1:]
        named = [one for one in below if "EngineCore" in " ".join(one.cmdline()) or "EngineCor" in one.name()]
        return (named or sorted(below, key=lambda one: -sum(one.cpu_times()[:2])))[0]


Strike = Callable[[Bed], None]


def gone(bed: Bed) -> None:
    """Wait until the server has ended, for as long as it may take over that."""
    assert bed.engine is not None
    with suppress(subprocess.TimeoutExpired):
        bed.engine.process.wait(DRAIN_S)


def kill_engine(bed: Bed) -> None:
    bed.engine_core().kill()
    gone(bed)


def kill_all(bed: Bed) -> None:
    for process in bed.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    gone(bed)


def stall(bed: Bed) -> None:
    """Stop the engine for four seconds."""
    core = bed.engine_core()
    core.suspend()
    time.sleep(4)
    core.resume()


def ask_to_end(number: int) -> Strike:
    def strike(bed: Bed) -> None:
        assert bed.engine is not None
        bed.engine.process.send_signal(number)
        gone(bed)

    return strike


@contextmanager
def raw_streams(bed: Bed, count: int) -> Iterator[list[socket.socket]]:
    """Open streams of long answers and read nothing of them."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    fields = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
    head = "\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""])
    opened = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", bed.port), timeout=10)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.sendall(head.encode() + body)
        opened.append(one)
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


def mass_disconnect(bed: Bed) -> None:
    with raw_streams(bed, 24):
        time.sleep(1.5)


def slow_clients(bed: Bed) -> None:
    with raw_streams(bed, 8):
        time.sleep(8)


def half_closed(bed: Bed) -> None:
    with raw_streams(bed, 8) as opened:
        for one in opened:
            one.shutdown(socket.SHUT_WR)
        time.sleep(4)


def nothing(_bed: Bed) -> None:
    """Do nothing: the fault was there from the start, or there is none."""


def freeze(bed: Bed) -> None:
    """Stop the engine for good: nothing ends by itself."""
    bed.engine_core().suspend()


def fill_disk(bed: Bed) -> None:
    """Let no process of the server write to any file (record, learnt state, log) until the load is over."""
    processes = bed.processes()
    for one in processes:
        one.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))
    time.sleep(10)
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


def take_memory(bed: Bed) -> None:
    """Give the engine no more memory than it has, for good."""
    core = bed.engine_core()
    core.rlimit(psutil.RLIMIT_AS, (core.memory_info().vms, psutil.RLIM_INFINITY))


CLOCK_SET_S = (-5.0, 60.0)  # back, and three seconds later forth


def with_own_clock(folder: Path) -> Sequence[str]:
    """Let the processes of the server see a clock that can be set without setting the machine's."""
    library, seconds = folder / "set_clock.so", folder / "seconds"
    source = Path(__file__).with_name("set_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lm"], check=True)
    seconds.write_bytes(struct.pack("d", 0.0))
    os.environ.update({PRELOAD: str(library), CLOCK_FILE: str(seconds)})
    return ()


def set_clock(_bed: Bed) -> None:
    for seconds in CLOCK_SET_S:
        with Path(os.environ[CLOCK_FILE]).open("r+b") as file:
            file.write(struct.pack("d", seconds))
        time.sleep(3)


@dataclass(frozen=True, slots=True)
class Fault:
    """`strike` as a phase begins, or while the server starts; `slo` and `flags` give what it is started with."""

    strike: Strike = nothing
    phase: str = "overflow"
    slo: Callable[[Path], dict[str, Any]] | None = None
    flags: Callable[[Path], Sequence[str]] | None = None

    @property
    def is_of_start(self) -> bool:
        """Tell whether the server is started with it, or struck while it starts."""
        return self.slo is not None or self.flags is not None or self.phase == STARTING


def with_planner(name: str, **settings: Any) -> Fault:
    return Fault(slo=lambda _: {"planner": f"fault_planners.{name}", **settings})


def foreign_state(folder: Path) -> dict[str, Any]:
    state = folder / "learnt.json"
    state.write_text('{"schema": "slos-serve-learnt/1", "key": "another engine", "correction": {"lines": [[NaN')
    return {"state": str(state)}


def damaged_profile(folder: Path) -> dict[str, Any]:
    profile = folder / "profile.json"
    profile.write_text('{"schema": "slos-serve-profile/1", "key": "another engine", "perf_model": {"lines": [[NaN')
    return {"profile": str(profile)}


FAULTS = {
    "none": Fault(),
    "stall of 4 s": Fault(stall),
    "clients gone": Fault(mass_disconnect),
    "slow clients": Fault(slow_clients),
    "half-closed": Fault(half_closed),
    "disk full": Fault(fill_disk),
    "engine killed": Fault(kill_engine),
    "engine hung": Fault(freeze),
    "all killed": Fault(kill_all),
    "SIGTERM, starting": Fault(ask_to_end(signal.SIGTERM), STARTING),
    "SIGINT, starting": Fault(ask_to_end(signal.SIGINT), STARTING),
    "SIGTERM, normal": Fault(ask_to_end(signal.SIGTERM), "normal"),
    "SIGTERM, overflow": Fault(ask_to_end(signal.SIGTERM)),
    "SIGTERM, recovery": Fault(ask_to_end(signal.SIGTERM), "recovery"),
    "SIGINT, overflow": Fault(ask_to_end(signal.SIGINT)),
    "no KV memory": Fault(flags=lambda _: ("--num-gpu-blocks-override", "140")),
    "memory limited": Fault(take_memory, flags=lambda _: ()),
    "records: disk full": Fault(slo=lambda _: {"record": "/dev/full"}),
    "profile damaged": Fault(slo=damaged_profile),
    "learnt state damaged": Fault(slo=foreign_state),
    "clock set": Fault(set_clock, flags=with_own_clock),
    "planner raises": with_planner("Raises"),
    "planner hangs": with_planner("Hangs", safety={"max_plan_s": 1.0}),
}
QUICK = ("none", "stall of 4 s", "clients gone")


def requests_of(scaled: Scaled, options: argparse.Namespace) -> dict[str, list[BenchRequest]]:
    """Return each phase's requests, at offsets from its own beginning."""
    found = {}
    for number, (phase, share) in enumerate(PHASES.items()):
        rate = share * min(scaled.service_capacity_rps, options.most_rps)
        offered = scaled.requests(rate_rps=rate, duration_s=options.phase_s, seed=options.seed + number)
        found[phase] = [
            replace(one, request_id=f"{phase}-{one.request_id}") for one in offered if one.offset_s < options.phase_s
        ]
    return found


def answers(bed: Bed) -> bool:
    """Tell whether one short request is answered in full; one with an SLO, for which nobody's backlog is in the way."""
    request = BenchRequest(request_id="probe", offset_s=0.0, prompt_token_ids=[1000] * 4, output_tokens=2,
                           hidden_max_tokens=2, extra={"slo": PROBE_SLO})  # fmt: skip
    (result,) = asyncio.run(offer(bed.url, MODEL, [request], drain_timeout_s=10.0))
    return result.error is None and result.num_output_tokens == 2


def recover(bed: Bed, since: float) -> float | None:
    """Start the server again where it ended or does not live; return the seconds until it answers, None for never."""
    while not bed.is_over and time.monotonic() - since < RECOVER_S:
        if bed.has_ended():
            bed.stop()
            with suppress(EngineError):
                bed.start()
        elif answers(bed):
            return round(time.monotonic() - since, 1)
        elif not bed.is_alive():
            say("it does not live: ended, to be started again")
            bed.stop()
        time.sleep(0.5)
    return None


def begin(fault: Fault, bed: Bed, folder: Path) -> float | None:
    """Have the server up, with the fault that it is started with; return the seconds until it answers, 0 if it did."""
    if fault.is_of_start:
        bed.stop()
        bed.flags = flags_of(fault, folder)
    since = time.monotonic()
    if fault.phase == STARTING:
        bed.launch()
        time.sleep(STARTING_S)
        since = time.monotonic()
        fault.strike(bed)
    if bed.has_ended():
        bed.stop()
        bed.start()
    return recover(bed, since) if fault.is_of_start else 0.0


async def offer_and_strike(
    fault: Fault, bed: Bed, requests: Mapping[str, Sequence[BenchRequest]], phase_s: float
) -> tuple[dict[str, list[StreamResult]], list[float | None]]:
    """Offer the phases and strike in one; return what came of each phase, and the seconds to recover where it struck.

    The last phase begins once the server answers again; where the fault strikes in it, when its turn comes.
    """
    starts = {phase: number * phase_s for number, phase in enumerate(PHASES)}

    async def strike() -> list[float | None]:
        if fault.strike is nothing or fault.phase == STARTING:
            return []
        await asyncio.sleep(starts[fault.phase] + STRIKES_AFTER_S)
        struck = time.monotonic()
        say("strikes")
        await asyncio.to_thread(fault.strike, bed)
        return [await asyncio.to_thread(recover, bed, struck)]

    async def offer_phase(phase: str) -> list[StreamResult]:
        await asyncio.sleep(starts[phase])
        if phase == "recovery" and fault.phase != phase:
            await striking
        return await offer(bed.url, MODEL, requests[phase], drain_timeout_s=DRAIN_S)

    striking = asyncio.ensure_future(strike())
    try:
        results = await asyncio.gather(*map(offer_phase, PHASES))
        return dict(zip(PHASES, results, strict=True)), await striking
    except BaseException:
        bed.is_over = True
        raise


def run_fault(name: str, bed: Bed, scaled: Scaled, options: argparse.Namespace) -> dict[str, Any]:
    """Offer the three phases, strike once, and account for every request."""
    fault, began = FAULTS[name], time.monotonic()
    requests = requests_of(scaled, options)
    say(name)
    with tempfile.TemporaryDirectory(prefix="slos-serve-fault-") as folder:
        started_s = begin(fault, bed, Path(folder))
        results, recovered = asyncio.run(offer_and_strike(fault, bed, requests, options.phase_s))
        phases = {phase: account(requests[phase], results[phase]) for phase in PHASES}
        row = {"fault": name, **{column: sum(one[column] for one in phases.values()) for column in COLUMNS}}
        row |= {"recovered_s": [started_s, *recovered][-1], "phases": phases, "left_over": left_over(bed)}
        if fault.is_of_start:
            bed.stop()
            bed.flags = ()
            os.environ.pop(PRELOAD, None)
    return {**row, "took_s": round(time.monotonic() - began, 1)}


def flags_of(fault: Fault, folder: Path) -> tuple[str, ...]:
    slo = fault.slo(folder) if fault.slo is not None else {}
    more = fault.flags(folder) if fault.flags is not None else ()
    return ("--additional-config", json.dumps({"slo": slo}), *more)


def left_over(bed: Bed) -> int | None:
    """Return how many requests the idle engine still holds after a few seconds: 0 is right, None where nobody says."""
    held = None
    for _ in range(20):
        with suppress(Exception):
            snapshot = get_json(f"{bed.url}/v1/slo/status").get("snapshot") or {}
            held = int(snapshot.get("num_running") or 0) + int(snapshot.get("num_waiting") or 0)
            if held == 0:
                return 0
        time.sleep(0.5)
    return held


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows for people: met of offered by phase, then ends, then the time to recover."""
    lines = [f"{'':<22}" + "".join(f"{name:>15}" for name in (*COLUMNS, "recovered_s")) + "   met by phase"]
    for row in rows:
        ends = "".join(f"{row[name]:>15}" for name in COLUMNS)
        recovered = "never" if row["recovered_s"] is None else f"{row['recovered_s']:.1f}"
        phases = " ".join(f"{one['met']}/{one['offered']}" for one in row["phases"].values())
        lines.append(f"{row['fault']:<22}{ends}{recovered:>15}   {phases}")
    return "\n".join(lines)


def prepare(options: argparse.Namespace) -> Scaled:
    """Write the profile and the classes of the device; fill in the server's flags."""
    options.out.mkdir(parents=True, exist_ok=True)
    options.model = str(ensure_demo_model())
    profile = options.out / "profile.json"
    if options.device == "cpu":
        options.flags = list(CPU_FLAGS)
        measured = options.out / "cpu-profile.json"
        options.flags += ["--profile", str(measured)] + ([] if measured.exists() else ["--reprofile"])
        if not measured.exists():
            with ServerProcesses(options.out) as fleet:
                fleet.wait([fleet.start("profile", options.model, [*FLAGS, *options.flags])], timeout_s=600)
            options.flags.remove("--reprofile")
        profile = measured
    else:
        hardware = load_hardware(HARDWARE).slower(SLOWER)
        document = {"schema": "slos-serve-profile/1", "key": "exact", "perf_model": hardware.perf_model.to_json()}
        profile.write_text(json.dumps({**document, "max_num_batched_tokens": 512}))
        options.flags = ["--emulate", f"{HARDWARE},slower={SLOWER:g}", "--profile", str(profile)]
    scaled = Scaled(profile=Profile.load(profile), lengths=SHORT)
    classes = {name: {k: v for k, v in one.to_json().items() if k != "name"}
               for name, one in scaled.config.classes.items()}  # fmt: skip
    config = {"ttft_floor_ms": scaled.config.ttft_floor_ms, "ttft_allowance_ms": scaled.config.ttft_allowance_ms}
    (options.out / "classes.yaml").write_text(yaml.safe_dump({**config, "classes": classes}))
    options.flags += ["--slo-config", str(options.out / "classes.yaml")]
    options.flags += ["--record", str(options.out.resolve() / "record.jsonl")]
    return scaled


def earlier(path: Path, device: str) -> dict[str, dict[str, Any]]:
    """Return the rows of earlier calls on the same device, by fault."""
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text())
        if document["device"] == device:
            return {row["fault"]: row for row in document["rows"]}
    return {}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Strike with each fault; 1 where a request was lost or answered twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("emulated", "cpu"), default="emulated")
    parser.add_argument("--only", action="append", choices=FAULTS, help="one fault, again for more (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--phase-s", type=float, default=6.0, help="seconds of each phase (default: 6)")
    parser.add_argument("--most-rps", type=float, default=12.0, help="what this machine can carry (default: 12)")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: a free one)")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("faults-report"))
    options = parser.parse_args()
    options.only = options.only or (QUICK if options.quick else tuple(FAULTS))
    scaled = prepare(options)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path = options.out / "faults.json"
    device = f"emulated {HARDWARE}, {SLOWER:g} times slower" if options.device == "emulated" else "cpu"
    rows = earlier(path, device)
    with ending_by_signal(), ServerProcesses(options.out) as fleet:
        bed = Bed(fleet, options, options.port or free_port())
        for name in options.only:
            rows[name] = run_fault(name, bed, scaled, options)
            say(json.dumps(rows[name]))
            path.write_text(json.dumps({"device": device, "rows": list(rows.values())}, indent=1))
    in_order = [rows[name] for name in FAULTS if name in rows]
    print(f"device: {device}; capacity {scaled.service_capacity_rps:.1f} requests/s, "
          f"{min(scaled.service_capacity_rps, options.most_rps):.1f} taken as such; "
          f"{sum(row['took_s'] for row in in_order) / 60:.1f} minutes\n{table(in_order)}")  # fmt: skip
    rows = {name: rows[name] for name in options.only}
    return 1 if any(row["lost"] or row["doubled"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
