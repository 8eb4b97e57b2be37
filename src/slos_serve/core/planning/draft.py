"""How many tokens each TPOT tier verifies per step: draft lengths from acceptance, slack and load.

Verifying s tokens (s - 1 drafts and the model's own) yields Acc(s) = (1 - a^s) / (1 - a) of them on
average, where a is the chance that a draft is accepted, each alike (Leviathan et al., arXiv 2211.17192,
equation 1); s = 1 is autoregressive. A tier of that length
needs one batch per Acc(s) * TPOT seconds, so longer drafts allow longer batches, and cost s tokens each.

For every period that some tier and length would allow, each other tier takes the shortest length that
keeps up with it. While prompts wait, the period whose prefill rate is highest wins: every draft token is
priced as a token that prefills could have had. While none waits (or none that finds free memory), the one with the
most output tokens per second does, and every tier may also go as far as the leading one: what is ahead of schedule,
or has ended, makes room for prompts to come.
Expected, not guaranteed: accepted tokens come in bursts, so plans hold against cumulative deadlines.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds
from slos_serve.core.planning.demand import GAIN, TPOT, needed_s, prefill_rate

if TYPE_CHECKING:
    from slos_serve.core.planning.demand import Machine
    from slos_serve.core.types import IntArray

# Lengths change only where others are better by this share.
SWITCH_GAIN = 0.02
# Who is ahead of schedule is drafted for its TPOT all the same, but for so many times as often as it needs at most.
HASTE = 4.0


@jit
def expected_tokens(acceptance, verify):  # type: ignore[no-untyped-def]
    """Return Acc(s), the expected output tokens of verifying `verify` tokens; 0 <= acceptance < 1."""
    if acceptance <= 0.0:
        return 1.0
    return (1.0 - acceptance**verify) / (1.0 - acceptance)


@jit
def _gain_table(acceptance, max_verify):  # type: ignore[no-untyped-def]
    """Return the expected output tokens of verifying 0 to `max_verify` tokens, shape (groups, max_verify + 1)."""
    gains = np.empty((acceptance.shape[0], max_verify + 1))
    for g in range(acceptance.shape[0]):
        for s in range(max_verify + 1):
            gains[g, s] = expected_tokens(acceptance[g], s)
    return gains


@jit
def _score(lines, margin, budget, period, verify, gains, counts, context, step_offset, waiting):  # type: ignore[no-untyped-def]
    """Return the prefill tokens per second left when each group is served once per `period` seconds.

    Where none are `waiting`: the output tokens per second of batches of all, back to back. Negative where
    the decodes alone are too much for the period.
    """
    steps = 0.0
    load = 0.0
    requests = 0.0
    gain = 0.0
    for g in range(counts.shape[0]):
        if counts[g] > 0.0:
            steps = max(steps, verify[g] + step_offset)
            load += counts[g] * verify[g]
            requests += counts[g]
            gain += counts[g] * gains[g, verify[g]]
    seconds = margin * batch_seconds(lines, load, requests, context, steps, 0.0)
    if waiting or seconds > period or load > budget:
        return prefill_rate(lines, margin, budget, period, load / period, requests / period, context / period, steps)
    return gain / seconds


@jit
def _best_lengths(lines, margin, budget, tpot, gains, counts, context, max_verify, step_offset, waiting):  # type: ignore[no-untyped-def]
    groups = tpot.shape[0]
    best = np.ones(groups, np.int64)
    verify = np.ones(groups, np.int64)
    best_score = -np.inf
    for leader in range(groups):
        if counts[leader] <= 0.0 or not math.isfinite(tpot[leader]):
            continue
        for s in range(1, max_verify + 1):
            period = gains[leader, s] * tpot[leader]
            possible = True
            for g in range(groups):
                verify[g] = 1
                if counts[g] <= 0.0 or not math.isfinite(tpot[g]):
                    continue
                while gains[g, verify[g]] * tpot[g] < period - 1e-12:
                    verify[g] += 1
                    if verify[g] > max_verify:
                        possible = False
                        break
                if not possible:
                    break
            if not possible:
                continue
            for together in range(1 if waiting else 2):
                if together:
                    for g in range(groups):
                        if counts[g] > 0.0 and math.isfinite(tpot[g]):
                            verify[g] = max(verify[g], s)
                score = _score(lines, margin, budget, period, verify, gains, counts, context, step_offset, waiting)
                if score - best_score > 1e-9 * abs(score):
                    best_score = score
                    best[:] = verify
    return best, best_score


@jit
def paces(demand, now):  # type: ignore[no-untyped-def]
    """Return the seconds per token that lengths are chosen for, shape (requests,)."""
    each = np.empty(demand.shape[1])
    for i in range(demand.shape[1]):
        gain = demand[GAIN, i]
        each[i] = max(gain * demand[TPOT, i], needed_s(demand, i, now) / HASTE)
    return each


def lengths(
    tpot: FloatArray,
    acceptance: FloatArray,
    counts: FloatArray,
    machine: Machine,
    max_verify: int,
    *,
    context_tokens: float = 0.0,
    current: IntArray | None = None,
    step_offset: float = -1.0,
    waiting: bool = True,
) -> IntArray:
    """Return the tokens to verify per step for each group of requests with one TPOT and acceptance.

    `counts`: live requests per group; `context_tokens`: what their decodes read per step. `current`
    lengths (0: unknown) stay unless others are better by `SWITCH_GAIN`. `step_offset`: drafter steps of s
    verified tokens, less s. `waiting`: prompts wait to be prefilled. Shape (groups,).
    """
    gains = _gain_table(acceptance, max_verify)
    args = (machine.lines, machine.margin_prefill, machine.token_budget)
    best, best_score = _best_lengths(*args, tpot, gains, counts, context_tokens, max_verify, step_offset, waiting)
    verify: IntArray = best
    if current is None or not ((current >= 1) & (current <= max_verify)).all() or (current == best).all():
        return verify
    period = float((gains[np.arange(len(tpot)), current] * tpot)[counts > 0].min(initial=math.inf))
    if math.isfinite(period):
        score = _score(*args, period, current, gains, counts, context_tokens, step_offset, waiting)
        if score >= 0 and best_score < score * (1 + SWITCH_GAIN):
            return current
    return verify
