"""Ray and Serve under one command: find or start a cluster, check that there is room, run, drain, leave."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped,import-not-found,unused-ignore] # Ray brings it
import ray
from ray import serve

from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.ray_serve import names

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

APPLICATION = "slos-serve"
POLL_S = 0.5
CONNECT_S = 5.0
START_ATTEMPTS = 4
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# A replica that hangs would keep its place for the whole patience; a proxy that takes long over its start, on a busy
# machine, would be killed three times five seconds later, and the start with it.
SETTINGS = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30"}
CONTROLLER = {"runtime_env": {"env_vars": SETTINGS}}


class RayCluster:
    """A Ray cluster, started here (`address` None) or joined. A context manager: leaving ends what it started."""

    def __init__(self, address: str | None, *, num_cpus: int, num_gpus: int | None = None) -> None:
        self.is_own = address is None
        if self.is_own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let every other process go first
            ask_for_token()
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if self.is_own:
            options |= {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
        if address not in (None, "auto") and not answers(address):
            expected = "the address of a running cluster: what listens there is no Ray head"
            raise ConfigError(where="arguments", key="--ray-address", value=address, expected=expected)
        try:
            _start(options) if self.is_own else ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            expected = f"the address of a running cluster, from one of its machines ({_line(error)})"
            raise ConfigError(where="arguments", key="--ray-address", value=address, expected=expected) from error
        self._is_serving = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_own:
            with contextlib.suppress(Exception):
                serve.shutdown()
        ray.shutdown()

    def check_room(self, num_replicas: int, bundle: Mapping[str, float]) -> None:
        """Raise `ConfigError` where so many replicas would wait for a place for ever."""
        free = ray.available_resources()
        for name, each in bundle.items():
            if each and free.get(name, 0.0) + 1e-9 < num_replicas * each:
                most = int(free.get(name, 0.0) / each + 1e-9)
                has = f"each takes {each:g} {name}, {free.get(name, 0.0):g} free here"
                expected = f"at most {most} ({has})" if most else f"a cluster with room for one ({has})"
                raise ConfigError(where="arguments", key="--replicas", value=num_replicas, expected=expected)

    def run(self, application: Any, *, host: str | None, port: int) -> None:
        """Deploy and wait until every replica is ready; `SlosServeError` says why one never will be."""
        http = {"host": host or "0.0.0.0", "port": port}  # noqa: S104 -- as vLLM does
        serve.start(proxy_location="HeadOnly", http_options=http, controller_options=CONTROLLER)
        found = names.http_port()
        if found != port:
            expected = f"{found}: Serve listens there on this cluster, and that cannot be changed while it runs"
            raise ConfigError(where="arguments", key="--port", value=port, expected=expected)
        if APPLICATION in serve.status().applications:
            raise SlosServeError(f"this cluster runs an application {APPLICATION!r} already: serve shutdown ends it")
        self._is_serving = True
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise SlosServeError(f"no replica came up: {_line(error)}") from error

    def wait(self) -> None:
        """Return when the application has gone from the cluster, or failed for good."""
        while self.is_deployed():
            time.sleep(POLL_S)

    def is_deployed(self) -> bool:
        """Tell whether the application is there, ready or not."""
        return APPLICATION in serve.status().applications

    def drain(self, patience_s: float) -> bool:
        """Take no more requests and let what is under way end; tell whether it did in time."""
        if not self._is_serving:
            return True
        deadline = time.monotonic() + patience_s
        serve.delete(APPLICATION, _blocking=False)
        while self.is_deployed():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def ask_for_token() -> None:
    """Let a cluster of our own ask whoever connects for a token: Ray's ports are open to the network and run code.

    Ray keeps the token in `~/.ray/auth_token`; without a home it is one of this run's processes alone.
    `RAY_AUTH_MODE=disabled` opts out.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    home = os.path.expanduser("~")  # noqa: PTH111 -- `Path.home` raises where there is none
    is_usable = os.access(home, os.W_OK | os.X_OK, effective_ids=True)
    if mode == "token" and not is_usable and not any(os.environ.get(name) for name in TOKENS):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    names.read_environment_again()


def _start(options: Mapping[str, Any]) -> None:
    """Start a Ray of our own: again where the machine is too busy for the half minute that Ray gives its processes."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address="local", **options)
        except Exception as error:
            if names.STARTED_TOO_LATE not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise SlosServeError(f"Ray did not start, tried {attempt} times: {_line(error)}") from error
            logger.warning("Ray did not start within its half minute: trying again")
        else:
            return


def answers(address: str) -> bool:
    """Tell whether a gRPC server, as a Ray head is one, answers at HOST:PORT; Ray itself would try for minutes."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return True  # whether it trusts us is Ray's to find out
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
        except grpc.FutureTimeoutError:
            return False
    return True


def _line(error: BaseException) -> str:
    """Return the line of an error that says most: of a remote traceback that is the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
