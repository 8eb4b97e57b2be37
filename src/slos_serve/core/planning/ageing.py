"""Best-effort work ages: what has stood still for long gets a pace of its own, one request at a time.

Plans give best-effort work what promised work leaves, and under a lasting overload that is nothing. So the oldest
request that got no token for `STILL_S` beside promised work is planned from then on as if a slow pace were promised
to it. Nobody is told, and it is graded as before. Where even that pace is missed it is asked for again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.types import Tier

if TYPE_CHECKING:
    from slos_serve.core.types import RequestTable

STILL_S = 30.0
GRACE_S = 10.0  # until its next token is due
PACE_S = 0.2  # for each token after it
EVERY_S = 1.0  # one look in each such span of the clock


class Ageing:
    """Watch over one host's request table between its plans; what is chosen stays so until it ends."""

    def __init__(self) -> None:
        self.chosen: str | None = None
        self._last_look = -1

    @property
    def next_look_s(self) -> float:
        """When `step` looks again."""
        return (self._last_look + 1) * EVERY_S

    def step(self, table: RequestTable, now_s: float) -> None:
        """Choose whom to wait for, or see to it that the chosen one is still waited for; before a plan at `now_s`."""
        look = int(now_s // EVERY_S)
        if look == self._last_look or (table.rows["tier"] == Tier.BEST_EFFORT).all():
            return  # where there is nothing else, the oldest runs first as it is
        self._last_look = look
        if self.chosen is None or self.chosen not in table:
            self.chosen = _oldest_still(table, now_s)
        if self.chosen is None:
            return
        row = table.rows[table.index(self.chosen)]
        produced = float(row["num_output_tokens"])
        due_s = max(row["ttft_deadline_s"], row["first_token_s"] if produced else -math.inf) + PACE_S * produced
        if row["tier"] == Tier.PROMISED and not row["missed"] and due_s > now_s:
            return
        row["tier"], row["missed"] = Tier.PROMISED, 0
        row["ttft_deadline_s"] = now_s + GRACE_S - PACE_S * produced
        row["tpot_s"] = row["thinking_tpot_s"] = PACE_S
        row["e2e_deadline_s"] = row["max_gap_s"] = math.inf


def _oldest_still(table: RequestTable, now_s: float) -> str | None:
    rows = table.rows
    since = np.where(np.isfinite(rows["last_token_s"]), rows["last_token_s"], rows["arrival_s"])
    still = np.flatnonzero((rows["tier"] == Tier.BEST_EFFORT) & (now_s - since > STILL_S))
    return table.request_ids[int(still[np.argmin(rows["arrival_s"][still])])] if still.size else None
