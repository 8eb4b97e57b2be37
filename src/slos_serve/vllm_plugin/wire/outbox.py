"""What waits to be published, and when it is."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slos_serve.vllm_plugin.wire.sender import Sender

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.wire.channel import Publisher

PUBLISH_EVERY_S = 0.25
HEARTBEAT_S = 1.0


class Outbox:
    """Collect verdicts, finished requests and samples; send them with a snapshot.

    A message goes out when there is something to tell, and every `PUBLISH_EVERY_S` of work. `capture` is asked for a
    snapshot at that rate at most, after `refresh`: it reads what the scheduler's thread may change and returns what
    makes the snapshot of it. That, `facts` (its parts that change without traffic) and sending are left to `sender`.
    Only `heartbeat` may be called from another thread.
    """

    def __init__(
        self,
        publisher: Publisher,
        engine_index: int,
        capture: Callable[[], Callable[[], dict[str, Any]]],
        facts: Callable[[], dict[str, Any]],
        *,
        refresh: Callable[[], None] = lambda: None,
        failed: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.publisher = publisher
        self.sender = Sender(failed)
        self.verdicts: list[dict[str, Any]] = []
        self.finished: list[dict[str, Any]] = []
        self.plan_s: list[float] = []
        self.steps: list[tuple[Any, ...]] = []  # see `http.history.Step`
        self._engine_index = engine_index
        self._capture = capture
        self._facts = facts
        self._refresh = refresh
        self._snapshot: Callable[[], dict[str, Any]] | None = None
        self._snapshot_at = 0.0
        self._sent_at = 0.0

    @property
    def snapshot(self) -> dict[str, Any]:
        """The newest snapshot, taken now if there was none, or one from before the profile was read."""
        known = None if self._snapshot is None else self._snapshot()
        if known is None or known.get("replica", known) is None:
            known = self._capture()()
        return {**known, **self._facts()}

    def flush(self, now_s: float, *, is_idle: bool) -> None:
        """Send what there is to tell; once more, with a fresh snapshot, when the engine falls idle."""
        is_due = is_idle or now_s - self._snapshot_at >= PUBLISH_EVERY_S
        if is_due:
            self._refresh()
            self._snapshot, self._snapshot_at = functools.cache(self._capture()), now_s
        if not (is_due or self.verdicts or self.finished):
            return
        told: dict[str, Any] = {"verdicts": self.verdicts, "finished": self.finished}
        told |= {"plan_s": self.plan_s, "steps": self.steps}
        self.verdicts, self.finished, self.plan_s, self.steps = [], [], [], []
        self._sent_at = time.monotonic()
        self.sender.put(lambda: self.publisher.send(self._message(now_s) | told))

    def close(self) -> None:
        """Send what is waiting, then nothing more."""
        self.sender.close()
        self.publisher.close()

    def heartbeat(self, now_s: float, *, at_once: bool = False) -> None:
        """Repeat the snapshot where nothing was sent for a while, for listeners come late, or where facts changed."""
        if at_once or time.monotonic() - self._sent_at > HEARTBEAT_S:
            self._sent_at = time.monotonic()
            self.sender.put(lambda: self.publisher.send(self._message(now_s)))

    def _message(self, now_s: float) -> dict[str, Any]:
        return {
            "v": 1,
            "engine": self._engine_index,
            "t": now_s,
            "verdicts": [],
            "finished": [],
            "snapshot": self.snapshot,
        }
