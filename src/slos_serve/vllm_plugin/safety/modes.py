"""For which classes plans are carried out: the operator's word, which may change while the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODES = ("observe", "enforce")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modes:
    """The mode of the engine and of the classes that differ from it; immutable, so that any thread may read it.

    Plans are carried out where at least one class enforces. A class that observes beside it is given no
    promises: its requests are served as best-effort work and graded all the same.
    """

    engine: str
    by_class: Mapping[str, str] = field(default_factory=dict)

    def of(self, slo_class: str) -> str:
        """Return the mode of one class."""
        return self.by_class.get(slo_class, self.engine)

    @property
    def is_steering(self) -> bool:
        """Tell whether some class asks for plans to be carried out."""
        return self.engine == "enforce" or "enforce" in self.by_class.values()

    def sets_aside(self, slo_class: str) -> bool:
        """Tell whether a class only observes while others are steered."""
        return bool(self.by_class) and self.of(slo_class) == "observe" and self.is_steering

    def changed(self, mode: str | None, slo_class: str | None = None) -> Modes:
        """Return the modes after an order; `ValueError` for an unknown mode.

        Without a class the order is about the whole engine, and what was said of classes is forgotten. With one,
        None means "as the engine".
        """
        if mode not in MODES and (slo_class is None or mode is not None):
            raise ValueError(f"mode = {mode!r}: expected one of {', '.join(MODES)}")
        if slo_class is None:
            return Modes(engine=str(mode))
        by_class = {name: kept for name, kept in self.by_class.items() if name != slo_class}
        return Modes(engine=self.engine, by_class=by_class if mode is None else {**by_class, slo_class: mode})

    def to_json(self) -> dict[str, Any]:
        """Return what snapshots and replies say."""
        return {"mode": self.engine, "class_modes": dict(self.by_class)}
