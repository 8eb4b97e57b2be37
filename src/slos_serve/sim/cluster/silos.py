"""Routers of rival deployments: GPUs partitioned by application, and prefill replicas that keep their sessions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from slos_serve.core.routing.router_base import Arrival, Route
from slos_serve.core.routing.routers import LeastLoad


class Silos(LeastLoad):
    """Send each class to its own replicas, the one with the fewest requests first.

    `sizes`: replicas by class, in the order of their numbers (`r0`, `r1`, ...). A class that has none, or
    none that is open, shares those of all.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._own = {
            name: {f"r{i}" for i in range(end - size, end)}
            for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True)
        }

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        own = self._own.get(arrival.slo_class, set())
        return super()._rank(arrival, [name for name in names if name in own] or names, now_s)


class Homes(LeastLoad):
    """Send a session's rounds to where its earlier prompts were computed, others to the fewest requests."""

    def __init__(self) -> None:
        super().__init__()
        self._homes: dict[str, str] = {}

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        home = self._homes.get(arrival.session_id)
        return super()._rank(arrival, [home] if home in names else names, now_s)

    def place(self, arrival: Arrival, replica_id: str, now_s: float) -> None:
        """Count a request, and remember where its session is."""
        super().place(arrival, replica_id, now_s)
        if arrival.session_id:
            self._homes[arrival.session_id] = replica_id
