"""How long a request may wait in the queue: `ttl_ms` of its class, counted from its arrival.

Only a request that nothing was promised to and that has not begun can expire, and only where plans are
carried out: observing changes nothing in the engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.engine.live import Live

SPARE = 64  # entries of requests that are gone, beside as many as live ones
RETRY_S = 0.25  # until a request that could not expire when its time came is looked at again


class Expiry:
    """Remember when waits end; constant work while none does, and memory in proportion to the live requests."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, live: Live, ttl_ms: float | None) -> None:
        """Take up a request whose class bounds its wait."""
        if ttl_ms is not None:
            heapq.heappush(self._heap, (live.arrival_s + ttl_ms / 1000, live.request_id))

    def take(self, now_s: float, known: Mapping[str, Live], *, enforcing: bool) -> list[Live]:
        """Return the live requests whose wait ends now."""
        heap = self._heap
        ended: list[Live] = []
        if len(heap) > 2 * len(known) + SPARE:  # most have ended long before their wait would
            heap[:] = [entry for entry in heap if entry[1] in known]
            heapq.heapify(heap)
        if not enforcing:
            return ended
        while heap and heap[0][0] <= now_s:
            live = known.get(heapq.heappop(heap)[1])
            if live is None or live.was_promised or live.has_begun:
                continue
            if view.is_queued(live.request):
                ended.append(live)
            else:
                heapq.heappush(heap, (now_s + RETRY_S, live.request_id))
        return ended
