"""Servers as child processes, for comparisons: started with `slos-serve serve`, watched, and always ended.

Each has its own log file; a server that dies is told with the last lines of it. Leaving the `ServerProcesses` block
ends every server, whether the block ended well, with an error or with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slos_serve.errors import SlosServeError

if TYPE_CHECKING:
    from typing import Self

POLL_S = 0.2
PATIENCE_S = 20.0
PROBE_HEADER = "x-slos-serve-probe"


class EngineError(SlosServeError):
    """Say which server failed and what its log says."""


@dataclass(slots=True, kw_only=True)
class ServerProcess:
    """One server. `url` answers once `is_ready`."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def is_ready(self, *, probe: bool = False) -> bool:
        """Ask `/health`; with `probe` a server that is still being profiled counts as ready."""
        request = urllib.request.Request(f"{self.url}/health", headers={PROBE_HEADER: "1"} if probe else {})  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError, http.client.HTTPException):
            return False

    def check(self) -> None:
        """Raise `EngineError` where the server has ended."""
        code = self.process.poll()
        if code is not None:
            raise EngineError(f"{self.name} ended with status {code}: {self.last_words()} (log: {self.log})")

    def last_words(self) -> str:
        """Return the line of the log that most likely says what went wrong."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or line.startswith("slos-serve:")]
        return (telling or lines or ["no output"])[-1][:300]

    def last_line(self, prefix: str) -> str:
        """Return the last line of the log that starts with `prefix`, without it; "" where there is none."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()
        return next((line.removeprefix(prefix).strip() for line in reversed(lines) if line.startswith(prefix)), "")

    def stop(self) -> None:
        """Ask the server and its children to end, and make them where they do not."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class ServerProcesses:
    """The servers of one comparison; a context manager that ends them all."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self.engines: list[ServerProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every server, all at once."""
        for engine in self.engines:
            if engine.process.poll() is None:
                engine.process.terminate()
        for engine in self.engines:
            engine.stop()
        self.engines.clear()

    def start(
        self, name: str, model: str, flags: Sequence[str], *, python: str = sys.executable, port: int | None = None
    ) -> ServerProcess:
        """Start `slos-serve serve` on a port, or a free one, with the package of an interpreter; returns at once."""
        port = port or free_port()
        log = self.log_folder / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "slos_serve.cli", "serve", model]
        command += ["--host", "127.0.0.1", "--port", str(port), *flags]
        with log.open("ab") as file:  # a server that is started again goes on in it
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        engine = ServerProcess(name=name, url=f"http://127.0.0.1:{port}", log=log, process=process)
        self.engines.append(engine)
        return engine

    def wait(
        self,
        engines: Sequence[ServerProcess],
        *,
        timeout_s: float,
        probe: bool = False,
        while_waiting: Callable[[float], None] | None = None,
    ) -> None:
        """Wait until all are ready; `EngineError` where one ends or time is over."""
        started = time.monotonic()
        waiting = list(engines)
        while waiting:
            for engine in waiting:
                engine.check()
            waiting = [engine for engine in waiting if not engine.is_ready(probe=probe)]
            waited = time.monotonic() - started
            if waiting and waited > timeout_s:
                names = ", ".join(engine.name for engine in waiting)
                raise EngineError(
                    f"{names}: not ready after {timeout_s:.0f} s: {waiting[0].last_words()} (log: {waiting[0].log})"
                )
            if while_waiting is not None:
                while_waiting(waited)
            if waiting:
                time.sleep(POLL_S)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
