"""How many tokens each TPOT tier verifies per step: draft lengths from acceptance, slack and load.

Verifying s tokens (s - 1 drafts and the model's own) yields Acc(s) = (1 - a^s) / (1 - a) of them on
average, where a is the chance that a draft is accepted; s = 1 is autoregressive. A tier of that length
needs one batch per Acc(s) * TPOT seconds, so longer drafts allow longer batches, and cost s tokens each.

For every period that some tier and length would allow, each other tier takes the shortest length that
keeps up with it. The period whose prefill rate is highest wins: every draft token is priced as a token.
Expected, not guaranteed: accepted tokens come in bursts, so plans hold against cumulative deadlines.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, max_chunk_tokens

if TYPE_CHECKING:
    from slos_serve.core.batching import Machine
    from slos_serve.core.types import IntArray

# A length changes only when the new rate is better by this share.
SWITCH_GAIN = 0.02


@jit
def expected_tokens(acceptance, verify):  # type: ignore[no-untyped-def]
    """Return Acc(s), the expected output tokens of verifying `verify` tokens; 0 <= acceptance < 1."""
    if acceptance <= 0.0:
        return 1.0
    return (1.0 - acceptance**verify) / (1.0 - acceptance)


@jit
def prefill_rate(lines, margin, budget, period, verify, counts, context, step_offset):  # type: ignore[no-untyped-def]
    """Return the prefill tokens per second left when each group is served once per `period` seconds."""
    steps = 0.0
    load = 0.0
    requests = 1.0
    for g in range(counts.shape[0]):
        if counts[g] > 0.0:
            steps = max(steps, verify[g] + step_offset)
            load += counts[g] * verify[g]
            requests += counts[g]
    room = max_chunk_tokens(lines, period / margin, load, requests, context, steps, 0.0, 0.0)
    if room <= 0.0:
        # how far the tokens alone overrun, so that the least bad length still wins
        room = max_chunk_tokens(lines, period / margin, 0.0, requests, context, steps, 0.0, 0.0) - load
    return min(room, budget - load) / period


@jit
def _best_lengths(lines, margin, budget, tpot, acceptance, counts, context, max_verify, step_offset):  # type: ignore[no-untyped-def]
    groups = tpot.shape[0]
    best = np.ones(groups, np.int64)
    verify = np.ones(groups, np.int64)
    best_rate = -np.inf
    for leader in range(groups):
        if counts[leader] <= 0.0 or not math.isfinite(tpot[leader]):
            continue
        for s in range(1, max_verify + 1):
            period = expected_tokens(acceptance[leader], s) * tpot[leader]
            possible = True
            for g in range(groups):
                verify[g] = 1
                if counts[g] <= 0.0 or not math.isfinite(tpot[g]):
                    continue
                while expected_tokens(acceptance[g], verify[g]) * tpot[g] < period - 1e-12:
                    verify[g] += 1
                    if verify[g] > max_verify:
                        possible = False
                        break
                if not possible:
                    break
            if not possible:
                continue
            rate = prefill_rate(lines, margin, budget, period, verify, counts, context, step_offset)
            if rate - best_rate > 1e-9 * abs(rate):
                best_rate = rate
                best[:] = verify
    return best, best_rate


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
) -> IntArray:
    """Return the tokens to verify per step for each group of requests with one TPOT and acceptance.

    `counts`: live requests per group; `context_tokens`: what their decodes read per step. `current`
    lengths stay unless others raise the prefill rate by `SWITCH_GAIN`. `step_offset`: drafter steps of s
    verified tokens, less s. Shape (groups,).
    """
    args = (machine.lines, machine.margin_prefill, machine.token_budget)
    best, best_rate = _best_lengths(*args, tpot, acceptance, counts, context_tokens, max_verify, step_offset)
    verify: IntArray = best
    if current is not None and (current <= max_verify).all() and (current != best).any():
        gains = np.array([expected_tokens(float(a), int(s)) for a, s in zip(acceptance, current, strict=True)])
        period = float((gains * tpot)[counts > 0].min(initial=math.inf))
        if math.isfinite(period):
            rate = prefill_rate(*args, period, current, counts, context_tokens, step_offset)
            if rate >= 0 and best_rate < rate * (1 + SWITCH_GAIN):
                return current
    return verify
