"""A request's way through the replicas, until one serves it: passed on, retried, refused or told of a loss.

Theory of operation. The ingress sends a hop and reads what comes back. While the replica has given no promise, and
again where it refuses one, the router is asked whether another one would: if so the request is taken back and sent
there, with its first arrival time and the replicas already tried; if not it stays, as best-effort work after a refusal
unless its class wants to be refused. A replica that dies or falls silent before the first chunk costs a hop and
nothing else. Once a chunk has gone to the client nothing is ever sent again: a loss then ends the stream with an
error event that says so.

What is here knows neither Ray nor HTTP, only a function that sends a hop and returns what it yields.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from slos_serve.core.routing.routers import Arrival
from slos_serve.errors import SlosServeError
from slos_serve.ray_serve.fleet import Fleet
from slos_serve.ray_serve.hops import FINISHED, VERDICT, Hop, Note, is_last, is_refusal

WATCH_S = 0.25
UNPLACED_S = 30.0  # how long a request waits while there is no replica at all
MAX_LOSSES = 2  # a request that kills its replica must not go through all of them


class Stream(Protocol):
    """What sending a hop returns."""

    async def __anext__(self) -> Any:
        """Return the next item; `StopAsyncIteration` at the end."""

    def cancel(self) -> Any:
        """Give the request up at the replica."""


class RefusedError(SlosServeError):
    """Say why no replica can serve a request as its class wants."""


class LostError(SlosServeError):
    """Say how often a request was lost, or that there is no replica."""


class _LostHereError(Exception):
    """The replica of this hop is lost; its text is for the client."""


class _PassedError(Exception):
    """The request is taken back from a replica."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id


@dataclass(slots=True, kw_only=True)
class RoutedRequest:
    """The request. `tell` takes every note of the replica that serves it, with the hops before it.

    `is_fault(error)` tells a replica's failure from an answer that another replica would give too.
    """

    arrival: Arrival
    send: Callable[[Hop], Stream]
    tell: Callable[[Note, int], None]
    is_fault: Callable[[BaseException], bool]
    count: Callable[[str], None]
    slo_id: str = ""
    slo_class: str = ""
    tenant: str = ""
    best_effort: bool = False
    rejects: bool = False
    num_parts: int = 1


class Journey:
    """One request's way; `items` yields what goes to the client. Use it once."""

    def __init__(self, routed: RoutedRequest, fleet: Fleet, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._who = routed
        self._fleet = fleet
        self._monotonic = monotonic
        self._tried: list[str] = []
        self._num_passed = 0
        self._num_lost = 0
        self._is_begun = False
        self._is_decided = False  # there is a verdict, and the request stays

    async def items(self) -> AsyncGenerator[Any, None]:
        """Yield chunks; `RefusedError` or `LostError` before the first of them, an error event after."""
        while True:
            hop = self._hop()
            self._is_decided = False
            stream = self._who.send(hop)
            try:
                async with contextlib.aclosing(self._read(stream, hop)) as chunks:
                    async for chunk in chunks:
                        self._is_begun = True
                        yield chunk
            except _PassedError as passed:
                self._num_passed += 1
                self._tried.append(passed.replica_id)
                self._who.count("passed")
            except _LostHereError as error:
                if self._is_begun:
                    self._who.count("broken")
                    yield broken_off(str(error))
                    return
                self._take_loss(hop, error)
            else:
                return
            finally:
                self._fleet.ended(self._who.arrival.request_id, hop.key)

    def _hop(self) -> Hop:
        who = self._who
        return Hop(
            key=uuid.uuid4().hex,
            arrival=replace(who.arrival, tried=tuple(self._tried)),
            slo_id=who.slo_id,
            slo_class=who.slo_class,
            tenant=who.tenant,
            best_effort=who.best_effort,
            num_parts=who.num_parts,
        )

    def _pass_on(self, hop: Hop, replica_id: str | None) -> None:
        """Take a request without a promise back where another replica would give one; `_PassedError` says so."""
        wants = self._who.slo_id and not (self._who.best_effort or self._is_begun or self._is_decided)
        if not wants or replica_id is None or self._num_passed >= self._fleet.num_hops:
            return
        if self._fleet.is_better_elsewhere(hop, replica_id):
            raise _PassedError(replica_id)

    def _take_loss(self, hop: Hop, error: _LostHereError) -> None:
        replica_id = self._fleet.where(hop.key)
        if replica_id is not None:
            self._fleet.lost(replica_id)
            self._tried.append(replica_id)
        self._num_lost += 1
        self._who.count("lost")
        if self._num_lost >= MAX_LOSSES or self._fleet.is_empty:
            raise LostError(f"no replica could serve the request ({error})") from error

    async def _read(self, stream: Stream, hop: Hop) -> AsyncGenerator[Any, None]:
        who = self._who
        is_over = False
        try:
            while True:
                try:
                    item = await self._next(stream, hop)
                except StopAsyncIteration:
                    is_over = True
                    return
                if not isinstance(item, Note):
                    if is_last(item):  # nobody may read on
                        is_over = True
                        who.count("served")
                    yield item
                    continue
                if item.kind == VERDICT and is_refusal(item.record) and not self._is_begun:
                    self._pass_on(hop, item.replica_id)
                    if who.rejects:
                        raise RefusedError(str(item.record.get("reason") or "compute"))
                self._is_decided = True
                if item.kind in {VERDICT, FINISHED}:
                    who.tell(item, self._num_passed + self._num_lost)
        finally:
            if not is_over:
                stream.cancel()

    async def _next(self, stream: Stream, hop: Hop) -> Any:
        """Return the next item; `_LostHereError` where its replica failed or is silent, `_PassedError` as it says."""
        task: asyncio.Future[Any] = asyncio.ensure_future(_anext(stream))
        began = self._monotonic()
        try:
            while True:
                done, _ = await asyncio.wait((task,), timeout=WATCH_S)
                if done:
                    break
                self._watch(hop, self._monotonic() - began)
            error = task.exception()
            if error is not None and self._who.is_fault(error):
                raise _LostHereError(f"{type(error).__name__} at its replica") from error
            return task.result()
        finally:
            if not task.done():
                task.cancel()

    def _watch(self, hop: Hop, waited_s: float) -> None:
        """Raise `_LostHereError` where waiting on makes no sense."""
        replica_id = self._fleet.where(hop.key)
        if self._fleet.is_empty and waited_s > UNPLACED_S:
            raise _LostHereError("there is none now")
        if replica_id is not None and self._fleet.is_silent(replica_id):
            raise _LostHereError(f"replica {replica_id} has stopped answering")
        self._pass_on(hop, replica_id)


async def _anext(stream: Stream) -> Any:
    return await stream.__anext__()


def broken_off(reason: str) -> str:
    """Return the events that end a stream whose replica was lost, worded as vLLM words an error in a stream."""
    message = f"the answer breaks off here: {reason}; nothing after this was generated and it was not retried"
    error = {"message": message, "type": "Service Unavailable", "param": None, "code": 503}
    return f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
