"""Tokens and KV blocks, and how many blocks a set of requests will hold at once.

A request takes the blocks of its prompt when its first chunk starts, grows with its output up to the
predicted length, and gives everything back when it ends. Lengths are predictions (quantiles).
"""

from __future__ import annotations

import math

from slos_serve.core.jit import jit


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Return how many KV blocks hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


@jit
def peak_blocks(begin, blocks, output_left, pace, block_size):  # type: ignore[no-untyped-def]
    """Return the most blocks held at once.

    Request i takes `blocks[i]` at `begin[i]`, grows by a token every `pace[i]` seconds and releases
    all after `output_left[i]` tokens. Usage only falls when a request ends, so the peak is just before
    an end; with n requests this looks at n moments.
    """
    n = begin.shape[0]
    peak = 0.0
    for k in range(n):
        moment = begin[k] + output_left[k] * pace[k]
        used = 0.0
        for i in range(n):
            if not math.isfinite(moment):
                used += blocks[i] if not math.isfinite(output_left[i] * pace[i]) else 0.0
            elif begin[i] <= moment and moment <= begin[i] + output_left[i] * pace[i]:
                used += blocks[i] + (moment - begin[i]) / (pace[i] * block_size)
        peak = max(peak, used)
    return peak
