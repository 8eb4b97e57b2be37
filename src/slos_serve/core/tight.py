"""Whether an SLO asks for more than an engine can do at all, where no retry helps, or for more than it can do now."""

from __future__ import annotations

from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Slo


def is_too_tight(
    slo: Slo,
    model: PerfModel,
    *,
    prompt_tokens: int,
    output_tokens: float,
    budget: int,
    cached_tokens: int = 0,
    tokens_per_step: int = 1,
    guard_s: float = 0.0,
) -> bool:
    """Tell whether a request alone on an idle engine would be late by the expected times of its steps.

    `budget`: the tokens of one batch. `output_tokens`: how many it is expected to produce. `tokens_per_step`: 1 and
    the drafts that can be verified. `guard_s`: from the end of a step to the client.
    """
    first_s = model.prefill_seconds(prompt_tokens, budget, done=min(cached_tokens, prompt_tokens - 1)) + guard_s
    pace_s = model.seconds(1, 1, context_tokens=prompt_tokens) / tokens_per_step
    later = max(0.0, output_tokens - 1)
    if slo.max_gap_s is not None and later and model.seconds(1, 1, context_tokens=prompt_tokens) > slo.max_gap_s:
        return True
    if slo.e2e_s is not None and first_s + later * pace_s > slo.e2e_s:
        return True
    if slo.ttft_s is not None and first_s > slo.ttft_s:
        return True
    slowest_s = max((tpot for tpot in (slo.tpot_s, slo.thinking_tpot_s) if tpot is not None), default=None)
    if slowest_s is None or not later:
        return False
    # Tokens are due from the first one's deadline on, so a prompt that is early leaves time for the rest.
    spare_s = 0.0 if slo.ttft_s is None else slo.ttft_s - first_s
    return later * (pace_s - slowest_s) > spare_s
