"""What an engine has done since the last look, written into the request table in one compiled pass.

Only requests that run, or have run and were preempted, can have moved: one that still waits for its first step is as it
came. So the cost of a look follows the seats of an engine and not the length of its queue.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.types import Status

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Rows

RUNNING, WAITING = int(Status.RUNNING), int(Status.WAITING)

# rows of what an engine says of each request that may have moved
IS_RUNNING, COMPUTED, PRODUCED, EXPECTED = range(4)
NUM_SEEN = 4


@jit
def move_rows(
    rows: Rows,
    index: IntArray,
    seen: IntArray,
    ends: IntArray,
    left: IntArray,
    block_size: int,
    last_s: float,
    ends_s: float,
    told_s: float,
) -> IntArray:
    """Write what an engine says of the rows at `index`; return the rows whose output has reached its predicted length.

    `seen`, shape (`NUM_SEEN`, len(index)): whether it runs, tokens computed, output tokens that are out, and output
    tokens that the batches in flight may bring (0 under synchronous scheduling). What is in flight counts as out at
    `ends_s`, when it is expected to end; at the last look that was `told_s`, and the newest output came at `last_s`. By
    row of the table, as `rows`: `ends`, prompt and output tokens at the request's limit, and `left`, written here:
    tokens that the engine will still schedule. Whose last tokens are in flight is asked for no more, whatever its class
    may have.
    """
    outgrown = np.empty(len(index), np.int64)
    count = 0
    for k in range(len(index)):
        i, computed, expected = index[k], seen[COMPUTED, k], seen[EXPECTED, k]
        known = rows["num_prompt_tokens"][i] + seen[PRODUCED, k]
        left[i] = ends[i] - max(computed, known - 1) + max(expected, 1) - 2
        produced = seen[PRODUCED, k] + expected
        if produced > rows["num_output_tokens"][i] or rows["last_token_s"][i] == told_s:
            rows["last_token_s"][i] = last_s  # what came since the last look, or was foretold there, came last
        if expected > 0:
            rows["last_token_s"][i] = ends_s
            if not math.isfinite(rows["first_token_s"][i]):
                rows["first_token_s"][i] = ends_s  # the true time is written when it comes
            if left[i] <= 0:
                rows["max_output_tokens"][i] = produced
        rows["status"][i] = RUNNING if seen[IS_RUNNING, k] else WAITING
        rows["num_computed_tokens"][i] = computed
        rows["num_output_tokens"][i] = produced
        rows["num_kv_blocks"][i] = -(-computed // block_size)
        holds = min(rows["predicted_output_tokens"][i], rows["drawn_output_tokens"][i])
        if holds <= produced < rows["max_output_tokens"][i]:
            outgrown[count] = i
            count += 1
    return outgrown[:count]
