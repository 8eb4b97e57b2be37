"""The way into a running engine: one question, one answer, never on the scheduler's thread.

A ZeroMQ REP socket on an IPC address beside the channel's. The plug-in's own thread waits on it; a question
costs the engine nothing until the next step reads what it changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from slos_serve.vllm_plugin.wire.channel import bind, zmq

logger = logging.getLogger("vllm.slos_serve")

Message = dict[str, Any]


class ControlServer:
    """Answer questions with `handle`; used by one thread alone, but for `wake`.

    What `handle` raises is the answer `{"error": text}`. Where there is no address (`where` None), or it cannot be
    bound, nobody can ask.
    """

    def __init__(self, where: str | None, handle: Callable[[Message], Message]) -> None:
        self._is_bound = False
        self.where = where
        self._handle = handle
        self._read_end, self._write_end = os.pipe()
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._poller = zmq.Poller()
        self._poller.register(self._read_end, zmq.POLLIN)
        if where is None:
            return
        try:
            bind(self._socket, where)
        except (zmq.ZMQError, OSError) as error:
            logger.warning("slos-serve: the mode cannot be switched, %s cannot be bound: %s", where, error)
        else:
            self._is_bound = True
            self._poller.register(self._socket, zmq.POLLIN)

    def wake(self) -> None:
        """End a `serve` that waits; safe on any thread."""
        os.write(self._write_end, b"\0")

    def serve(self, timeout_s: float) -> None:
        """Wait for questions that long at most, and answer the first."""
        ready = dict(self._poller.poll(timeout_s * 1000))
        if self._socket in ready:
            self._socket.send(msgspec.json.encode(self._answer(self._socket.recv_multipart())))

    def _answer(self, parts: list[bytes]) -> Message:
        try:
            (question,) = parts
            return self._handle(msgspec.json.decode(question, type=dict[str, Any]))
        except Exception as error:  # noqa: BLE001 - whatever was asked, the asker hears of it
            return {"error": str(error)}

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        self._socket.close(linger=0)
        self._context.term()
        os.close(self._read_end)
        os.close(self._write_end)
        if self._is_bound:
            Path(str(self.where).removeprefix("ipc://")).unlink(missing_ok=True)


def ask(where: str, question: Message, timeout_s: float = 2.0) -> Message:
    """Return the engine's answer; `TimeoutError` where there is none in time."""
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(where)
        socket.send(msgspec.json.encode(question))
        if not socket.poll(timeout_s * 1000):
            raise TimeoutError(f"the engine at {where} did not answer within {timeout_s:g} s")
        answer: Message = msgspec.json.decode(socket.recv(), type=dict[str, Any])
        return answer
    finally:
        socket.close(linger=0)
        context.term()
