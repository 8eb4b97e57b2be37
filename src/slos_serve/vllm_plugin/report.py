"""Count what became of requests, by class, and say it in one plain line per class."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class ClassTally:
    """Counts of one class since the start."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_promised: int = 0
    num_kept: int = 0

    def line(self, name: str) -> str:
        """Return the class's state as text."""
        counted = sum(n for outcome, n in self.outcomes.items() if outcome not in ("none", "cancelled"))
        parts = [f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items())]
        text = f"  {name}: " + ", ".join(parts)
        if counted:
            text += f"; attained {self.outcomes['met'] / counted:.1%}"
        if self.num_promised:
            text += f"; kept {self.num_kept} of {self.num_promised} promises"
        return text


class Tally:
    """Outcomes by class, and whether anything was added since the last report."""

    def __init__(self) -> None:
        self.classes: dict[str, ClassTally] = {}
        self.is_news = False

    def add(self, slo_class: str, outcome: str, *, promised: bool) -> None:
        """Count one finished request."""
        tally = self.classes.setdefault(slo_class, ClassTally())
        tally.outcomes[outcome] += 1
        if promised and outcome in ("met", "missed"):
            tally.num_promised += 1
            tally.num_kept += outcome == "met"
        self.is_news = True

    def text(self, snapshot: Mapping[str, Any]) -> str:
        """Return the periodic report, several lines."""
        self.is_news = False
        model = snapshot.get("model_error", {}).get("mape")
        plan = snapshot.get("plan_s", {})
        head = (
            f"SLO report: mode {snapshot.get('effective_mode')}"
            + (f" ({snapshot['reason']})" if snapshot.get("reason") else "")
            + f", {snapshot.get('steps', 0)} steps"
            + (f", step times predicted within {model:.0%}" if model is not None else "")
            + (f", planning p99 {plan['p99'] * 1000:.2f} ms" if plan.get("p99") is not None else "")
        )
        would = snapshot.get("would_be_by_class") or {}
        lines = [tally.line(name) + _would(would.get(name)) for name, tally in list(self.classes.items())]
        return "\n".join([head, *lines])


def _would(verdicts: Mapping[str, int] | None) -> str:
    """Return what plans would have said of a class while they were not carried out."""
    if not verdicts:
        return ""
    promised, not_promised = verdicts.get("promised", 0), verdicts.get("best-effort", 0)
    return f"; would have promised {promised} and not {not_promised}"


class Ring:
    """The last measurements, for their quantiles."""

    def __init__(self, size: int = 1024) -> None:
        self._values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Keep one value in place of the oldest."""
        self._values.append(value)

    def quantiles(self) -> dict[str, float | None]:
        """Return the median and the 99 % quantile, None before any value."""
        kept = list(self._values)  # on a thread of its own: another one adds
        if not kept:
            return {"p50": None, "p99": None}
        p50, p99 = np.quantile(kept, [0.5, 0.99]).tolist()
        return {"p50": p50, "p99": p99}
