"""Pick a replica for a request, from snapshots that are always a little old.

Theory of operation. A router keeps, for every replica, its last snapshot and a *virtual copy*: what this
router has sent there since, so that a burst between two snapshots does not all go to one place. A policy
ranks the replicas; the host sends the request to the first, and asks again, with that replica among
`Arrival.tried`, where it got no promise there. `Router.hops` says how often that is worth trying.

`SloRouter` asks the planner's question. A closed form over all replicas at once (prefill backlog due
before the request, decode load, KV blocks) gives each a guess of feasibility and a price: the seconds and
blocks that the promise takes, each times a power of how full that resource would be. Full resources are
dear, a cached prefix is cheap, and equal requests go to the emptiest replica. The best few are then put
to the planner's own test, `dry_run.simulate`, on the virtual copy, and the first that keeps every
deadline gets the request. Where none does, it goes where it comes closest to being promised later, or,
where no replica could serve it in time, to the shortest best-effort queue.

A replica without a snapshot, or with one older than `stale_s`, is ranked by the requests that are there;
one that has just come (or come back) carries phantom load that fades over `ramp_s`, so that several
routers do not all send to it at once. Nothing here reads a clock or draws a random number but
`PowerOfTwo`, which is given its generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from slos_serve.core.routing.estimates import Estimates, ReplicaEstimates
from slos_serve.core.routing.router_base import Arrival, Choice, Route, Router, RouterBase
from slos_serve.core.routing.snapshots import ReplicaSnapshot, snapshot_of
from slos_serve.core.routing.virtual_copy import VirtualCopy

__all__ = [
    "ROUTERS",
    "Arrival",
    "Choice",
    "LeastLoad",
    "PowerOfTwo",
    "ReplicaSnapshot",
    "RoundRobin",
    "Route",
    "Router",
    "Sequential",
    "SloRouter",
    "make_router",
    "snapshot_of",
]

MAX_SESSIONS = 10_000
MAX_RANKED = 8  # further choices that a route names
TOGETHER_S = 1.0  # replicas first heard of within this time are equally new


def _plain(names: Sequence[str], reason: str) -> Route:
    return Route(choices=_unknown(names), reason=reason)


def _unknown(names: Sequence[str]) -> tuple[Choice, ...]:
    return tuple(Choice(replica_id=name) for name in names)


class RoundRobin(RouterBase):
    """Each replica in turn."""

    def __init__(self, **options: float) -> None:
        super().__init__(**options)
        self._turn = 0

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival, now_s
        start = self._turn % len(names)
        self._turn += 1
        return _plain(names[start:] + names[:start], "turn")


class LeastLoad(RouterBase):
    """The replica with the fewest requests."""

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival
        return _plain(self._by_load(names, now_s), "load")


class PowerOfTwo(RouterBase):
    """The less loaded of two replicas drawn at random."""

    def __init__(self, rng: np.random.Generator, **options: float) -> None:
        super().__init__(**options)
        self._rng = rng

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival
        two = [names[i] for i in self._rng.permutation(len(names))[:2].tolist()]
        return _plain(self._by_load(two, now_s), "load")


class Sequential(RouterBase):
    """The published policy: replica after replica in a fixed order, until one promises."""

    hops = 1_000_000

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival, now_s
        return _plain(names, "turn")


class SloRouter(RouterBase):
    """Ours: the replica that can promise at the least price; see the module's text.

    `num_tested`: replicas put to the planner's test. `work_limit`: its work for each, in the planner's
    unit. `max_parked`: best-effort requests a replica takes before others are preferred. `ramp_s`: how
    long a replica that has just come carries phantom load.
    """

    uses_snapshots = True

    def __init__(
        self,
        *,
        hops: int = 2,
        num_tested: int = 2,
        work_limit: int = 20_000,
        max_parked: int = 256,
        ramp_s: float = 5.0,
        **options: float,
    ) -> None:
        super().__init__(**options)
        if hops < 0 or num_tested < 1 or work_limit < 1 or max_parked < 0 or ramp_s < 0:
            raise ValueError("SloRouter: expected num_tested and work_limit of at least 1 and nothing negative")
        self.hops = hops
        self.num_tested = num_tested
        self.work_limit = work_limit
        self.max_parked = max_parked
        self.ramp_s = ramp_s
        self._copies: dict[str, VirtualCopy] = {}
        self._replicas = ReplicaEstimates()
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def _observed(self, snapshot: ReplicaSnapshot) -> None:
        self._copies[snapshot.replica_id] = VirtualCopy.of(snapshot)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that has gone."""
        super().forget(replica_id)
        self._copies.pop(replica_id, None)
        self._replicas.drop(replica_id)

    def place(self, arrival: Arrival, replica_id: str, now_s: float) -> None:
        """Count a request as sent to a replica, and remember where its session is."""
        super().place(arrival, replica_id, now_s)
        if arrival.session_id:
            self._sessions.pop(arrival.session_id, None)
            self._sessions[arrival.session_id] = replica_id, arrival.num_prompt_tokens
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _cached_tokens(self, arrival: Arrival, replica_id: str) -> int:
        hit = arrival.cached_tokens.get(replica_id, 0)
        if arrival.session_id:
            copy = self._copies.get(replica_id)
            last, tokens = self._sessions.get(arrival.session_id, ("", 0))
            hit = max(hit, copy.sessions.get(arrival.session_id, 0) if copy else 0, tokens if last == replica_id else 0)
        return hit

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        for name in self._changed:
            self._replicas.put(name, self._known[name], self._copies.get(name))
        self._changed.clear()
        estimates, blind = self._estimate(arrival, names, now_s)
        if estimates is None:
            return _plain(blind, "load")
        if not arrival.has_slo:
            return _plain([*self._parked(estimates), *blind], "requested")
        order = estimates.cheapest(estimates.fits)
        # Who has been declined somewhere is asked about often: only where it looks good.
        worth_it = [i for i in order if estimates.fits[i]] if arrival.tried else order
        tested: set[int] = set()
        for i in worth_it[: self.num_tested]:
            slack = self._slack_s(arrival, estimates, i, now_s)
            if slack is not None:
                best = Choice(replica_id=estimates.names[i], feasible=True, slack_s=slack)
                rest = [other for other in order if other != i]
                return Route(choices=(best, *_choices(estimates, rest, tested), *_unknown(blind)), reason="feasible")
            tested.add(i)
        if (estimates.left_tokens > estimates.known.peak * (arrival.deadline_s - now_s)).all():
            parked = self._parked(estimates)
            full = self._num_parked(parked[0]) >= self.max_parked
            return _plain([*parked, *blind], "full" if full else "parked")
        order = estimates.cheapest(estimates.slack_s >= 0)
        return Route(choices=(*_choices(estimates, order, tested), *_unknown(blind)), reason="deferred")

    def _slack_s(self, arrival: Arrival, estimates: Estimates, i: int, now_s: float) -> float | None:
        """Put one replica to the planner's test; None where a promise would break."""
        name = estimates.names[i]
        start_s, done = now_s + float(estimates.wait_s[i]), float(estimates.done[i])
        row = self._row(arrival, name)
        return self._copies[name].slack_s(self._replicas.flow(name), row, start_s, done, self.work_limit)

    def _estimate(self, arrival: Arrival, names: list[str], now_s: float) -> tuple[Estimates | None, list[str]]:
        """Return the closed form's view of the replicas, and those of which too little is known, by load."""
        known = self._replicas.known(names)
        oldest_s, newest_s = known.since_s.min(), known.since_s.max()
        newness = np.zeros(len(names))
        if newest_s - oldest_s > TOGETHER_S and now_s - newest_s < self.ramp_s:
            age_s = np.where(known.since_s - oldest_s > TOGETHER_S, now_s - known.since_s, self.ramp_s)
            newness = np.maximum(0.0, 1.0 - age_s / self.ramp_s)
        fresh = now_s - known.time_s <= self.stale_s
        blind: list[str] = []
        if not fresh.all():
            blind = self._by_load([names[i] for i in np.flatnonzero(~fresh).tolist()], now_s)
            names, newness = [names[i] for i in np.flatnonzero(fresh).tolist()], newness[fresh]
            if not names:
                return None, blind
            known = self._replicas.known(names)
        cached = np.zeros(len(names))
        if arrival.session_id or arrival.cached_tokens:
            cached[:] = [min(self._cached_tokens(arrival, name), arrival.num_prompt_tokens - 1) for name in names]
        return self._replicas.estimate(arrival, names, known, cached=cached, newness=newness, now_s=now_s), blind

    def _num_parked(self, replica_id: str) -> int:
        return int(self._replicas.known([replica_id]).num_parked[0])

    def _parked(self, estimates: Estimates) -> list[str]:
        """Order replicas by how soon best-effort work there would be done, full ones last."""
        return [estimates.names[i] for i in estimates.parked(self.max_parked)]


def _choices(estimates: Estimates, order: Sequence[int], tested: set[int]) -> Iterator[Choice]:
    for i in order[:MAX_RANKED]:
        feasible = False if i in tested else None
        yield Choice(replica_id=estimates.names[i], feasible=feasible, slack_s=float(estimates.slack_s[i]))


ROUTERS: Mapping[str, Callable[..., Router]] = {
    "round-robin": RoundRobin,
    "least-load": LeastLoad,
    "power-of-two": PowerOfTwo,
    "sequential": Sequential,
    "slo": SloRouter,
}


def make_router(name: str, *, rng: np.random.Generator | None = None, **options: float) -> Router:
    """Return a policy by name; `ValueError` lists the names. `rng` is what `power-of-two` draws from."""
    if name not in ROUTERS:
        raise ValueError(f"router {name!r}: expected one of {', '.join(ROUTERS)}")
    if name == "power-of-two":
        if rng is None:
            raise ValueError("router 'power-of-two': expected a generator to draw from")
        return PowerOfTwo(rng, **options)
    return ROUTERS[name](**options)
