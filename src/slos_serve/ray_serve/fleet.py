"""The replicas of one deployment as this process sees them: who is there, who is silent, whom to ask next.

Ray's router loop tells what it hears (`update`) and asks for a ranking (`choose`); the ingress, on another
thread, asks where a request went (`where`) and whether that replica still works (`is_silent`), and tells
what it saw fail (`lost`). A lock makes this safe; nothing here waits or does I/O.

Silence is relative: when nothing is heard of any replica, it is the messenger that is silent, and nobody
is given up for it. A replica that never said how its engine does is judged by Ray's health checks alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slos_serve.core.routing.routers import Router
from slos_serve.ray_serve.hops import Hop
from slos_serve.ray_serve.reports import Report, parse_report

SILENT_S = 5.0  # an engine's heartbeat is a second
STALLED_S = 20.0  # longer than any single step
SUSPECT_S = 10.0  # how long a replica that lost a request is asked last
MOVES_FOR = frozenset({"feasible", "turn"})  # reasons of a route that are worth taking a request back
MAX_HOPS_KEPT = 10_000
MAX_LEFT_KEPT = 100


@dataclass(slots=True)
class Member:
    """One replica. Times on the monotonic clock: since when it is known, and when its report last changed."""

    since_s: float
    changed_s: float
    report: Report | None = None
    suspect_until_s: float = -math.inf


class Fleet:
    """See the module's text.

    `digest` is that of the ingress's own classes and model, "" for unknown. `on_update` is called after every
    update, on the thread of Ray's router.
    """

    def __init__(
        self,
        name: str = "",
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.digest = ""
        self.on_update: Callable[[], None] = lambda: None
        self._policy: Router | None = None
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._left_silent: OrderedDict[str, None] = OrderedDict()
        self._is_watching = False
        self._where: OrderedDict[str, str] = OrderedDict()  # hop -> replica

    def use(self, policy: Router) -> None:
        """Rank with `policy` from now on; what is known is told to it."""
        with self._lock:
            self._policy = policy
            for member in self._members.values():
                if member.report is not None and member.report.snapshot is not None:
                    policy.observe(member.report.snapshot)

    @property
    def num_hops(self) -> int:
        """How many more replicas the policy would try after a refusal."""
        return self._policy.hops if self._policy is not None else 0

    def update(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the running replicas and their latest statistics; what is not among them has gone."""
        wall, now = self._wall(), self._monotonic()
        with self._lock:
            self._is_watching = True
            for replica_id in self._members.keys() - stats.keys():
                if self._is_silent(replica_id):
                    self._left_silent[replica_id] = None
                    while len(self._left_silent) > MAX_LEFT_KEPT:
                        self._left_silent.popitem(last=False)
                del self._members[replica_id]
                if self._policy is not None:
                    self._policy.forget(replica_id)
            for replica_id, one in stats.items():
                member = self._members.setdefault(replica_id, Member(since_s=now, changed_s=now))
                report = parse_report(one, replica_id, wall)
                if report is None or (member.report is not None and report.made_s == member.report.made_s):
                    continue
                member.report, member.changed_s = report, now
                if report.snapshot is not None and self._policy is not None:
                    self._policy.observe(report.snapshot)
        self.on_update()

    def choose(self, hop: Hop, candidates: Sequence[str]) -> list[str]:
        """Rank candidates for a hop, best first; silent, suspect or paused ones come in only where all are."""
        with self._lock:
            usable = [name for name in candidates if self._is_usable(name)] or list(candidates)
            same = [name for name in usable if self._is_alike(name)] or usable
            if self._policy is None:
                ranked = same
            else:
                route = self._policy.choose(hop.arrival, same, self._wall())
                ranked = [choice.replica_id for choice in route.choices]
            if ranked:
                self._note(hop.key, ranked[0])
            return ranked + [name for name in same if name not in ranked]

    def routed(self, hop: Hop, replica_id: str) -> None:
        """Note which replica a hop really went to: Ray passes over one that is full."""
        with self._lock:
            if self._policy is not None and self._where.get(hop.key) != replica_id:
                self._policy.place(hop.arrival, replica_id, self._wall())
            self._note(hop.key, replica_id)

    def where(self, key: str) -> str | None:
        """Return the replica that a hop was sent to, None before that."""
        with self._lock:
            return self._where.get(key)

    def ended(self, request_id: str, key: str) -> None:
        """Note that a request's hop is over."""
        with self._lock:
            self._where.pop(key, None)
            if self._policy is not None:
                self._policy.ended(request_id)

    def lost(self, replica_id: str) -> None:
        """Note that a replica failed a request: others are asked first for a while."""
        with self._lock:
            if replica_id in self._members:
                self._members[replica_id].suspect_until_s = self._monotonic() + SUSPECT_S

    def is_silent(self, replica_id: str) -> bool:
        """Tell whether a replica has stopped working. One that drains is no longer listed, and works on."""
        with self._lock:
            if replica_id in self._members:
                return self._is_silent(replica_id)
            return replica_id in self._left_silent

    @property
    def is_empty(self) -> bool:
        """Tell whether it is known that there is no replica to send to."""
        with self._lock:
            return self._is_watching and not self._members

    @property
    def is_unwatched(self) -> bool:
        """Tell whether nobody tells this fleet of its replicas, as with Ray's own router."""
        with self._lock:
            return self._policy is None and not self._is_watching

    @property
    def num_usable(self) -> int:
        """How many replicas can be sent to."""
        with self._lock:
            return sum(map(self._is_usable, self._members))

    def is_better_elsewhere(self, hop: Hop, replica_id: str) -> bool:
        """Tell whether the policy sees a promise for a request, undecided or refused where it is, at another replica.

        What has begun is not moved: its prefill would be lost.
        """
        with self._lock:
            tried = (*hop.arrival.tried, replica_id)
            names = [name for name in self._members if self._is_usable(name) and self._is_alike(name)]
            names = [name for name in names if name not in tried]
            is_late = self._wall() > hop.arrival.deadline_s
            if self._policy is None or not names or is_late or self._has_begun(hop, replica_id):
                return False
            route = self._policy.rank(replace(hop.arrival, tried=tried), names, self._wall())
            return route.reason in MOVES_FOR

    def reports(self) -> dict[str, Report]:
        """Return the last report of every replica that has made one."""
        with self._lock:
            return {name: one.report for name, one in self._members.items() if one.report is not None}

    def status(self) -> list[dict[str, Any]]:
        """Return one line of JSON values for each replica."""
        now = self._monotonic()
        with self._lock:
            return [
                {
                    "id": name,
                    "deployment": self.name,
                    "usable": self._is_usable(name),
                    "age_s": None if one.report is None else round(now - one.changed_s + one.report.silent_s, 3),
                    "plans": one.report is not None and one.report.snapshot is not None,
                    "same_config": self._is_alike(name),
                    **({} if one.report is None else one.report.status),
                }
                for name, one in self._members.items()
            ]

    # Under the lock.

    def _has_begun(self, hop: Hop, replica_id: str) -> bool:
        member = self._members.get(replica_id)
        snapshot = member.report.snapshot if member is not None and member.report is not None else None
        rows = snapshot.prefills if snapshot is not None else ()
        return any(row.context_tokens > 0 for row in rows if row.request_id == hop.arrival.request_id)

    def _note(self, key: str, replica_id: str) -> None:
        self._where[key] = replica_id
        while len(self._where) > MAX_HOPS_KEPT:
            self._where.popitem(last=False)

    def _is_alike(self, replica_id: str) -> bool:
        member = self._members.get(replica_id)
        report = member.report if member else None
        return not self.digest or report is None or not report.digest or report.digest == self.digest

    def _is_usable(self, replica_id: str) -> bool:
        member = self._members.get(replica_id)
        if member is None or (member.report is not None and member.report.status.get("paused")):
            return False
        return self._monotonic() >= member.suspect_until_s and not self._is_silent(replica_id)

    def _is_silent(self, replica_id: str) -> bool:
        member = self._members[replica_id]
        report = member.report
        if report is None or not math.isfinite(report.silent_s):
            return False
        if report.stalled_s > STALLED_S:
            return True
        unheard_s = self._monotonic() - member.changed_s
        newest_s = min(self._monotonic() - one.changed_s for one in self._members.values())
        return unheard_s - newest_s + report.silent_s > SILENT_S


_FLEETS: dict[tuple[str, str], Fleet] = {}
_LOCK = threading.Lock()


def fleet_of(application: str, deployment: str) -> Fleet:
    """Return this process's fleet of a deployment: Ray's router and the ingress meet in it."""
    with _LOCK:
        return _FLEETS.setdefault((application, deployment), Fleet(deployment))
