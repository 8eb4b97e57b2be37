"""What the engines behind one server last said about themselves, as one snapshot.

Usually there is one engine and this is its snapshot; several (data parallelism) are joined: see `status`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from slos_serve.http.status import joined

Snapshot = Mapping[str, Any]


class Snapshots:
    """The last snapshot of each engine. One thread writes, others read."""

    def __init__(self) -> None:
        self.by_engine: dict[object, Snapshot] = {}
        self._whole: Snapshot | None = None
        self._taken_s = self._worked_s = -math.inf
        self._heard_s: dict[object, float] = {}

    def take(self, engine: object, snapshot: Snapshot) -> Snapshot:
        """Keep an engine's newest snapshot; return the whole."""
        now, before = time.monotonic(), self.by_engine.get(engine) or {}
        self._heard_s[engine] = time.time()
        steps = snapshot.get("steps")
        if steps is None or steps != before.get("steps"):
            self._worked_s = now
        self.by_engine = {**self.by_engine, engine: dict(snapshot)}
        self._whole, self._taken_s = self._merged(snapshot), now
        return self._whole

    def _merged(self, newest: Snapshot) -> Snapshot:
        every = list(self.by_engine.values())
        if len(every) == 1:
            return every[0]
        whole = {**newest, **joined(every)}
        whole["profile"] = None if any(one.get("profile") is None for one in every) else newest.get("profile")
        return whole

    @property
    def whole(self) -> Snapshot | None:
        """The last snapshot, however old."""
        return self._whole

    @property
    def heard_s(self) -> float:
        """When the engine was last heard that has been silent longest, as Unix time; of at least one."""
        return min(self._heard_s.values())

    @property
    def age_s(self) -> float:
        """Seconds since the last snapshot; infinite before the first."""
        return time.monotonic() - self._taken_s

    @property
    def idle_s(self) -> float:
        """Seconds since an engine was last seen to have made a step; infinite before the first."""
        return time.monotonic() - self._worked_s
