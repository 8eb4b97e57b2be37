"""Best-effort work ages: what has stood still for long gets a pace of its own, one request at a time.

Plans give best-effort work what promised work leaves, and under a lasting overload that is nothing. So the oldest
request that got no token for `STILL_S` beside promised work is planned from then on as if a slow pace were promised
to it. Nobody is told, and it is graded as before. Where even that pace is missed it is asked for again.

Tenants take turns: where work of another one stands still too, the pace goes on to it after `TURN_S`, so with T
tenants nobody stands still for longer than `STILL_S` and T such turns. What the engine's memory can never hold is
not waited for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.types import PROMISES, Tier

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Limits, RequestTable, Rows

STILL_S = 30.0
GRACE_S = 10.0  # until its next token is due
PACE_S = 0.2  # for each token after it
TURN_S = 10.0 + GRACE_S  # of one tenant, where others wait
EVERY_S = 1.0  # one look in each such span of the clock


class Ageing:
    """Watch over one host's request table between its plans; what is chosen stays so until it ends."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.chosen: str | None = None
        self._limits = limits
        self._last_look = -1
        self._turn_ends_s = math.inf
        self._served: dict[int, float] = {}  # when the last turn of a tenant began

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
        if self.chosen is None or self.chosen not in table or now_s >= self._turn_ends_s:
            self._take_turns(table, now_s)
        if self.chosen is None:
            return
        row = table.rows[table.index(self.chosen)]
        produced = float(row["num_output_tokens"])
        due_s = max(row["ttft_deadline_s"], row["first_token_s"] if produced else -math.inf) + PACE_S * produced
        if row["tier"] == Tier.PROMISED and not row["missed"] and due_s > now_s:
            return
        row["tier"], row["missed"] = Tier.PROMISED, 0
        _ask_for_nothing(row)
        row["ttft_deadline_s"] = now_s + GRACE_S - PACE_S * produced
        row["tpot_s"] = row["thinking_tpot_s"] = PACE_S

    def _take_turns(self, table: RequestTable, now_s: float) -> None:
        """Choose the oldest that stands still, of the tenant that has waited longest for a turn."""
        rows, still = table.rows, self._still(table, now_s)
        current = table.index(self.chosen) if self.chosen is not None and self.chosen in table else None
        if current is not None:
            still = still[rows["tenant"][still] != rows["tenant"][current]]
            if not still.size:
                return
            row = rows[current]
            row["tier"] = Tier.BEST_EFFORT
            _ask_for_nothing(row)
        self.chosen = None
        if still.size:
            tenants = rows["tenant"][still].tolist()
            served = np.array([self._served.get(tenant, -math.inf) for tenant in tenants])
            index = int(still[np.lexsort((rows["seq"][still], rows["arrival_s"][still], served))[0]])
            self.chosen, self._turn_ends_s = table.request_ids[index], now_s + TURN_S
            live = set(rows["tenant"].tolist())
            self._served = {tenant: at_s for tenant, at_s in self._served.items() if tenant in live}
            self._served[int(rows["tenant"][index])] = now_s

    def _still(self, table: RequestTable, now_s: float) -> IntArray:
        """Return the best-effort rows that got no token for long, and that fit into memory at all."""
        rows = table.rows
        since = np.where(np.isfinite(rows["last_token_s"]), rows["last_token_s"], rows["arrival_s"])
        mask = (rows["tier"] == Tier.BEST_EFFORT) & (now_s - since > STILL_S)
        if self._limits is not None:
            tokens = rows["num_prompt_tokens"] + rows["num_output_tokens"] + 1
            mask &= tokens <= self._limits.num_kv_blocks * self._limits.block_size
        return np.flatnonzero(mask)


def _ask_for_nothing(row: Rows) -> None:
    for name in PROMISES:
        row[name] = math.inf
