"""How long a plan goes on as it is: while promised requests decode together and nobody comes or leaves.

Most steps of a replica are such steps. For a simulator that knows when each of them ends, `count_steps` looks ahead:
it moves a copy of the request table from step to step and asks, with the planner's own loops, whether the plan for
the next one would be the same again. So what is run at once is what would have been planned step by step.

An engine knows no ends ahead and has no time for that. `foretell` says for how many steps a plan stays good, and what
has to hold meanwhile, in one pass: where every step, margin included, is shorter than the tightest pace, each of them
leaves every promise at least the slack that was found enough when the plan was made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import batch_seconds
from slos_serve.core.planning.batching import compose
from slos_serve.core.planning.columns import IS_LIVE, derive, growth_of, pick, predicted_until
from slos_serve.core.planning.demand import KEPT, NUM_TOTALS, Machine
from slos_serve.core.planning.dry_run import run
from slos_serve.core.planning.step import OPEN_SHARE
from slos_serve.core.slo.next_due import row_due, row_pace
from slos_serve.core.types import Status, Tier

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.planning.columns import Columns
    from slos_serve.core.types import IntArray, Plan, ReplicaState, Rows

PENDING, PROMISED, BEST_EFFORT, RUNNING = (
    int(Tier.PENDING),
    int(Tier.PROMISED),
    int(Tier.BEST_EFFORT),
    int(Status.RUNNING),
)


class Foretold(NamedTuple):
    """The steps that a plan is good for, the planned one first: shape (num_steps,) each.

    `starts_s`: the latest time at which each of them may start. `blocks`: free KV blocks that each takes. From the
    second on each gives one token to each request of the batch.
    `is_alone`: nobody waits outside the batch, so that the plan stays good for the others when one of it ends.
    """

    starts_s: list[float]
    blocks: list[int]
    is_alone: bool

    def until(self, num_steps: int) -> Foretold:
        """Return the first steps alone."""
        return Foretold(self.starts_s[:num_steps], self.blocks[:num_steps], self.is_alone)


def foretell(state: ReplicaState, plan: Plan, most: int) -> Foretold | None:
    """Return for how many steps, `most` at the most, the plan of this state is good; None for the planned one only.

    Who of the batch ends meanwhile is left out by the host; where somebody waits outside, what is foretold ends there.
    The plan must bring each request of its batch to its next token: decodes by one token, prompts by all that is left
    of them; from then on all decode, one token in each step, nobody held. Outside of it may wait best-effort work only.
    That is served by the time of the second (see `step`): what is foretold ends where that changes.
    """
    batch, table = plan.batch, state.requests
    count = len(batch.request_ids)
    if not count or plan.at_risk or batch.preempted or state.limits.max_draft_length:
        return None
    second = math.floor(state.now_s)
    until_s = second + (OPEN_SHARE if state.now_s - second < OPEN_SHARE else 1.0)
    model, limits = state.perf_model, state.limits
    starts_s, blocks, is_alone = _foretell(
        table.rows, table.find(batch.request_ids), batch.num_tokens, state.now_s, until_s, limits.guard_s,
        model.planned(), model.margin_prefill, model.margin_decode, limits.block_size, state.num_free_kv_blocks, most,
    )  # fmt: skip
    return Foretold(starts_s.tolist(), blocks.tolist(), is_alone) if len(starts_s) > 1 else None


@jit
def _foretell(
    rows: Rows, index: IntArray, num_tokens: IntArray, now_s: float, until_s: float, guard_s: float, lines: FloatArray,
    margin_prefill: float, margin_decode: float, block_size: int, free: int, most: int,
) -> tuple[FloatArray, IntArray, bool]:  # fmt: skip
    """Do what `foretell` says, for the rows of a batch.

    A token that is due when the planned step ends, or later, is followed by others a pace apart; so where the planned
    step ends in time and each one after it is no longer than the tightest pace, none is late.
    """
    starts_s, blocks = np.empty(most), np.zeros(most, np.int64)
    none = starts_s[:0], blocks[:0], False
    count, tightest, soonest, longest = len(index), np.inf, np.inf, most
    tokens, read, pairs, context, num_prompts = 0.0, 0.0, 0.0, 0.0, 0
    fixed_s = max(batch_seconds(lines, 1.0, 1.0, 0.0, 0.0, 0.0), 1e-6)
    outside, has_others = np.ones(len(rows), np.bool_), False
    for k in range(count):
        i, chunk = index[k], num_tokens[k]
        outside[i] = False
        produced, computed = rows["num_output_tokens"][i], rows["num_computed_tokens"][i]
        start = rows["num_cached_tokens"][i] if computed == 0 else computed
        last = rows["num_prompt_tokens"][i] + produced - 1  # the place of the last token that the planned step computes
        if start + chunk != last + 1 or rows["tier"][i] == PENDING:
            return none
        if chunk == 1 and produced > 0 and computed > 0:
            read += computed
            blocks[0] += computed % block_size == 0
        else:
            num_prompts += 1
            pairs += chunk * (start + 0.5 * chunk)
            blocks[0] += max(-(-(last + 1) // block_size) - rows["num_kv_blocks"][i], 0)
        for step in range(block_size - last % block_size, most, block_size):
            blocks[step] += 1
        tokens += chunk
        context += last
        longest = min(longest, rows["max_output_tokens"][i] - produced)
        if rows["tier"][i] == BEST_EFFORT:
            has_others = True
        elif rows["missed"][i] == 0:
            pace = min(row_pace(rows, i, fixed_s), rows["max_gap_s"][i])
            if rows["is_thinking"][i] != 0:
                pace = min(pace, rows["tpot_s"][i])  # when thinking ends is not known ahead
            tightest = min(tightest, pace)
            soonest = min(soonest, row_due(rows, i, fixed_s) - guard_s)
    is_alone = True
    for i in range(len(rows)):
        if not outside[i] or rows["num_output_tokens"][i] >= rows["max_output_tokens"][i]:
            continue  # the last token of one outside is in flight
        if rows["tier"][i] != BEST_EFFORT or rows["status"][i] == RUNNING:
            return none
        is_alone, has_others = False, True
    if not is_alone:
        if num_prompts:
            return none  # where a prompt ends there may be room for a promise to who waits
        most = min(most, longest)
    margin = margin_prefill if num_prompts else margin_decode
    start_s = now_s
    for k in range(max(most, 0)):
        if k == 0:
            seconds = margin * batch_seconds(lines, tokens, float(count), read, 0.0, pairs)
        else:
            seconds = margin_decode * batch_seconds(lines, float(count), float(count), context + k * count, 0.0, 0.0)
        free -= blocks[k]
        starts_s[k] = start_s
        start_s += seconds
        if k == 0 and start_s > soonest:
            return none  # what is late or nearly so is looked at in every step
        # nearly without a block, who is to give way is decided in every step
        if free < count or (k > 0 and seconds > tightest) or (has_others and starts_s[k] >= until_s):
            return starts_s[:k], blocks[:k], is_alone
    return starts_s[: max(most, 0)], blocks[: max(most, 0)], is_alone


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
            if row_due(rows, i, fixed_s) - guard_s < ends_s[k] or outputs >= predicted_until(rows, i):
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
