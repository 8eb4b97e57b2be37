"""Whether plans are carried out now, and what forbids it where they are not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.pauses import Pauses

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.learning.learner import Learner
    from slos_serve.vllm_plugin.safety.rules import StepDown
    from slos_serve.vllm_plugin.settings import Settings

logger = logging.getLogger("vllm.slos_serve")


class Standing:
    """The operator's `modes`, and what else decides: `differences` to the vLLM that can be steered, one sentence each.

    `may_enforce` tells whether the operator may switch to enforcing. `modes` is replaced, never changed, so that a
    step sees one of them.
    """

    def __init__(
        self, scheduler: Any, settings: Settings, learner: Learner, safety: StepDown, *, is_given: bool, is_async: bool
    ) -> None:
        self._config = settings.config
        self._learner = learner
        self._safety = safety
        self.pauses = Pauses()
        self.modes = settings.resolved_modes(given=is_given, is_cpu=view.is_cpu())
        self.may_enforce = settings.may_enforce or self.modes.is_steering or view.is_cpu()
        self.differences = view.probe()
        if not self.differences:
            self.differences = [f"{name} cannot be steered" for name in view.unsupported(scheduler)]
        self.differences += view.mismatch(scheduler, is_async=is_async)
        self._device = view.emulated_device()

    @property
    def is_enforcing(self) -> bool:
        """Tell whether plans are carried out now."""
        return self.modes.is_steering and not self.mode_reason

    @property
    def effective_mode(self) -> str:
        """`enforce` or `observe`, whatever was asked for."""
        return "enforce" if self.is_enforcing else "observe"

    @property
    def mode_reason(self) -> str:
        """Why plans are not carried out; "" where they are or nobody asked."""
        if not self.modes.is_steering:
            return ""
        if self.differences:
            return "unsupported: " + self.differences[0]
        if self.pauses.kind:
            return "paused by the operator"
        if not self._learner.has_model:
            return "no performance profile yet"
        return self._safety.reason

    def sets_aside(self, slo_class: str) -> bool:
        """Tell whether a class only observes while others are steered."""
        return self.modes.sets_aside(slo_class)

    def order(self, mode: str | None, slo_class: str | None = None) -> None:
        """Change the mode of the engine, or of one class, from the next step on.

        Promises that were given are still planned for while plans are carried out. Safe on any thread;
        `ValueError` for an unknown mode or class, and for `enforce` on an engine that nobody has verified.
        """
        if mode == "enforce" and not self.may_enforce:
            expected = "observe, until slos-serve verify has passed for this engine and these flags"
            raise ValueError(f"mode = {mode!r}: expected {expected}")
        if slo_class is not None:
            self._config.check_promising(slo_class)
        self.modes = self.modes.changed(mode, slo_class)
        logger.warning("SLO scheduler: mode %s, effective %s", self.modes.to_json(), self.effective_mode)

    def facts(self) -> dict[str, Any]:
        """Return what may change while no step runs, for snapshots and replies; safe on any thread."""
        return {
            **self.modes.to_json(),
            "effective_mode": self.effective_mode,
            "reason": self.mode_reason,
            "paused": self.pauses.kind,
            "profile": self._learner.summary,
            **({} if self._device is None else {"device": self._device}),
        }
