"""What a request asks for, resolved against the operator's classes into what is promised, planned and graded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slos_serve.config import OVERRIDES, SloConfig
from slos_serve.core.slo.deadlines import StreamGrader
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from slos_serve.core.types import Slo
    from slos_serve.vllm_plugin.engine.live import Live

PREFIX = "slo_"
MAX_KNOWN = 256  # ways of asking, of which most servers see a few


class ReferenceUnknownError(LookupError):
    """A slowdown SLO was asked for before the reference profile is known."""


class Asked:
    """Resolve what live requests ask for. `reference` returns the unloaded prefill seconds of a prompt, once known."""

    def __init__(self, config: SloConfig, live: Mapping[str, Live], sets_aside: Callable[[str], bool]) -> None:
        self.config = config
        self.reference: Callable[[int], float] | None = None
        self.thinking_end: frozenset[int] = frozenset()
        self.num_invalid = 0
        self._live = live
        self._sets_aside = sets_aside
        self._known: dict[Any, tuple[Slo, float, bool, str]] = {}
        self._num_references = 0

    def resolve(self, live: Live) -> None:
        """Turn what was asked into promises; what makes no sense is best-effort, reason `invalid`."""
        args = live.args
        name = args.get("slo_class")
        overrides = {key: args[PREFIX + key] for key in (*OVERRIDES, "stage") if PREFIX + key in args}
        live.is_resolved = True
        try:
            slo, weight, thinks, label = self._resolved(name, overrides, live.request.num_prompt_tokens)
        except ReferenceUnknownError:
            live.is_resolved = False
            live.reason = "observe"
            live.slo_class = str(name or self.config.label(None, overrides))
            return
        except (ValueError, TypeError, KeyError, ArithmeticError):
            live.reason = "invalid"
            self.num_invalid += 1
            return
        live.slo, live.weight, live.thinks, live.slo_class = slo, weight, thinks, label
        live.is_over_share = not slo.is_empty and self._is_over_share(live)
        live.is_set_aside = self.is_aside(live)
        live.is_thinking = (
            thinks and bool(self.thinking_end) and not view.ends_thinking(live.request, self.thinking_end)
        )
        live.reason = "" if live.has_slo else "requested"
        if live.has_slo:
            live.grader = StreamGrader(live.arrival_s, slo, live.is_thinking)

    def _resolved(self, name: Any, overrides: Mapping[str, Any], prompt_tokens: int) -> tuple[Slo, float, bool, str]:
        """Return promises, weight, whether it thinks, and the label; what depends on no prompt is remembered."""
        key = (name, *((one, type(value), value) for one, value in overrides.items()))
        known = self._known.get(key)
        if known is not None:
            return known
        self._num_references = 0
        # asked first, so that a nonsensical value is never taken for one that waits for the profile
        resolved = self.config.resolve(name, overrides, prompt_tokens, self._reference)
        known = (*resolved, self.config.label(name, overrides))
        if not self._num_references and len(self._known) < MAX_KNOWN:
            self._known[key] = known
        return known

    def is_aside(self, live: Live) -> bool:
        """Tell whether a request is planned as best-effort work whatever it asks for."""
        return live.is_over_share or self._sets_aside(live.slo_class) or view.has_encoder_inputs(live.request)

    def _is_over_share(self, live: Live) -> bool:
        """Tell whether its tenant holds, or asks for, as many promises as the operator allows."""
        most = self.config.max_promises_per_tenant
        if most is None:
            return False
        others = (one for one in self._live.values() if one is not live and one.tenant == live.tenant)
        return sum(not one.planned_slo.is_empty and not one.missed for one in others) >= most

    def _reference(self, prompt_tokens: int) -> float:
        self._num_references += 1
        if self.reference is None:
            raise ReferenceUnknownError
        return self.reference(prompt_tokens)
