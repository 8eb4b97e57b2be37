"""What the prefix cache holds of waiting requests: looked up a few at a time, for each lookup hashes and searches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slos_serve.core.types import RequestTable, Status
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.engine.live import Live

LOOKUPS_PER_STEP = 32
REFRESH_EVERY = 256  # steps between looking prefix hits of waiting requests up again
REFRESHED = 32


class Hits:
    """Keep `num_cached_tokens` of waiting rows near the truth, at most `LOOKUPS_PER_STEP` lookups at a time."""

    def __init__(self, scheduler: Any, table: RequestTable, live: Mapping[str, Live]) -> None:
        self.is_used = True
        self._scheduler = scheduler
        self._table = table
        self._live = live
        self._wanted: deque[str] = deque()
        self._steps = 0

    def want(self, request_ids: Iterable[str]) -> None:
        """Look requests up when their turn comes."""
        self._wanted.extend(request_ids)

    def step(self) -> None:
        """Look a few of the wanted up, and now and then of those that wait."""
        self._steps += 1
        is_due = self._steps % REFRESH_EVERY == 0
        if not self.is_used:
            self._wanted.clear()
            return
        if is_due:
            self.want(self._waiting()[:REFRESHED])
        for _ in range(min(LOOKUPS_PER_STEP, len(self._wanted))):
            self._look_up(self._wanted.popleft())

    def _waiting(self) -> list[str]:
        waiting = (self._table.rows["status"] == Status.WAITING).nonzero()[0].tolist()
        return [self._table.request_ids[index] for index in waiting]

    def _look_up(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is None or not live.has_row or live.request.num_computed_tokens:
            return
        row = self._table.rows[self._table.index(request_id)]
        if row["status"] == Status.WAITING:
            row["num_cached_tokens"] = view.cached_tokens(self._scheduler, live.request)

    def forget(self) -> None:
        """Look everybody up again: the cache has been emptied."""
        rows = self._table.rows
        rows["num_cached_tokens"][rows["status"] == Status.WAITING] = 0
        self.want(self._waiting())
