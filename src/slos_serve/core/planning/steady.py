"""How long a plan goes on as it is: while promised requests decode together and nobody comes or leaves.

Most steps of a replica are such steps. For a simulator that knows when each of them ends, `count_steps` looks ahead:
it moves a copy of the request table from step to step and asks, with the planner's own loops, whether the plan for
the next one would be the same again. So what is run at once is what would have been planned step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.planning.batching import compose
from slos_serve.core.planning.columns import IS_LIVE, derive, foretold, growth_of, pick
from slos_serve.core.planning.demand import KEPT, NUM_TOTALS, Machine
from slos_serve.core.planning.trial import run
from slos_serve.core.slo.due import row_due

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.planning.columns import Columns
    from slos_serve.core.types import IntArray


def count_steps(columns: Columns, order: IntArray, ends_s: FloatArray, max_work: int) -> int:
    """Return how many of the steps that end at `ends_s` run a plan of one token for each row, in this `order`.

    The first one does, because that has been planned. Every row must hold a promise and decode without drafts.
    """
    state, machine = columns.state, columns.machine
    limits = state.limits
    if (columns.rows["is_thinking"] != 0).any():  # when that ends is not known ahead
        return 1
    return int(
        _count(
            columns.rows.copy(), order, ends_s, limits.guard_s, columns.fixed_s, limits.block_size,
            state.num_free_kv_blocks, machine, max_work,
        )
    )  # fmt: skip


@jit
def _count(rows, order, ends_s, guard_s, fixed_s, block_size, free, machine, max_work):  # type: ignore[no-untyped-def]
    """Do what `count_steps` says, on a copy of the rows, which is changed."""
    for k in range(len(ends_s) - 1):
        for i in range(len(rows)):
            # what is late may be graded as missed, and what outruns its predicted length is predicted again
            outputs = rows["num_output_tokens"][i] + 1
            if row_due(rows, i, fixed_s) - guard_s < ends_s[k] or outputs >= foretold(rows, i):
                return k + 1
            computed = rows["num_computed_tokens"][i] + 1
            blocks = max(-(-computed // block_size), rows["num_kv_blocks"][i])
            free -= blocks - rows["num_kv_blocks"][i]
            rows["num_kv_blocks"][i] = blocks
            rows["num_computed_tokens"][i] = computed
            rows["num_output_tokens"][i] = outputs
            rows["last_token_s"][i] = ends_s[k]
        if not _is_same(rows, order, ends_s[k], guard_s, fixed_s, block_size, free, machine, max_work):
            return k + 1
    return len(ends_s)


@jit
def _is_same(rows, order, now_s, guard_s, fixed_s, block_size, free, machine, max_work):  # type: ignore[no-untyped-def]
    """Tell whether the plan at `now_s` is one token for each row."""
    table, flags, granted, _ = derive(rows, now_s, guard_s, fixed_s, block_size, machine.lines, machine.margin_decode)
    if not flags[IS_LIVE].all() or growth_of(table, order, machine.block_size).sum() > free:
        return False
    demand = pick(table, order, granted)
    now = Machine(
        machine.lines, machine.margin_prefill, machine.margin_decode, machine.token_budget, machine.max_seqs,
        machine.block_size, float(free), machine.max_batch_s, machine.phase_is_gain,
    )  # fmt: skip
    count = len(order)
    none, no_log = np.zeros(0), np.zeros((0, count))
    outcome, _, _, _ = run(
        now, demand.copy(), True, 0.0, -np.inf, max_work, none, -np.inf, np.empty(count), no_log, none
    )
    if outcome != KEPT:
        return False
    tokens, totals = np.zeros(count), np.zeros(NUM_TOTALS)
    compose(now, demand, np.arange(count), np.empty(0, np.int64), now.free_blocks, True, 0.0, tokens, totals)
    return bool((tokens == 1.0).all())
