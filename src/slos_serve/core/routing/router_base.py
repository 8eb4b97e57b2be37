"""What is routed, the answer, and the books that every routing policy keeps.

A policy is a `RouterBase` with a `_rank`. The base remembers, for each replica, the last snapshot and
what it has sent there since, so that a burst between two snapshots is seen; and it leaves out replicas that
drain, are unhealthy, or were tried.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from slos_serve.core.routing.snapshots import PrefillRow, ReplicaSnapshot

if TYPE_CHECKING:
    from slos_serve.core.types import Request

REASONS = ("turn", "load", "feasible", "deferred", "parked", "full", "requested", "no-replica")
MAX_SENT = 4096  # requests remembered per replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that needs a replica. Absolute times in seconds on the router's clock, `inf` for no promise.

    `cached_tokens`: prefix-cache hits known by replica. `tried`: replicas that gave no promise.
    """

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    predicted_output_tokens: float = 256.0
    ttft_deadline_s: float = math.inf
    tpot_s: float = math.inf
    e2e_deadline_s: float = math.inf
    weight: float = 1.0
    slo_class: str = ""
    session_id: str = ""
    cached_tokens: Mapping[str, int] = field(default_factory=dict)
    tried: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.arrival_s):
            raise ValueError(f"Arrival.arrival_s = {self.arrival_s!r}: expected a finite time in seconds")
        if self.num_prompt_tokens < 1 or not self.predicted_output_tokens >= 0:
            raise ValueError("Arrival: expected at least 1 prompt token and no negative output")

    @classmethod
    def of(cls, request: Request, *, predicted_output_tokens: float, **more: object) -> Arrival:
        """Return the arrival of a request; thinking counts at the tighter of its two paces."""
        slo, at = request.slo, request.arrival_s
        tpots = [one for one in (slo.tpot_s, slo.thinking_tpot_s if request.thinks else None) if one is not None]
        return cls(
            request_id=request.request_id,
            arrival_s=at,
            num_prompt_tokens=request.num_prompt_tokens,
            predicted_output_tokens=predicted_output_tokens,
            ttft_deadline_s=math.inf if slo.ttft_s is None else at + slo.ttft_s,
            tpot_s=min(tpots, default=math.inf),
            e2e_deadline_s=math.inf if slo.e2e_s is None else at + slo.e2e_s,
            weight=request.weight,
            slo_class=request.slo_class,
            **more,  # type: ignore[arg-type]
        )

    @property
    def has_slo(self) -> bool:
        """Tell whether anything is promised about it."""
        return math.isfinite(min(self.ttft_deadline_s, self.tpot_s, self.e2e_deadline_s))

    @property
    def pace_s(self) -> float:
        """Seconds per output token: TPOT, or what an `e2e` promise asks for, if that is faster."""
        span = self.e2e_deadline_s - self.arrival_s
        return max(1e-6, min(self.tpot_s, 0.5 * span / max(1.0, self.predicted_output_tokens)))

    @property
    def deadline_s(self) -> float:
        """When the first token must be out; `inf` where nothing is promised about it."""
        if not math.isfinite(self.e2e_deadline_s):
            return self.ttft_deadline_s
        behind = max(0.0, self.predicted_output_tokens - 1.0) * self.pace_s
        return min(self.ttft_deadline_s, self.e2e_deadline_s - behind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One ranked replica. `feasible` is None where nothing was tested; `slack_s` is predicted before the deadline."""

    replica_id: str
    feasible: bool | None = None
    slack_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Replicas to send to, best first, and why (one of `REASONS`). Empty where there is none."""

    choices: tuple[Choice, ...]
    reason: str

    @property
    def replica_id(self) -> str | None:
        """The replica to send to, None where there is none."""
        return self.choices[0].replica_id if self.choices else None


class Router(Protocol):
    """Rank replicas for arrivals.

    `hops`: how many more replicas to try after one that gave no promise. `uses_snapshots`: without them the
    policy goes by what it has sent itself.
    """

    hops: int
    uses_snapshots: bool

    def observe(self, snapshot: ReplicaSnapshot) -> None:
        """Take a replica's newer snapshot; older ones than the last are ignored."""

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that has gone."""

    def ended(self, request_id: str) -> None:
        """Note that a request sent earlier has ended, or was taken back; unknown ids are fine."""

    def rank(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank `replica_ids` for a request; those in `arrival.tried` only where there is no other."""
        ...

    def place(self, arrival: Arrival, replica_id: str, now_s: float) -> None:
        """Count a request as sent to a replica, and nowhere else."""

    def choose(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank, and place with the first."""
        ...


@dataclass(slots=True)
class Known:
    """What is known of one replica: its snapshot, and what was sent there and has not ended."""

    since_s: float
    snapshot: ReplicaSnapshot | None = None
    sent: OrderedDict[str, None] = field(default_factory=OrderedDict)
    recent: dict[str, tuple[float, PrefillRow]] = field(default_factory=dict)  # not in the snapshot yet

    def update(self, snapshot: ReplicaSnapshot) -> None:
        """Take a newer snapshot; what it knows of is no longer recent."""
        self.snapshot = snapshot
        if self.recent:
            listed = {row.request_id for row in snapshot.prefills}
            self.recent = {
                name: entry for name, entry in self.recent.items() if entry[0] >= snapshot.time_s and name not in listed
            }

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self.sent.pop(request_id, None)
        self.recent.pop(request_id, None)

    def is_fresh(self, now_s: float, stale_s: float) -> bool:
        """Tell whether the snapshot is recent enough to plan with."""
        return self.snapshot is not None and now_s - self.snapshot.time_s <= stale_s

    def num_requests(self, now_s: float, stale_s: float) -> int:
        """Return the requests that are there, as far as can be known."""
        if self.snapshot is None or not self.is_fresh(now_s, stale_s):
            return len(self.sent)
        return self.snapshot.num_running + self.snapshot.num_waiting + len(self.recent)


class RouterBase:
    """The bookkeeping all policies share.

    `stale_s`: how old a snapshot may be. `transit_s`: a request sent this long before a snapshot has
    reached the replica and is part of it.
    """

    hops = 0
    uses_snapshots = False

    def __init__(self, *, stale_s: float = 3.0, transit_s: float = 0.0) -> None:
        if not stale_s > 0 or transit_s < 0:
            raise ValueError("stale_s and transit_s: expected seconds, stale_s above 0")
        self.stale_s = stale_s
        self.transit_s = transit_s
        self._known: dict[str, Known] = {}
        self._where: dict[str, str] = {}  # request -> replica it was sent to last
        self._changed: set[str] = set()  # replicas of which something became known since the last ranking

    def observe(self, snapshot: ReplicaSnapshot) -> None:
        """Take a snapshot, unless it is older than the last."""
        known = self._known.setdefault(snapshot.replica_id, Known(since_s=snapshot.time_s))
        if known.snapshot is not None and snapshot.time_s < known.snapshot.time_s:
            return
        known.update(snapshot)
        self._changed.add(snapshot.replica_id)
        self._observed(snapshot)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that has gone."""
        known = self._known.pop(replica_id, None)
        self._changed.discard(replica_id)
        for request_id in known.sent if known else ():
            self._where.pop(request_id, None)

    def ended(self, request_id: str) -> None:
        """Note that a request has ended, or was taken back."""
        replica_id = self._where.pop(request_id, None)
        if replica_id is not None and replica_id in self._known:
            self._known[replica_id].drop(request_id)
            self._changed.add(replica_id)

    def choose(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank the replicas that are open to a request, and count it as sent to the first."""
        self.ended(arrival.request_id)
        route = self.rank(arrival, replica_ids, now_s)
        if route.replica_id is not None:
            self.place(arrival, route.replica_id, now_s)
        return route

    def rank(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank the replicas that are open to a request."""
        usable = [name for name in replica_ids if not self._is_leaving(name)] or list(replica_ids)
        open_to = [name for name in usable if name not in arrival.tried] or usable
        if not open_to:
            return Route(choices=(), reason="no-replica")
        for name in open_to:
            if name not in self._known:
                self._known[name] = Known(since_s=now_s)
                self._changed.add(name)
        return self._rank(arrival, open_to, now_s)

    def num_requests(self, replica_id: str, now_s: float) -> int:
        """Return the requests at a replica, as far as can be known; 0 for an unknown one."""
        known = self._known.get(replica_id)
        return known.num_requests(now_s, self.stale_s) if known else 0

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        raise NotImplementedError

    def _observed(self, snapshot: ReplicaSnapshot) -> None:
        """Update what a policy derives from a snapshot."""

    def _cached_tokens(self, arrival: Arrival, replica_id: str) -> int:
        """Return the prefix-cache hit to expect at a replica."""
        return arrival.cached_tokens.get(replica_id, 0)

    def _is_leaving(self, replica_id: str) -> bool:
        known = self._known.get(replica_id)
        return (
            known is not None and known.snapshot is not None and (known.snapshot.draining or not known.snapshot.healthy)
        )

    def _row(self, arrival: Arrival, replica_id: str) -> PrefillRow:
        """Return the request as it will look on a replica."""
        snapshot, prompt = self._known[replica_id].snapshot, arrival.num_prompt_tokens
        guard_s, block_size, acceptance = 0.0, 16, 0.0
        if snapshot is not None:
            guard_s, block_size = snapshot.limits.guard_s, snapshot.limits.block_size
            acceptance = snapshot.acceptance.get(arrival.slo_class, 0.0)
        cached = min(self._cached_tokens(arrival, replica_id), prompt - 1)
        return PrefillRow(
            request_id=arrival.request_id,
            left_tokens=float(prompt - cached),
            context_tokens=float(cached),
            deadline_s=arrival.deadline_s - guard_s,
            tpot_s=arrival.pace_s,
            output_tokens=max(1.0, arrival.predicted_output_tokens),
            held_blocks=0.0,
            start_blocks=float(-(-(prompt + 1) // block_size)),
            acceptance=min(max(acceptance, 0.0), 0.99),
            promised=False,
        )

    def place(self, arrival: Arrival, replica_id: str, now_s: float) -> None:
        """Count a request as sent to a replica."""
        self.ended(arrival.request_id)
        known = self._known.setdefault(replica_id, Known(since_s=now_s))
        known.sent[arrival.request_id] = None
        known.recent[arrival.request_id] = now_s + self.transit_s, self._row(arrival, replica_id)
        self._changed.add(replica_id)
        self._where[arrival.request_id] = replica_id
        while len(known.sent) > MAX_SENT:  # nobody told us that they ended
            oldest = next(iter(known.sent))
            known.drop(oldest)
            self._where.pop(oldest, None)

    def _by_load(self, names: Sequence[str], now_s: float) -> list[str]:
        return sorted(names, key=lambda name: self.num_requests(name, now_s))
