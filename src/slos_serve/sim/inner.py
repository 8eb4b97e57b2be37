"""The two inner loops of a simulated step, compiled: what most batches need when they start and end.

Both work on columns of the request table by row. They decide nothing: a batch that does not simply fit
(new requests, too little memory, too many tokens) is left to the engine, which cuts it by vLLM's rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slos_serve.core.deadlines import CHECK_EVERY
from slos_serve.core.jit import jit
from slos_serve.core.types import Status

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RUNNING = int(Status.RUNNING)
START, TOKENS, DRAFTS, EMITS, IS_DECODE, BEFORE = range(6)  # rows of what `start_rows` returns
SUM_TOKENS, SUM_CONTEXT, MOST_DRAFTS, NUM_PREFILL, SUM_PAIRS, SUM_BLOCKS = range(6)  # of its totals
FINISHED, LOOKED_AT, OUTRUN = 1, 2, 4  # flags of what `emit_rows` returns


@jit
def start_rows(
    chosen: IntArray,
    asked_tokens: IntArray,
    asked_drafts: IntArray,
    status: Array,
    prompt: Array,
    outputs: Array,
    computed: Array,
    cached: Array,
    blocks: Array,
    limits: IntArray,
) -> tuple[bool, IntArray, FloatArray]:
    """Start a batch where all of it runs already and fits; return whether it did, the batch, and its totals.

    `limits`: block size, longest sequence, token budget, free blocks. Where it does not fit, nothing has
    changed and the rest of the answer means nothing.
    """
    count = len(chosen)
    batch = np.empty((6, count), np.int64)
    totals = np.zeros(6)
    extra = np.empty(count, np.int64)
    for i in range(count):
        row = chosen[i]
        if status[row] != RUNNING:
            return False, batch, totals
        start = computed[row] if computed[row] > 0 else cached[row]
        needed = prompt[row] + outputs[row] - start
        tokens = min(asked_tokens[i], needed)
        drafts = 0
        if needed == 1 and outputs[row] > 0:
            drafts = min(asked_drafts[i], max(limits[1] - prompt[row] - outputs[row] - 1, 0))
        if tokens <= 0:
            return False, batch, totals
        extra[i] = max((start + tokens + drafts + limits[0] - 1) // limits[0] - blocks[row], 0)
        batch[START, i], batch[TOKENS, i], batch[DRAFTS, i] = start, tokens, drafts
        batch[EMITS, i], batch[IS_DECODE, i], batch[BEFORE, i] = tokens == needed, needed == 1, outputs[row]
        totals[SUM_TOKENS] += tokens + drafts
        totals[MOST_DRAFTS] = max(totals[MOST_DRAFTS], float(drafts))
        totals[SUM_BLOCKS] += extra[i]
        if needed == 1:
            totals[SUM_CONTEXT] += start
        else:
            totals[NUM_PREFILL] += 1
            totals[SUM_PAIRS] += tokens * (start + 0.5 * tokens)
    if totals[SUM_TOKENS] > limits[2] or totals[SUM_BLOCKS] > limits[3]:
        return False, batch, totals
    for i in range(count):
        row = chosen[i]
        blocks[row] += extra[i]
        computed[row] = batch[START, i] + batch[TOKENS, i]
        outputs[row] += batch[EMITS, i]
    return True, batch, totals


@jit
def emit_rows(
    emitting: IntArray,
    before: IntArray,
    new: IntArray,
    truth: IntArray,
    outputs: Array,
    computed: Array,
    first_s: Array,
    last_s: Array,
    thinking: Array,
    is_thinking: Array,
    predicted: Array,
    max_gap_s: Array,
    now_s: float,
    thinks: bool,
) -> IntArray:
    """Let tokens out; return each row's output tokens and flags, shape (2, n). `truth`: output and thinking tokens."""
    count = len(emitting)
    answer = np.empty((2, count), np.int64)
    for i in range(count):
        row = emitting[i]
        after = min(before[i] + new[i], truth[row, 0])
        outputs[row] = after
        computed[row] += after - before[i] - 1
        last_s[row] = now_s
        if before[i] == 0:
            first_s[row] = now_s
        if thinks:
            thinking[row] = min(after, truth[row, 1])
            is_thinking[row] = 1 if after < truth[row, 1] else 0
        flags = 0
        if after >= truth[row, 0]:
            flags = FINISHED | LOOKED_AT
        elif after >= predicted[row]:
            flags = OUTRUN
        if before[i] == 0 or after // CHECK_EVERY > before[i] // CHECK_EVERY or max_gap_s[row] < np.inf:
            flags |= LOOKED_AT
        answer[0, i], answer[1, i] = after, flags
    return answer
