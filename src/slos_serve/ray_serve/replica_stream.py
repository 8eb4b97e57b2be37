"""The replica's side of a hop: pass vLLM's chunks on, and say what the scheduler decided.

The verdict is told as soon as it is there, usually a step before the first token, and how it ended before
the last chunk, because whoever holds that back could not read on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

from slos_serve.errors import SlosServeError
from slos_serve.http.hub import Hub
from slos_serve.ray_serve.hops import FINISHED, VERDICT, Hop, Note, is_last

LONGEST_WAIT_S = 600.0
OUTCOME_WAIT_S = 0.1
ERROR_EVENT = 'data: {"error"'
_END = object()


class EngineLostError(SlosServeError):
    """Say that a replica's engine has died under a request."""


async def alive(stream: AsyncGenerator[Any, None], is_dead: Callable[[], bool]) -> AsyncGenerator[Any, None]:
    """Yield what `stream` yields; raise where vLLM words the death of its engine as an answer."""
    async with contextlib.aclosing(stream):
        async for item in stream:
            if is_error(item) and is_dead():
                raise EngineLostError("the engine of this replica has died")
            yield item


def is_error(item: Any) -> bool:
    """Tell whether an item of a stream is an error event, or an error in place of an answer."""
    if isinstance(item, list):
        return any(isinstance(one, str) and one.startswith(ERROR_EVENT) for one in item)
    return getattr(item, "error", None) is not None


async def told(stream: AsyncGenerator[Any, None], hop: Hop, hub: Hub, replica_id: str) -> AsyncGenerator[Any, None]:
    """Yield what `stream` yields with notes in between; see the module's text. `stream` is always closed."""
    if not hop.slo_id:
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield item
        return
    hub.open(
        hop.slo_id,
        slo_class=hop.slo_class,
        tenant=hop.tenant,
        arrival_s=hop.arrival.arrival_s,
        best_effort=hop.best_effort,
    )
    first: asyncio.Future[Any] = asyncio.ensure_future(cast("Any", anext(stream, _END)))
    verdict = asyncio.ensure_future(hub.wait_verdict(hop.slo_id, LONGEST_WAIT_S))
    said = "pending"
    try:
        await asyncio.wait((first, verdict), return_when=asyncio.FIRST_COMPLETED)
        record = hub.find(hop.slo_id)
        if record is not None and record["verdict"] != said:
            said = record["verdict"]
            yield Note(kind=VERDICT, replica_id=replica_id, record=record)
        item = await first
        while item is not _END:
            if is_last(item):
                await hub.wait_end(hop.slo_id, hop.num_parts, OUTCOME_WAIT_S)
            record = hub.find(hop.slo_id)
            if record is not None and record["verdict"] != said:
                said = record["verdict"]
                yield Note(kind=VERDICT, replica_id=replica_id, record=record)
            if record is not None and is_last(item) and "outcome" in record:
                yield Note(kind=FINISHED, replica_id=replica_id, record=record)
            yield item
            item = await anext(stream, _END)
    finally:
        verdict.cancel()
        await _end(first, stream)


async def _end(first: asyncio.Future[Any], stream: AsyncGenerator[Any, None]) -> None:
    if not first.done():
        first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await stream.aclose()
