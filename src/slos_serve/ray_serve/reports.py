"""What a replica publishes about itself, through Ray Serve's `record_routing_stats`.

A report says how fresh it is in terms that need no common clock: how long the engine had been silent, and
for how long it had not finished a step although it had requests, when the report was made. A reader adds
the time since the report last changed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slos_serve.core.routing.routers import ReplicaSnapshot
from slos_serve.http.hub import Hub
from slos_serve.http.status import KEYS

KEY = "slos_serve"  # in Ray's routing statistics
VERSION = 1
SAID = ("effective_mode", "reason", "paused", "device", "profile")  # beside numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One replica's word about itself. Times in seconds; `snapshot` is None where it cannot plan or be read.

    `digest` tells replicas with another model or other classes apart.
    """

    made_s: float
    silent_s: float
    stalled_s: float
    digest: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)
    snapshot: ReplicaSnapshot | None = None


class Reporter:
    """Make the reports of one replica from what its hub has heard. `digest`: of its model and classes."""

    def __init__(self, hub: Hub, digest: str, clock: Callable[[], float] = time.time) -> None:
        self._hub = hub
        self._digest = digest
        self._clock = clock
        self._steps: object = None
        self._stepped_s = clock()

    def report(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        now, heard = self._clock(), dict(self._hub.snapshot or {})
        replica = heard.get("replica")
        silent_s = self._hub.snapshot_age_s
        is_idle = not (heard.get("num_running") or heard.get("num_waiting"))
        if heard.get("steps") != self._steps or is_idle or heard.get("paused"):
            self._steps, self._stepped_s = heard.get("steps"), now
        if isinstance(replica, Mapping) and is_idle and math.isfinite(silent_s):
            # An idle engine repeats its last state, and that is still its state.
            replica = {**replica, "time_s": now - silent_s}
        return {
            "version": VERSION,
            "made_s": now,
            "silent_s": silent_s if math.isfinite(silent_s) else None,
            "stalled_s": now - self._stepped_s,
            "digest": self._digest,
            "status": {
                "pid": os.getpid(),
                **{key: heard.get(key) for key in (*SAID, *KEYS)},
                "step_sums": self._hub.history.step_sums(),
            },
            "replica": replica,
        }


def parse_report(stats: Mapping[str, Any], replica_id: str, now_s: float) -> Report | None:
    """Read Ray's routing statistics of a replica; None where there is no report of this version in them.

    A snapshot of another version is left out: its replica is then ranked by the requests sent there. One
    from a clock that is ahead counts as made now.
    """
    data = stats.get(KEY)
    if not isinstance(data, Mapping) or data.get("version") != VERSION:
        return None
    try:
        snapshot = None
        if isinstance(data.get("replica"), Mapping):
            document = {**data["replica"], "replica_id": replica_id}
            document["time_s"] = min(float(document["time_s"]), now_s)
            snapshot = _snapshot(document)
        silent_s = data["silent_s"]
        return Report(
            made_s=float(data["made_s"]),
            silent_s=math.inf if silent_s is None else float(silent_s),
            stalled_s=float(data["stalled_s"]),
            digest=str(data["digest"]),
            status=dict(data["status"]),
            snapshot=snapshot,
        )
    except (KeyError, TypeError, ValueError):
        return None


def _snapshot(document: Mapping[str, Any]) -> ReplicaSnapshot | None:
    try:
        return ReplicaSnapshot.from_json(document)
    except ValueError:
        return None
