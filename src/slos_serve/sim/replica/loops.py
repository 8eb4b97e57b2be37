"""The inner loops of a simulated step, compiled: how batches start, what comes out of them, how it is graded.

All work on the request table and on `LIVE_DTYPE`, one record for each of its rows: the truth that no planner
sees, and the fields of the request's grader (`core.slo.deadlines`).

They decide nothing. A batch that does not simply fit (new requests, too little memory, too many tokens) is
left to the engine, which cuts it by vLLM's rules. Where a plan repeats, `foresee` works out when each of its
steps ends and `repeat` lets all their tokens out at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit
from slos_serve.core.perf import batch_seconds
from slos_serve.core.planning.columns import predicted_until
from slos_serve.core.slo.deadlines import GRADER, feed_stream
from slos_serve.core.types import Status

Rows = npt.NDArray[np.void]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

TRUTH = (("true_output_tokens", np.int64), ("true_thinking_tokens", np.int64))
LIVE_DTYPE = np.dtype((np.record, [*GRADER, *TRUTH]))  # a row's fields are attributes, as the grader's are

RUNNING = int(Status.RUNNING)
START, TOKENS, DRAFTS, EMITS, IS_DECODE, BEFORE = range(6)  # rows of a batch, one column for each request
SUM_TOKENS, SUM_CONTEXT, MOST_DRAFTS, SUM_PAIRS, NUM_PREFILL, NUM_NEW, SUM_BLOCKS = range(7)  # of its totals
BLOCK_SIZE, MAX_MODEL_LEN, BUDGET, SEATS, FREE_BLOCKS = range(5)  # what the engine has room for
FINISHED, OUTRUN = 1, 2  # what became of a request that emitted


@jit
def start_rows(
    chosen: IntArray, asked_tokens: IntArray, asked_drafts: IntArray, rows: Rows, room: IntArray
) -> tuple[bool, IntArray, FloatArray]:
    """Start a batch where all of it fits; return whether it did, the batch, and its totals.

    Where it does not fit, nothing has changed and the rest of the answer means nothing.
    """
    count, block_size = len(chosen), room[BLOCK_SIZE]
    batch, totals = np.empty((6, count), np.int64), np.zeros(7)
    extra = np.empty(count, np.int64)
    num_tokens = num_blocks = num_new = 0
    for i in range(count):
        row = chosen[i]
        if row < 0:
            return False, batch, totals
        prompt, outputs = rows["num_prompt_tokens"][row], rows["num_output_tokens"][row]
        computed = rows["num_computed_tokens"][row]
        start = computed if computed > 0 else rows["num_cached_tokens"][row]
        needed = prompt + outputs - start
        tokens = min(asked_tokens[i], needed)
        drafts = 0
        if needed == 1 and outputs > 0:
            drafts = min(asked_drafts[i], max(room[MAX_MODEL_LEN] - prompt - outputs - 1, 0))
        if tokens <= 0:
            return False, batch, totals
        extra[i] = max((start + tokens + drafts + block_size - 1) // block_size - rows["num_kv_blocks"][row], 0)
        batch[START, i], batch[TOKENS, i], batch[DRAFTS, i] = start, tokens, drafts
        batch[EMITS, i], batch[IS_DECODE, i], batch[BEFORE, i] = tokens == needed, needed == 1, outputs
        num_tokens += tokens + drafts
        num_blocks += extra[i]
        num_new += rows["status"][row] != RUNNING
    if num_tokens > room[BUDGET] or num_blocks > room[FREE_BLOCKS]:
        return False, batch, totals
    if num_new:
        seats = room[SEATS] - num_new
        for row in range(len(rows)):
            seats -= rows["status"][row] == RUNNING
        if seats < 0:
            return False, batch, totals
    for i in range(count):
        row = chosen[i]
        rows["status"][row] = RUNNING
        rows["num_kv_blocks"][row] += extra[i]
        rows["num_computed_tokens"][row] = batch[START, i] + batch[TOKENS, i]
        rows["num_output_tokens"][row] += batch[EMITS, i]
    totals = add_up(batch)
    totals[NUM_NEW], totals[SUM_BLOCKS] = num_new, num_blocks
    return True, batch, totals


@jit
def add_up(batch: IntArray) -> FloatArray:
    """Return the totals of a batch that it tells by itself: the terms of the performance model."""
    totals = np.zeros(7)
    for i in range(batch.shape[1]):
        start, tokens, drafts = batch[START, i], batch[TOKENS, i], batch[DRAFTS, i]
        totals[SUM_TOKENS] += tokens + drafts
        totals[MOST_DRAFTS] = max(totals[MOST_DRAFTS], float(drafts))
        if batch[IS_DECODE, i]:
            totals[SUM_CONTEXT] += start
        else:
            totals[NUM_PREFILL] += 1
            totals[SUM_PAIRS] += tokens * (start + 0.5 * tokens)
    return totals


@jit
def emit_rows(chosen: IntArray, batch: IntArray, accepted: IntArray, rows: Rows, live: Rows, now_s: float) -> IntArray:
    """Let a batch's tokens out at `now_s` and grade them; return `FINISHED`, `OUTRUN` or 0 for each of its rows.

    `accepted`: draft tokens accepted, by column of the batch.
    """
    flags = np.zeros(len(chosen), np.int64)
    for i in range(len(chosen)):
        if batch[EMITS, i]:
            before = batch[BEFORE, i]
            flags[i] = _put_out(rows, live, chosen[i], before, before + 1 + accepted[i], now_s)
    return flags


@jit
def foresee(
    chosen: IntArray, rows: Rows, live: Rows, lines: FloatArray, room: IntArray, now_s: float
) -> tuple[FloatArray, FloatArray]:
    """Return ends and durations in seconds of the steps of a batch of decodes, until the first request ends.

    Steps whose KV blocks are not free are left out.
    """
    count, context, most = len(chosen), 0, 1 << 40
    for i in range(count):
        row = chosen[i]
        context += rows["num_computed_tokens"][row]
        most = min(most, live["true_output_tokens"][row] - rows["num_output_tokens"][row])
    if _growth(chosen, rows, most, room[BLOCK_SIZE]) > room[FREE_BLOCKS]:
        fits = 0
        while most - fits > 1:
            middle = (fits + most) // 2
            if _growth(chosen, rows, middle, room[BLOCK_SIZE]) > room[FREE_BLOCKS]:
                most = middle
            else:
                fits = middle
        most = fits
    ends, seconds = np.empty(most), np.empty(most)
    at_s = now_s
    for k in range(most):
        seconds[k] = batch_seconds(lines, float(count), float(count), float(context), 0.0, 0.0)
        at_s += seconds[k]
        ends[k] = at_s
        context += count
    return ends, seconds


@jit
def repeat(chosen: IntArray, rows: Rows, live: Rows, block_size: int, ends: FloatArray) -> tuple[int, IntArray]:
    """Run a batch of decodes to each of `ends`; return the KV blocks it took, and flags as `emit_rows` does."""
    steps = len(ends)
    num_blocks = _growth(chosen, rows, steps, block_size)
    flags = np.zeros(len(chosen), np.int64)
    for i in range(len(chosen)):
        row = chosen[i]
        before, computed = rows["num_output_tokens"][row], rows["num_computed_tokens"][row]
        rows["num_kv_blocks"][row] = max(-(-(computed + steps) // block_size), rows["num_kv_blocks"][row])
        rows["num_computed_tokens"][row] = computed + steps
        for k in range(steps):
            flags[i] |= _put_out(rows, live, row, before + k, before + k + 1, ends[k])
    return num_blocks, flags


@jit
def _growth(chosen: IntArray, rows: Rows, steps: int, block_size: int) -> int:
    """Return the KV blocks that so many decode steps of a batch take."""
    total = 0
    for i in range(len(chosen)):
        row = chosen[i]
        after = rows["num_computed_tokens"][row] + steps
        total += max(-(-after // block_size) - rows["num_kv_blocks"][row], 0)
    return total


@jit
def _put_out(rows: Rows, live: Rows, row: int, before: int, wanted: int, now_s: float) -> int:
    """Let out the tokens of one request that follow the first `before`, up to `wanted`; return its flag."""
    true_output, true_thinking = live["true_output_tokens"][row], live["true_thinking_tokens"][row]
    after = min(wanted, true_output)
    rows["num_output_tokens"][row] = after
    rows["num_computed_tokens"][row] += after - before - 1
    rows["last_token_s"][row] = now_s
    if before == 0:
        rows["first_token_s"][row] = now_s
    thinking = min(after, true_thinking)
    rows["num_thinking_tokens"][row] = thinking
    rows["is_thinking"][row] = after < true_thinking
    had_missed = live["missed"][row]
    feed_stream(live[row], now_s, after - before, thinking - min(before, true_thinking))
    if live["missed"][row] and not had_missed:  # once: a host may plan on for what has missed
        rows["missed"][row] = 1
    if after >= true_output:
        return FINISHED
    return OUTRUN if after >= predicted_until(rows, row) else 0
