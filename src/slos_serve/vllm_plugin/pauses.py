"""An operator's pause (`/pause`, `/sleep`): nothing is planned or promised in it, and its time does not count."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.engine.tracking import Tracker


class Pauses:
    """What is paused now, and since when; `kind` is "" (nothing), "new" (nobody is admitted) or "all"."""

    def __init__(self) -> None:
        self.kind = ""
        self._since_s = math.inf

    def change(self, kind: str, now_s: float, tracker: Tracker) -> None:
        """Take up what the operator says now; what was held until now is owed so much later."""
        if kind == self.kind:
            return
        if self.kind:
            for live in tracker.live.values():
                if self.kind == "all" or not view.is_admitted(live.request):
                    tracker.delay(live, now_s - max(self._since_s, live.arrival_s))
        self.kind, self._since_s = kind, now_s
