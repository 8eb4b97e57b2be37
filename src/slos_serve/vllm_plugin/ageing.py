"""Best-effort work ages: what has stood still for long gets a pace of its own, one request at a time.

Plans give best-effort work what promised work leaves, and under a lasting overload that is nothing. So the oldest
request that got no token for `STILL_S` is planned from then on as if a slow pace were promised to it. Nobody is told,
and it is graded as before. Where even that pace is missed it is asked for again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.types import Tier

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.tracking import Tracker

STILL_S = 30.0
GRACE_S = 10.0  # until its next token is due
PACE_S = 0.2  # for each token after it
EVERY = 32  # steps


class Ageing:
    """Watch over one tracker's table; what is chosen stays so until it ends."""

    def __init__(self, tracker: Tracker, *, still_s: float = STILL_S) -> None:
        self.chosen: str | None = None
        self._tracker = tracker
        self._still_s = still_s
        self._steps = 0

    def step(self, now_s: float) -> None:
        """Choose whom to wait for, or see to it that the chosen one is still waited for."""
        self._steps += 1
        if self._steps % EVERY or not len(self._tracker.table):
            return
        rows, live = self._tracker.table.rows, self._tracker.live
        if self.chosen is None or self.chosen not in live or not live[self.chosen].has_row:
            since = np.where(np.isfinite(rows["last_token_s"]), rows["last_token_s"], rows["arrival_s"])
            still = np.flatnonzero((rows["tier"] == Tier.BEST_EFFORT) & (now_s - since > self._still_s))
            if not still.size:
                self.chosen = None
                return
            self.chosen = self._tracker.table.request_ids[int(still[np.argmin(rows["arrival_s"][still])])]
        row = rows[self._tracker.table.index(self.chosen)]
        produced = float(row["num_output_tokens"])
        due_s = max(row["ttft_deadline_s"], row["first_token_s"] if produced else -math.inf) + PACE_S * produced
        if row["tier"] == Tier.PROMISED and not row["missed"] and due_s > now_s:
            return
        row["tier"], row["missed"], row["is_thinking"] = Tier.PROMISED, 0, 0
        row["ttft_deadline_s"] = now_s + GRACE_S - PACE_S * produced
        row["tpot_s"] = row["thinking_tpot_s"] = PACE_S
        row["e2e_deadline_s"] = row["max_gap_s"] = math.inf
