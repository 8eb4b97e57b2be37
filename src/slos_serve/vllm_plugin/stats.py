"""The API process's end of the channel: a vLLM stat logger that listens to the engine's plug-in.

vLLM constructs it in every API process once this package is installed (entry point group
`vllm.stat_logger_plugins`). It does nothing unless one of our scheduler classes runs.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.slos_serve")

POLL_MS = 500


def is_ours(scheduler_cls: object) -> bool:
    """Tell whether a scheduler class, or its dotted name, is this package's (or derives from it)."""
    if isinstance(scheduler_cls, str):
        return scheduler_cls.startswith("slos_serve.")
    if isinstance(scheduler_cls, type):
        return any(base.__module__.startswith("slos_serve.") for base in scheduler_cls.__mro__)
    return False


class Listener:
    """Receive messages on a daemon thread and hand each one to `feed`."""

    def __init__(self, where: str, feed: Callable[[dict[str, Any]], None]) -> None:
        self.where = where
        self.num_bad = 0
        self._feed = feed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="slos-serve-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and clear up after the engine: vLLM may kill it before it can."""
        from slos_serve.vllm_plugin.wire.channel import clear_up  # noqa: PLC0415 - as below

        self._stop.set()
        self._thread.join(timeout=5)
        clear_up(Path(self.where.removeprefix("ipc://")).parent)

    def _listen(self) -> None:
        import msgspec  # noqa: PLC0415 - only where our scheduler runs

        from slos_serve.vllm_plugin.wire.channel import zmq  # noqa: PLC0415

        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.where)
        try:
            while not self._stop.is_set():
                if not socket.poll(POLL_MS):
                    continue
                try:
                    self._feed(msgspec.json.decode(socket.recv()))
                except Exception as error:  # one bad message must not end the channel
                    self.num_bad += 1
                    if self.num_bad == 1:
                        logger.warning("slos-serve: a message of the engine was not understood", exc_info=error)
        finally:
            socket.close(linger=0)
            context.term()


class SloStatLogger(StatLoggerBase):
    """Feed `slos_serve.http.hub.HUB` with what the engine publishes; inert for other schedulers."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.listener: Listener | None = None
        if not is_ours(vllm_config.scheduler_config.scheduler_cls):
            return
        from slos_serve.http.hub import HUB  # noqa: PLC0415 - prometheus_client and all, only where used
        from slos_serve.vllm_plugin.wire.channel import address, instance_name  # noqa: PLC0415
        from slos_serve.vllm_plugin.wire.control import ask  # noqa: PLC0415

        additional = vllm_config.additional_config
        slo = additional.get("slo") if isinstance(additional, dict) else None
        model, instance = vllm_config.model_config, instance_name(vllm_config)
        client = max(0, vllm_config.parallel_config._api_process_rank)  # noqa: SLF001 -- vLLM has no public word for it
        HUB.configure(slo=slo or {}, model=model.served_model_name or model.model, client=client)
        below = (slo or {}).get("channel_dir")
        try:
            where = address(instance, engine_index, below=below)
        except OSError as error:
            logger.warning("slos-serve: no channel from the engine, so no verdicts and no counters: %s", error)
            return
        HUB.controls.append(partial(ask, address(instance, engine_index, "control", below)))
        self.listener = Listener(where, HUB.feed)
        atexit.register(self.listener.close)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing from vLLM's own statistics."""

    def log_engine_initialized(self) -> None:
        """Say nothing."""
