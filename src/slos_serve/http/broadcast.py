"""What live pages show, made once for all who may see the same: a stream of events, or one document for who asks again.

A *tick* is made every `PERIOD_S` while somebody listens. A page that has seen the tick before gets what changed
since, any other one the whole, and both are encoded once however many pages are open. Who reads slowly skips ticks;
nothing is queued. A stream ends when the engine falls silent and after `LONGEST_S`: so a server that shuts down does
not wait for pages, which come back by themselves and meanwhile ask for the document.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from slos_serve.core.story import state_of
from slos_serve.http.answers import finite
from slos_serve.http.hub import Hub
from slos_serve.http.records import Record

PERIOD_S = 2.0
LONGEST_S = 600.0
NUM_RECENT = 100
MAX_AUDIENCES = 1000
ROW = ("id", "class", "tenant", "verdict", "reason", "outcome", "arrival_s", "ttft_ms", "tpot_ms", "asked", "replica")
PRIVATE = frozenset({"replica"})  # of a snapshot: what routers plan with
OPERATORS_KEYS = frozenset({"snapshot", "malformed_messages"})  # of the status


class Tick:
    """One moment of what an audience sees. `whole` and `change` are encoded when first asked for."""

    def __init__(self, number: int, make: Callable[[bool], dict[str, Any]]) -> None:
        self.number = number
        self.made_s = time.monotonic()
        self._make = make
        self._texts: dict[bool, bytes] = {}

    def text(self, *, whole: bool) -> bytes:
        """Return the document: all of it, or what changed since the tick before."""
        if whole not in self._texts:
            document = {**self._make(whole), "tick": self.number, "whole": whole}
            self._texts[whole] = json.dumps(finite(document), separators=(",", ":")).encode()
        return self._texts[whole]


class Audience:
    """The ticks of one audience, made while somebody waits for them."""

    def __init__(self, hub: Hub, tenant: str | None) -> None:
        self._hub = hub
        self._tenant = tenant
        self._seen = 0  # the newest change of a record that the last tick told
        self._told_s = 0.0
        self._tick: Tick | None = None
        self._timer: asyncio.Future[None] | None = None

    def now(self) -> Tick:
        """Return a tick no older than the period."""
        if self._tick is None or time.monotonic() - self._tick.made_s > PERIOD_S:
            return self._turn()
        return self._tick

    async def after(self, number: int) -> Tick:
        """Return the tick after the one of this number, once it is there."""
        tick = self.now()
        if tick.number > number:
            return tick
        if self._timer is None or self._timer.done():
            self._timer = asyncio.ensure_future(asyncio.sleep(PERIOD_S))
            self._timer.add_done_callback(lambda _: self._turn())
        await asyncio.shield(self._timer)
        return self.now()

    def _turn(self) -> Tick:
        seen, told_s = self._seen, self._told_s
        self._seen, self._told_s = self._hub.last_change, time.time()
        last = self._tick
        self._tick = Tick(1 if last is None else last.number + 1, lambda whole: self._document(whole, seen, told_s))
        return self._tick

    def _document(self, whole: bool, seen: int, told_s: float) -> dict[str, Any]:
        """Return what the audience may see: all of it, or what changed since the tick before."""
        hub, tenant = self._hub, self._tenant
        records = hub.recent(lambda owner: tenant is None or owner == tenant, NUM_RECENT, since=0 if whole else seen)
        document: dict[str, Any] = {"now": round(time.time(), 3), "status": _public(status(hub, whole=tenant is None))}
        document["requests"] = [row(record) for record in records]
        if tenant is None:  # the load is for operators
            history = hub.history
            document |= {"bucket_s": history.bucket_s, "totals": history.totals()}
            document["buckets"] = history.since(-math.inf if whole else told_s - 1.0)
        return document


class Broadcast:
    """The channels of one API process, by audience: a tenant, or None for who may see everything."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._channels: dict[str | None, Audience] = {}

    def document(self, tenant: str | None) -> bytes:
        """Return what an audience sees now."""
        return self._channel(tenant).now().text(whole=True)

    async def events(self, tenant: str | None) -> AsyncIterator[bytes]:
        """Yield server-sent events, the whole first, while the engine is heard."""
        channel, began_s, number = self._channel(tenant), time.monotonic(), -1
        while self._hub.is_heard and time.monotonic() - began_s < LONGEST_S:
            tick = await channel.after(number)
            yield b"data: " + tick.text(whole=tick.number != number + 1) + b"\n\n"
            number = tick.number

    def _channel(self, tenant: str | None) -> Audience:
        if tenant not in self._channels and len(self._channels) >= MAX_AUDIENCES:
            self._channels.pop(next(iter(self._channels)))
        return self._channels.setdefault(tenant, Audience(self._hub, tenant))


def _public(said: dict[str, Any]) -> dict[str, Any]:
    """Return a status without what only routers read."""
    if said.get("snapshot"):
        said["snapshot"] = {key: value for key, value in said["snapshot"].items() if key not in PRIVATE}
    return said


def row(record: Record) -> dict[str, Any]:
    """Return a request as the page lists it; the rest is told to who asks why."""
    return {"state": state_of(record)} | {key: record[key] for key in ROW if record.get(key) not in (None, "")}


def status(hub: Hub, *, whole: bool = True) -> dict[str, Any]:
    """Return the engine's last word about itself; its load is for its operator alone (`whole`)."""
    snapshot = hub.snapshot
    document = {
        "object": "slo.status",
        "model": hub.model,
        "mode": (snapshot or hub.settings).get("mode"),
        "class_modes": (snapshot or hub.settings).get("class_modes") or {},
        "effective_mode": (snapshot or {}).get("effective_mode"),
        "profiling": hub.is_profiling,
        "delivery_ms": round(1000 * hub.delivery.expected_s(time.monotonic()), 1),
        "snapshot_age_s": None if snapshot is None else round(hub.snapshot_age_s, 3),
        "snapshot": snapshot,
        "malformed_messages": hub.num_malformed,
    }
    if (snapshot or {}).get("device"):  # an emulated one: everybody may know
        document["device"] = (snapshot or {})["device"]
    return document if whole else {key: value for key, value in document.items() if key not in OPERATORS_KEYS}
