"""Which measured profile belongs to a server: by model, hardware and everything that bears on its speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slos_serve.cache import cache_path
from slos_serve.core.perf import PER_CONTEXT, PerfModel
from slos_serve.errors import ConfigError
from slos_serve.records.profile import Profile
from slos_serve.serving.arguments import EngineArguments
from slos_serve.serving.platforms import InstalledVllm, hardware_name

# Flags that do not bear on how long a step takes.
NOT_SPEED = frozenset(
    {
        *("config", "host", "port", "uds", "api-key", "served-model-name", "middleware", "additional-config", "seed"),
        *("root-path", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "allowed-origins", "allowed-methods"),
        *("allowed-headers", "allow-credentials", "uvicorn-log-level", "disable-uvicorn-access-log"),
        *("disable-log-stats", "enable-log-requests", "no-enable-log-requests", "otlp-traces-endpoint"),
        *("chat-template", "tool-call-parser", "enable-auto-tool-choice", "reasoning-parser"),
        *("kv-cache-memory-bytes", "kv-cache-memory", "gpu-memory-utilization"),
    }
)
SPEED_ENVIRONMENT = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES")


def profile_key(
    model: str, engine: InstalledVllm, arguments: EngineArguments, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a profile is valid for, as plain JSON."""
    flags = arguments.shaping(NOT_SPEED)
    flags += [f"{name}={environ[name]}" for name in SPEED_ENVIRONMENT if environ.get(name)]
    return {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "hardware": hardware_name(engine),
        "flags": [f"{engine.package}={engine.version}", *flags],
    }


def key_digest(key: Mapping[str, Any]) -> str:
    """Return what files about an engine are called."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def choose_profile(given: Path | None, key: Mapping[str, Any], *, again: bool) -> tuple[Path, bool]:
    """Return the profile's file, `given` or the cache's for `key`, and whether it must be measured first."""
    path = cache_path("profiles", f"{key_digest(key)}.json") if given is None else given.resolve()
    if again or not path.exists():
        return path, True
    try:
        read_profile(path)
    except ConfigError:
        if given is not None:
            raise
        return path, True
    return path, False


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Take a profile out of the way while a new one is measured; it comes back where none was.

    One that a killed run left aside comes back too.
    """
    aside = path.with_name(f"{path.name}.before")
    with contextlib.suppress(FileNotFoundError):
        path.replace(aside)
    try:
        yield
    finally:
        if path.exists():
            aside.unlink(missing_ok=True)
        elif aside.exists():
            aside.replace(path)


def read_profile(path: Path) -> dict[str, Any]:
    """Return a profile document; `ConfigError` where the file is none."""
    return dict(Profile.load(path, remedy="that --reprofile measures and writes").document)


def beyond_measured(document: Mapping[str, Any]) -> str:
    """Return what a profile says of contexts longer than those it was measured with, "" where it does not know them.

    The example is a decode batch of 8 at eight times that context: how much longer plans take it to last than expected.
    """
    longest = document.get("longest_context")
    if not longest:
        return ""
    model = PerfModel.from_json(document["perf_model"])
    far = 8.0 * 8 * longest
    widened = 1.0 + (model.doubt[PER_CONTEXT] * far if model.doubt else 0.0) / model.seconds(8, 8, context_tokens=far)
    return (
        f"contexts over {longest} tokens are unmeasured: plans widen their margins with them, by x{widened:.2f} for 8 "
        f"decodes at {8 * longest}"
    )
