"""Start a real server for a test, wait until it answers, and end it, whatever happens between."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, end_s: float = 30
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command on one thread, offline; what it says is in `log`, its line of `--json` in a pipe."""
    env = {**os.environ, **ENVIRONMENT, **(environment or {})}
    with log.open("wb") as output:
        stdout = subprocess.PIPE if "--json" in command else output
        process = subprocess.Popen(command, env=env, stdout=stdout, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=end_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until(
    holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, patience_s: float = 240
) -> None:
    """Ask until something holds; a server that does not answer yet is asked again, one that ended fails the test."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.25)
    pytest.fail(f"the server did not get there:\n{log.read_text(errors='replace')[-4000:]}")


def is_healthy(client: httpx.Client) -> bool:
    """Tell whether the server says that it is healthy."""
    return client.get("/health").status_code == 200


def wait_for(holds: Callable[[], bool], patience_s: float = 30.0) -> None:
    """Ask a server that answers until something holds."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
