"""Pick a replica for a request, from snapshots that are always a little old.

Theory of operation. A router keeps, for every replica, its last snapshot and a *virtual copy*: what this
router has sent there since, so that a burst between two snapshots does not all go to one place. A policy
ranks the replicas; the host sends the request to the first, and asks again, with that replica among
`Arrival.tried`, where it got no promise there. `Router.hops` says how often that is worth trying.

`SloRouter` asks the planner's question. A closed form over all replicas at once (prefill backlog due
before the request, decode load, KV blocks) gives each a guess of feasibility and a price: the seconds and
blocks that the promise takes, each times a power of how full that resource would be. Full resources are
dear, a cached prefix is cheap, and equal requests go to the emptiest replica. The best few are then put
to the planner's own test, `trial.simulate`, on the virtual copy, and the first that keeps every
deadline gets the request. Where none does, it goes where it comes closest to being promised later, or,
where no replica could serve it in time, to the shortest best-effort queue.

A replica without a snapshot, or with one older than `stale_s`, is ranked by the requests that are there;
one that has just come (or come back) carries phantom load that fades over `ramp_s`, so that several
routers do not all send to it at once. Nothing here reads a clock or draws a random number but
`PowerOfTwo`, which is given its generator.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from slos_serve.core.dispatch import Arrival, Choice, Dispatcher, Route, Router
from slos_serve.core.snapshots import PrefillRow, ReplicaSnapshot, snapshot_of
from slos_serve.core.virtual_copy import Flow, Guess, VirtualCopy

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
    return Route(choices=tuple(Choice(replica_id=name) for name in names), reason=reason)


class RoundRobin(Dispatcher):
    """Each replica in turn."""

    def __init__(self, **options: float) -> None:
        super().__init__(**options)
        self._turn = 0

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival, now_s
        start = self._turn % len(names)
        self._turn += 1
        return _plain(names[start:] + names[:start], "turn")


class LeastLoad(Dispatcher):
    """The replica with the fewest requests."""

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival
        return _plain(self._by_load(names, now_s), "load")


class PowerOfTwo(Dispatcher):
    """The less loaded of two replicas drawn at random."""

    def __init__(self, rng: np.random.Generator, **options: float) -> None:
        super().__init__(**options)
        self._rng = rng

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival
        two = [names[i] for i in self._rng.permutation(len(names))[:2].tolist()]
        return _plain(self._by_load(two, now_s), "load")


class Sequential(Dispatcher):
    """The published policy: replica after replica in a fixed order, until one promises."""

    hops = 1_000_000

    def _rank(self, arrival: Arrival, names: list[str], now_s: float) -> Route:
        del arrival, now_s
        return _plain(names, "turn")


class SloRouter(Dispatcher):
    """Ours: the replica that can promise at the least price; see the module's text.

    `num_tested`: replicas put to the planner's test. `work_limit`: its effort for each, in the planner's
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
        self._flows: dict[str, tuple[int, Flow]] = {}
        self._sessions: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def _observed(self, snapshot: ReplicaSnapshot) -> None:
        self._copies[snapshot.replica_id] = VirtualCopy.of(snapshot)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that has gone."""
        super().forget(replica_id)
        self._copies.pop(replica_id, None)
        self._flows.pop(replica_id, None)

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
        guesses, blind = self._guess(arrival, names, now_s)
        if not guesses:
            return _plain(blind, "load")
        if not arrival.has_slo:
            return _plain([*self._parked(guesses), *blind], "requested")
        guesses.sort(key=lambda guess: (not guess.fits, guess.price))
        # Who has been declined somewhere is asked about often: only where it looks good.
        worth_it = [guess for guess in guesses if guess.fits] if arrival.tried else guesses
        tested: set[str] = set()
        for guess in worth_it[: self.num_tested]:
            copy = self._copies[guess.replica_id]
            slack = copy.slack_s(self._flow(guess.replica_id, copy), guess.row, now_s, self.work_limit)
            if slack is not None:
                best = Choice(replica_id=guess.replica_id, feasible=True, slack_s=slack)
                rest = [one for one in guesses if one is not guess]
                return Route(choices=(best, *_choices(rest, tested), *_plain(blind, "").choices), reason="feasible")
            tested.add(guess.replica_id)
        left_s = arrival.deadline_s - now_s
        if all(guess.row.left_tokens > self._copies[guess.replica_id].peak * left_s for guess in guesses):
            order = self._parked(guesses)
            full = self._num_parked(order[0]) >= self.max_parked
            return _plain([*order, *blind], "full" if full else "parked")
        guesses.sort(key=lambda guess: (guess.slack_s < 0, guess.price))
        return Route(choices=(*_choices(guesses, tested), *_plain(blind, "").choices), reason="deferred")

    def _guess(self, arrival: Arrival, names: list[str], now_s: float) -> tuple[list[Guess], list[str]]:
        """Return the closed form's view of each replica, and those of which too little is known, by load."""
        guesses, blind = [], []
        since_s = [self._known[name].since_s for name in names]
        oldest_s = min(since_s)
        some_new = max(since_s) - oldest_s > TOGETHER_S and now_s - max(since_s) < self.ramp_s
        phantom = self._phantom_tokens(names) if some_new else 0.0
        for name, row in zip(names, self._rows(arrival, names), strict=True):
            known = self._known[name]
            copy = self._copies.get(name)
            if copy is None or copy.snapshot.mode != "enforce" or not known.is_fresh(now_s, self.stale_s):
                blind.append(name)
                continue
            age_s = now_s - known.since_s
            is_new = some_new and age_s < self.ramp_s and known.since_s - oldest_s > TOGETHER_S
            extra = phantom * (1.0 - age_s / self.ramp_s) if is_new else 0.0
            guesses.append(copy.guess(name, row, self._flow(name, copy), now_s, extra))
        return guesses, self._by_load(blind, now_s)

    def _flow(self, replica_id: str, copy: VirtualCopy) -> Flow:
        """Return what was sent to a replica since its snapshot, summed up; kept until that changes."""
        known = self._known[replica_id]
        version, flow = self._flows.get(replica_id, (-1, None))
        if flow is None or version != known.version:
            flow = copy.flow([entry for entry in known.recent.values() if _is_owed(entry[1])])
            self._flows[replica_id] = known.version, flow
        return flow

    def _phantom_tokens(self, names: Sequence[str]) -> float:
        """Return the mean prefill backlog: what a newcomer is taken to have."""
        backlogs = [self._flow(name, copy).listed for name in names if (copy := self._copies.get(name)) is not None]
        return sum(backlogs) / max(1, len(backlogs))

    def _num_parked(self, replica_id: str) -> int:
        known = self._known[replica_id]
        listed = known.snapshot.num_best_effort if known.snapshot else 0
        return listed + sum(not _is_owed(row) for _, row in known.recent.values())

    def _parked(self, guesses: Sequence[Guess]) -> list[str]:
        """Order replicas by how soon best-effort work there would be done, full ones last."""

        def key(guess: Guess) -> tuple[bool, float]:
            copy, known = self._copies[guess.replica_id], self._known[guess.replica_id]
            tokens = copy.snapshot.best_effort_tokens + sum(
                row.left_tokens + row.output_tokens for _, row in known.recent.values() if not _is_owed(row)
            )
            return self._num_parked(guess.replica_id) >= self.max_parked, tokens / max(guess.rate, 1.0)

        return [guess.replica_id for guess in sorted(guesses, key=key)]


def _is_owed(row: PrefillRow) -> bool:
    return math.isfinite(row.deadline_s) or math.isfinite(row.tpot_s)


def _choices(guesses: Sequence[Guess], tested: set[str]) -> Iterator[Choice]:
    for guess in guesses[:MAX_RANKED]:
        feasible = False if guess.replica_id in tested else None
        yield Choice(replica_id=guess.replica_id, feasible=feasible, slack_s=guess.slack_s)


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
