"""vLLM as a child process: started, watched until it answers, and ended with its own exit status."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from slos_serve.errors import SlosServeError
from slos_serve.http import seal
from slos_serve.terminal.signals import handling

PROBE_HEADER = "x-slos-serve-probe"
POLL_S = 0.25
PATIENCE_S = 15.0  # shorter than those have who end us: `bench.engines`, and orchestrators' usual 30 s
PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ServerEndedError(SlosServeError):
    """Say that the server ended before it was ready."""


def _end_with_parent() -> None:
    # Linux tells the child when its parent dies, even by SIGKILL: no server is left behind.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command: Sequence[str], env: Mapping[str, str], *, stdout_to_stderr: bool) -> subprocess.Popen[bytes]:
    """Start the server in a session of its own, so that it gets each signal once, from us."""
    return subprocess.Popen(
        command,
        env={**os.environ, seal.ENVIRONMENT: secrets.token_hex(32), **env},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if stdout_to_stderr else None,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 -- runs before any thread of ours exists
    )


def wait(child: subprocess.Popen[bytes], *, patience_s: float, tell: Callable[[], None]) -> int:
    """Wait for the child's end and return its code; pass on the signals that ask us to end.

    vLLM waits for open connections without a bound, and has by then stopped the engine that would end them: it is made
    to end `patience_s` after the first signal, and `tell` is called before.
    """
    told: list[float] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        told.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    with handling(FORWARDED, forward):
        while child.poll() is None:
            if told and time.monotonic() - told[0] > patience_s:
                tell()
                kill(child)
                break
            time.sleep(POLL_S)
    return child.wait()


def end(child: subprocess.Popen[bytes], *, patience_s: float = PATIENCE_S) -> None:
    """Ask the child to end, and make it where it does not."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            kill(child)
            child.wait()


def kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and the processes that it has started, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def exit_status(code: int) -> int:
    """Return a child's code as a shell tells it: 128 + signal where a signal ended it."""
    return code if code >= 0 else 128 - code


def port_problem(host: str | None, port: int) -> str | None:
    """Return why a server could not listen there, or None."""
    if not 0 < port < 1 << 16:
        return "ports go from 1 to 65535"
    try:
        infos = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)  # noqa: S104
    except OSError as error:
        return str(error)
    family, kind, protocol, _, address = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.strerror or str(error)
    return None


def base_url(host: str | None, port: int, *, tls: bool = False) -> str:
    """Return the URL at which the server is reached from this machine."""
    name = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host or "")  # noqa: S104
    name = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return f"{'https' if tls else 'http'}://{name}:{port}"


def is_healthy(url: str, *, probe: bool, timeout_s: float = 5.0) -> bool:
    """Ask `/health`; with `probe` a server that is still being profiled counts as healthy."""
    context = ssl._create_unverified_context()  # noqa: S323, SLF001 -- our own server on our own machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(f"{url}/health", headers={PROBE_HEADER: "1"} if probe else {})  # noqa: S310
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, http.client.HTTPException):
        return False


def wait_healthy(child: subprocess.Popen[bytes], url: str, *, probe: bool, timeout_s: float | None = None) -> bool:
    """Wait until the server is healthy; False after `timeout_s`. `ServerEndedError` where it ends instead."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        if child.poll() is not None:
            raise ServerEndedError(f"vLLM ended with status {exit_status(child.returncode)} before it answered")
        if is_healthy(url, probe=probe):
            return True
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
