"""One replica: Ray Serve LLM's server of vLLM, which tells what its scheduler decides.

Ray constructs it in the replica's actor. vLLM's engine runs our scheduler; what that publishes reaches this
process's hub through the stat-logger plug-in, as it does in a server of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections.abc import AsyncGenerator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from slos_serve.core.perf import PerfModel
from slos_serve.core.words import Reason
from slos_serve.errors import SlosServeError
from slos_serve.http import seal
from slos_serve.http.explaining import first_answer
from slos_serve.http.hub import HUB
from slos_serve.places import open_new, private_folder, socket_root
from slos_serve.ray_serve import names
from slos_serve.ray_serve.hops import VERDICT, Hop, Note, is_refusal
from slos_serve.ray_serve.replica_stream import alive, told
from slos_serve.ray_serve.reports import KEY, Reporter

PLUGINS = "vllm.stat_logger_plugins"
UNHEALTHY_SILENT_S = 15.0
UNHEALTHY_STALLED_S = 60.0


class UnhealthyError(SlosServeError):
    """Say why Ray should replace this replica."""


class SloServer(LLMServer):
    """A replica that says what it can promise, and what it knows of its load."""

    async def __init__(self, llm_config: LLMConfig, **options: Any) -> None:  # type: ignore[misc] # Ray awaits it
        check_installed()
        HUB.notices.is_silent = True  # the ingress, which knows the hops, tells of the same requests
        seal.prepare()  # before the engine's process inherits the environment
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        _prepare(llm_config, self._replica_id)
        self._num_refused = 0
        self._asked_s = time.monotonic()
        self._reporter = Reporter(HUB, digest_of(llm_config.model_id, slo_settings(llm_config)))
        await super().__init__(llm_config, **options)

    async def _start_engine(self) -> None:
        """Start the engine; Ray's report of usage, for which it starts another process, only where that is wanted."""
        if names.usage_stats_enabled():
            await super()._start_engine()
        else:
            await self.engine.start()

    async def chat(self, request: Any, raw_request_info: Any = None, hop: Hop | None = None) -> AsyncGenerator[Any]:
        """Answer a chat completion; notes come between the chunks where the caller sent a hop."""
        _seal(request, hop)
        return self._answer(await super().chat(request, raw_request_info), hop)

    async def completions(
        self, request: Any, raw_request_info: Any = None, hop: Hop | None = None
    ) -> AsyncGenerator[Any]:
        """Answer a completion; see `chat`."""
        _seal(request, hop)
        return self._answer(await super().completions(request, raw_request_info), hop)

    def _answer(self, stream: AsyncGenerator[Any], hop: Hop | None) -> AsyncGenerator[Any]:
        if hop is None:
            return stream
        return self._counted(told(alive(stream, self._is_dead), hop, HUB, self._replica_id))

    async def _counted(self, stream: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        try:
            async for item in stream:
                if isinstance(item, Note) and item.kind == VERDICT and is_refusal(item.record):
                    # What was refused beside no promise at all would be refused by a new replica too.
                    is_busy = item.record.get("reason") != Reason.TOO_TIGHT
                    self._num_refused += is_busy and bool((HUB.snapshot or {}).get("num_promised"))
                yield item
        finally:
            await stream.aclose()

    def _is_dead(self) -> bool:
        return bool(getattr(getattr(self.engine, "_engine_client", None), "errored", False))

    async def record_routing_stats(self) -> dict[str, Any]:
        """Publish this replica's report to the routers."""
        stats = await super().record_routing_stats()
        return {**stats, KEY: self._reporter.report()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Publish what the autoscaling policy decides by: see `autoscaling`."""
        now = time.monotonic()
        refused, self._num_refused = self._num_refused, 0
        passed_s, self._asked_s = max(now - self._asked_s, 1e-3), now
        snapshot = HUB.snapshot or {}
        return {
            "slo_load": _load(snapshot),
            "slo_refused_per_s": refused / passed_s,
            "slo_drain_s": min(float(snapshot.get("drain_s") or 0.0), 1e6),
        }

    async def set_mode(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give this replica's engine an order about its mode; return what it says."""
        said: dict[str, Any] = {}
        for control in HUB.controls:
            said = dict(await asyncio.to_thread(control, order))
        return said

    async def explain(self, order: dict[str, Any]) -> dict[str, Any]:
        """Ask this replica's engines why a request was not promised; return the answer of the one that had it."""
        return await asyncio.to_thread(first_answer, HUB.controls, order)

    async def check_health(self) -> None:
        """Raise where the engine has died, fallen silent, or stopped finishing steps."""
        await super().check_health()
        report = self._reporter.report()
        silent_s, stalled_s = report["silent_s"], report["stalled_s"]
        if silent_s is not None and silent_s > UNHEALTHY_SILENT_S:
            raise UnhealthyError(f"the engine has been silent for {silent_s:.0f} s")
        if stalled_s > UNHEALTHY_STALLED_S:
            raise UnhealthyError(f"the engine has finished no step for {stalled_s:.0f} s although it has requests")

    async def __del__(self) -> None:
        """End the engine's process with the replica, once Ray has drained it."""
        await super().__del__()
        client = getattr(getattr(self, "engine", None), "_engine_client", None)
        if client is not None:
            client.shutdown()


def check_installed() -> None:
    """Raise `SlosServeError` where vLLM would not find our plug-in, and nobody would hear what the engine decides."""
    if not any(one.value.startswith("slos_serve.") for one in entry_points(group=PLUGINS)):
        expected = "pip install it on every machine, or name it in runtime_env"
        raise SlosServeError(f"slos-serve can be imported by this replica but is not installed: {expected}")


def _seal(request: Any, hop: Hop | None) -> None:
    """Vouch to this replica's engine for what the ingress stamped; only an ingress of ours sends hops."""
    if hop is not None and request.vllm_xargs and "slo_id" in request.vllm_xargs:
        request.vllm_xargs = seal.sealed(request.vllm_xargs)


def slo_settings(llm_config: LLMConfig) -> Mapping[str, Any]:
    """Return what the engine is told about SLOs."""
    additional = llm_config.engine_kwargs.get("additional_config") or {}
    return additional.get("slo") or {}


def digest_of(model_id: str, slo: Mapping[str, Any]) -> str:
    """Return what tells apart replicas that serve another model or resolve classes differently."""
    text = json.dumps([model_id, slo.get("config")], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(snapshot: Mapping[str, Any]) -> float:
    """Return the share of the engine's prefill rate that promises have taken, 0 to 1."""
    headroom, replica = snapshot.get("headroom_tokens_per_s"), snapshot.get("replica")
    is_idle = not (snapshot.get("num_running") or snapshot.get("num_waiting"))
    if is_idle or headroom is None or not isinstance(replica, Mapping):
        return 0.0
    budget = replica["limits"]["max_num_batched_tokens"]
    peak = budget / max(PerfModel.from_json(replica["perf_model"]).seconds(budget), 1e-9)
    load = 1.0 - headroom / peak
    return min(max(load, 0.0), 1.0) if math.isfinite(load) else 0.0


def _prepare(llm_config: LLMConfig, replica_id: str) -> None:
    """Give the engine files of this machine: the profile that came along, a record of its own, a local model."""
    if Path(llm_config.get_engine_config().actual_hf_model_id).is_dir():
        llm_config.get_or_create_callback().ctx.run_init_node = False  # nothing to download
    slo = dict(slo_settings(llm_config))
    profile, record = slo.get("profile"), slo.get("record")
    if isinstance(profile, Mapping):
        text = json.dumps(profile, sort_keys=True)
        name = f"slos-serve-profile-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        path = private_folder("profiles") / name
        part = path.with_suffix(f".{replica_id}")
        with open_new(part) as file:
            file.write(text)
        part.replace(path)
        slo["profile"] = str(path)
    if record:
        path = Path(record)
        slo["record"] = str(path.with_stem(f"{path.stem}-{replica_id}"))
    with contextlib.suppress(OSError):  # the engine says what is wrong, and only observes
        slo["channel_dir"] = str(socket_root() / replica_id)
    additional = {**(llm_config.engine_kwargs.get("additional_config") or {}), "slo": slo}
    llm_config.update_engine_kwargs(additional_config=additional)
