"""How many tokens each TPOT tier verifies per step: draft lengths from acceptance, slack and load.

Verifying s tokens (s - 1 drafts and the model's own) yields Acc(s) = (1 - a^s) / (1 - a) of them on
average, where a is the chance that a draft is accepted; s = 1 is autoregressive. A tier of that length
needs one batch per Acc(s) * TPOT seconds, so longer drafts allow longer batches, and cost s tokens each.

For every period that some tier and length would allow, each other tier takes the shortest length that
keeps up with it. The period whose prefill rate is highest wins: every draft token is priced as a token.
Expected, not guaranteed: accepted tokens come in bursts, so plans hold against cumulative deadlines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.perf import FloatArray, batch_seconds

if TYPE_CHECKING:
    from slos_serve.core.batching import Capacity, Demand
    from slos_serve.core.types import IntArray

# A length changes only when the new rate is better by this share.
SWITCH_GAIN = 0.02


def expected_tokens(acceptance: float, verify: int) -> float:
    """Return Acc(s), the expected output tokens of verifying `verify` tokens; `ValueError` outside [0, 1)."""
    if not 0 <= acceptance < 1 or verify < 1:
        raise ValueError(f"acceptance = {acceptance!r}, verify = {verify!r}: expected 0 <= a < 1 and s >= 1")
    return float((1 - acceptance**verify) / (1 - acceptance)) if acceptance else 1.0


def prefill_rate(lines: FloatArray, margin: float, budget: int, period_s: float, verify: IntArray, counts: FloatArray) -> float:
    """Return the prefill tokens per second left when each group is served once per period of `period_s`."""
    steps = float(verify[counts > 0].max(initial=1))
    load = float((counts * verify).sum())
    low, high = 0.0, float(budget)
    if batch_seconds(lines, 0.0, 1.0, 0.0, steps, 0.0) * margin > period_s:
        return -np.inf
    for _ in range(40):
        middle = 0.5 * (low + high)
        fits = batch_seconds(lines, middle, float(counts.sum()) + 1.0, 0.0, steps, 0.0) * margin <= period_s
        low, high = (middle, high) if fits else (low, middle)
    return (low - load) / period_s


def lengths(
    tpot: FloatArray,
    acceptance: FloatArray,
    counts: FloatArray,
    capacity: Capacity,
    max_verify: int,
    current: IntArray | None = None,
) -> IntArray:
    """Return the tokens to verify per step for each group of requests with one TPOT and acceptance.

    `current` lengths stay unless others raise the prefill rate by `SWITCH_GAIN`. Shape (groups,).
    """
    present = np.flatnonzero((counts > 0) & np.isfinite(tpot))
    best = np.ones(len(tpot), np.int64)
    if max_verify <= 1 or not present.size:
        return best
    table = np.array([[expected_tokens(float(a), s) for s in range(1, max_verify + 1)] for a in acceptance])
    best_rate = -np.inf
    for leader in present.tolist():
        for s in range(1, max_verify + 1):
            period = float(table[leader, s - 1] * tpot[leader])
            keeps_up = table * tpot[:, None] >= period - 1e-12
            if not keeps_up[present].any(axis=1).all():
                continue
            verify = np.where(counts > 0, keeps_up.argmax(axis=1) + 1, 1)
            rate = prefill_rate(capacity.lines, capacity.margin_prefill, capacity.token_budget, period, verify, counts)
            if rate > best_rate * (1 + 1e-9):
                best, best_rate = verify, rate
    if current is not None and (current[present] <= max_verify).all():
        period = float((np.take_along_axis(table, current[:, None] - 1, 1)[:, 0] * tpot)[present].min())
        rate = prefill_rate(capacity.lines, capacity.margin_prefill, capacity.token_budget, period, current, counts)
        if rate >= 0 and best_rate < rate * (1 + SWITCH_GAIN):
            return current
    return best


def with_lengths(demand: Demand, capacity: Capacity, acceptance: float, max_verify: int) -> Demand:
    """Return the demand with `verify` and `gain` of every request set for one common acceptance rate."""
    tiers, group = np.unique(demand.tpot, return_inverse=True)
    weight = np.where(demand.required == 1, 1.0, 0.5)
    counts = np.bincount(group, weights=weight, minlength=len(tiers))
    verify = lengths(tiers, np.full(len(tiers), acceptance), counts, capacity, max_verify)
    gain = np.array([expected_tokens(acceptance, int(s)) for s in verify])
    return replace(demand, verify=verify[group].astype(np.float64), gain=gain[group])
