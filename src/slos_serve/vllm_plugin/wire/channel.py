"""The one-way channel out of the engine process: verdicts, finished requests, a snapshot.

A ZeroMQ PUB socket in a folder of this engine alone, which both processes derive from what `serve` gave them and
from vLLM's instance id, or where there are several API servers from this start's secret. Sending never waits: with
nobody listening or a full queue the message is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq as _zmq

from slos_serve.http import seal
from slos_serve.places import socket_root

zmq: Any = _zmq  # its stubs are not followed where the checks run

logger = logging.getLogger("vllm.slos_serve")

HIGH_WATER_MARK = 1000
LONGEST_NAME = 24
SOCKETS = ("out.sock", "control.sock")
LOCK = "lock"


def instance_name(vllm_config: Any) -> str:
    """Return the name under which an engine and its API servers know each other.

    One API server hands its configuration to its engines. Several make one each, with an instance id of its own.
    """
    is_alone = vllm_config.parallel_config._api_process_count == 1  # noqa: SLF001 -- vLLM has no public word for it
    return str(vllm_config.instance_id) if is_alone else seal.start_name()


def engine_folder(instance_id: str, engine_index: int, below: str | None = None) -> Path:
    """Return the folder of one engine, below the launcher's own if it made one; `OSError` where there can be none."""
    name = f"{instance_id}-{engine_index}"
    if len(name) > LONGEST_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()[:LONGEST_NAME]
    return (Path(below) if below else socket_root()) / name


def address(instance_id: str, engine_index: int, purpose: str = "out", below: str | None = None) -> str:
    """Return the address of the channel, or of the way in ("control"); the same in the API and engine processes."""
    return f"ipc://{engine_folder(instance_id, engine_index, below) / purpose}.sock"


class Seat:
    """The folder of an engine, held by it alone for as long as it lives; `OSError` where another holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        while True:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise OSError(error.errno, "another engine of this user holds it", str(folder)) from None
            if self._is_current():
                return
            os.close(self._lock)  # its last holder removed it in between

    def _is_current(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._lock), (self.folder / LOCK).lstat())
        return False

    def leave(self) -> None:
        """Remove what is left in the folder, and the folder."""
        with contextlib.suppress(OSError):
            for name in (*SOCKETS, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        os.close(self._lock)


def clear_up(folder: Path) -> None:
    """Remove the folder of an engine that has gone without doing so; one that lives keeps it."""
    if folder.is_dir():
        with contextlib.suppress(OSError):
            Seat(folder).leave()


def bind(socket: Any, where: str) -> None:
    """Bind to an address that only this user can connect to; `zmq.ZMQError` or `OSError` where that fails."""
    socket.bind(where)
    Path(where.removeprefix("ipc://")).chmod(0o600)


class Publisher:
    """Bind and send; every error is counted and none is raised. Safe from more than one thread.

    `where` None: nothing is sent. `problem` says why nothing will be though an address was given.
    """

    def __init__(self, where: str | None) -> None:
        self.where = where
        self.problem = ""
        self.num_dropped = 0
        self._lock = threading.Lock()
        self._encode = msgspec.json.Encoder().encode
        self._socket: Any = None
        if where is None:
            return
        self._context = zmq.Context()
        socket = self._context.socket(zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            bind(socket, where)
        except (zmq.ZMQError, OSError) as error:
            self.problem = f"{where} cannot be bound: {error}"
            socket.close(linger=0)
            self._context.term()
        else:
            self._socket = socket

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
        """Close the socket and remove its file, if it was ours."""
        with self._lock:
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
                self._context.term()
                Path(str(self.where).removeprefix("ipc://")).unlink(missing_ok=True)


class Channel:
    """What an engine tells the API servers through, and is asked through; `problem` says why it can do neither."""

    def __init__(self, instance_id: str, engine_index: int, below: str | None) -> None:
        problem: object = ""
        self._seat: Seat | None = None
        try:
            self._seat = Seat(engine_folder(instance_id, engine_index, below))
        except OSError as error:
            problem = error
        self.publisher = Publisher(self.address("out"))
        problem = problem or self.publisher.problem
        self.problem = f"no channel to the API server ({problem})" if problem else ""

    def address(self, purpose: str) -> str | None:
        """Return the address of one of its sockets, `out` or `control`; None where there is no channel."""
        return f"ipc://{self._seat.folder / purpose}.sock" if self._seat else None

    def leave(self) -> None:
        """Give up the engine's folder."""
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.leave()
