"""How many replicas the promises need: a policy for Ray Serve's autoscaler.

Each replica reports the share of its prefill rate that its promises take (`slo_load`), the promises that it
refused beside others that it had given (`slo_refused_per_s`), and how long its backlog takes to drain
(`slo_drain_s`). Enough replicas are wanted that the mean load is `target_load`, and one more while promises are
refused. Replicas go one at a time, only where the others could carry their load, and only where no backlog is
longer than Ray waits for a stopping replica: what it has promised is finished before it ends. Ray applies
bounds and delays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TARGET_LOAD = 0.7
REFUSED_PER_S = 0.02


class HeadroomPolicy:
    """The policy. `patience_s`: how long Ray waits for a stopping replica (`graceful_shutdown_timeout_s`)."""

    def __init__(
        self, target_load: float = TARGET_LOAD, refused_per_s: float = REFUSED_PER_S, patience_s: float = 300.0
    ) -> None:
        if not 0 < target_load < 1 or refused_per_s < 0 or patience_s <= 0:
            raise ValueError("HeadroomPolicy: expected 0 < target_load < 1, refused_per_s >= 0, patience_s > 0")
        self.target_load = target_load
        self.refused_per_s = refused_per_s
        self.patience_s = patience_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return (replicas wanted, state to keep); Ray calls it every control loop."""
        metrics = context.aggregated_metrics or {}
        wanted = self.wanted(
            context.target_num_replicas,
            list(_values(metrics, "slo_load")),
            refused_per_s=sum(_values(metrics, "slo_refused_per_s")),
            drain_s=max(_values(metrics, "slo_drain_s"), default=0.0),
        )
        return wanted, {}

    def wanted(self, current: int, loads: list[float], *, refused_per_s: float, drain_s: float) -> int:
        """Return the number of replicas; `current` where nothing has been reported yet."""
        if not loads:
            return current
        needed = max(1, math.ceil(sum(loads) / self.target_load - 1e-9))
        if refused_per_s > self.refused_per_s:
            needed = max(needed, current + 1)
        if needed >= current:
            return needed
        return current - 1 if drain_s < self.patience_s else current


def _values(metrics: Mapping[str, Mapping[Any, Any]], name: str) -> list[float]:
    values = (metrics.get(name) or {}).values()
    return [float(value) for value in values if value is not None and math.isfinite(value)]
