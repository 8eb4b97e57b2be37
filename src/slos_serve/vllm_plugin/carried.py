"""A plan that is carried out again, step after step, until something changes: a check instead of a plan.

A plan that ends prompts goes on with their decodes. It is made anew when a request comes, ends (where others wait) or
changes its kind, when vLLM did not do what was planned, when a step starts later than foretold or blocks are short, and
when what was foretold is over (`core.planning.steady`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from slos_serve.core.planning.steady import Foretold
    from slos_serve.vllm_plugin.engine.steer import Steering


@dataclass(slots=True)
class Carried:
    """What a plan foretold; `steering` carries it out, None where plans only are made. `version`: the tracker's."""

    foretold: Foretold
    steering: Steering | None
    version: int
    modes: object
    lasts: list[tuple[int, str]]  # for how many steps vLLM will still schedule whom, the longest first
    num_steps: int = 1  # that have run, the planned one included

    def goes_on(self, version: int, modes: object, starts_s: float, num_free: int) -> bool:
        """Tell whether one more step of the plan may start at `starts_s`, and count it."""
        k = self.num_steps
        self.num_steps += 1
        told = self.foretold
        is_good = (
            version == self.version
            and modes is self.modes
            and k < len(told.starts_s)
            and starts_s <= told.starts_s[k]
            and num_free >= told.blocks[k]
        )
        if is_good and self.steering is not None and self.lasts and self.lasts[-1][0] <= k:
            return self._let_go(k, self.steering)
        return is_good

    def _let_go(self, k: int, steering: Steering) -> bool:
        """Leave out whose last token is in flight at step `k`; tell whether anybody is left."""
        while self.lasts and self.lasts[-1][0] <= k:
            steering.leave_out([self.lasts.pop()[1]])
        return bool(steering.expected)

    def leave_out(self, request_ids: Iterable[str], version: int) -> bool:
        """Go on without requests that have ended; tell whether that is possible: where others wait they come in now."""
        if not self.foretold.is_alone or version != self.version:
            return False
        if self.steering is not None:
            self.steering.leave_out(request_ids)
        return True
