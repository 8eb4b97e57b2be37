"""The one-way channel out of the engine process: verdicts, finished requests, a snapshot.

A ZeroMQ PUB socket on an IPC address that both processes derive from vLLM's instance id. Sending never
waits: with nobody listening or a full queue the message is dropped.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq as _zmq

zmq: Any = _zmq  # its stubs are not followed where the checks run

logger = logging.getLogger("vllm.slos_serve")

HIGH_WATER_MARK = 1000
_MAX_PATH = 100  # a Unix socket's path holds 107 bytes


def address(instance_id: str, engine_index: int, purpose: str = "") -> str:
    """Return the address of the channel, or of the way in ("control"); the same in the API and engine processes."""
    name = "-".join(["slos-serve", instance_id, str(engine_index), *([purpose] if purpose else [])])
    path = str(Path(tempfile.gettempdir()) / f"{name}.sock")
    if len(path) > _MAX_PATH:
        digest = hashlib.sha256(path.encode()).hexdigest()[:24]
        path = f"/tmp/slos-serve-{digest}.sock"  # noqa: S108 - a socket path must be short
    return f"ipc://{path}"


class Publisher:
    """Bind and send; every error is counted and none is raised. Safe from more than one thread."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.num_dropped = 0
        self._lock = threading.Lock()
        self._encode = msgspec.json.Encoder().encode
        self._socket: Any = None
        try:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.PUB)
            self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(where)
        except zmq.ZMQError as error:
            logger.warning("slos-serve: nothing will be published, %s cannot be bound: %s", where, error)
            self.close()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message without waiting."""
        with self._lock:
            if self._socket is None:
                return
            try:
                self._socket.send(self._encode(message), zmq.NOBLOCK)
            except (zmq.ZMQError, TypeError, msgspec.MsgspecError):
                self.num_dropped += 1

    def close(self) -> None:
        """Close the socket and remove its file."""
        with self._lock:
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
                self._context.term()
                Path(self.where.removeprefix("ipc://")).unlink(missing_ok=True)
