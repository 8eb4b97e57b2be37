"""The plan of nearly every step in one compiled call: whoever was promised or asks fits, and nobody else is there.

What `SloPlanner` answers with one dry run and one batch is answered here by the same compiled passes, without Python
and NumPy between them: on an engine whose steps take a few milliseconds those cost more than the passes. `glance`
returns None wherever more than one look is needed (a promise or a candidate does not fit, somebody is hopeless, late or
without a promise, memory is short, drafts are chosen), and the planner then goes through all of its questions. Where
`glance` does return a plan, it is the one that those would have led to.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds
from slos_serve.core.planning.batching import compose, growth, sides
from slos_serve.core.planning.columns import (
    IS_CANDIDATE,
    IS_ENDED,
    IS_PROMISED,
    IS_RUNNING,
    OWED,
    RECLAIMABLE,
    derive,
    pick,
)
from slos_serve.core.planning.demand import (
    CONTEXT,
    DEADLINE,
    EPS_S,
    HELD,
    KEPT,
    LEFT,
    NUM_COLUMNS,
    NUM_TOTALS,
    REQUIRED,
    START,
    TOKENS,
    Demand,
    Machine,
    headroom,
    needed_s,
)
from slos_serve.core.planning.dry_run import run
from slos_serve.core.types import BatchPlan, Plan, Verdict

if TYPE_CHECKING:
    from slos_serve.core.types import BoolArray, IntArray, ReplicaState, Rows


def glance(
    state: ReplicaState, *, batch_fixed_multiple: float, brief_share: float, reserve: float, most: int
) -> Plan | None:
    """Return the plan where one look answers everything, None where it does not.

    `brief_share`: how long batches with prompts may be where that holds, of the longest ones. `most`: candidates.
    """
    limits, model, table = state.limits, state.perf_model, state.requests
    if limits.max_draft_length:
        return None
    lines = model.planned()
    fixed_s = max(batch_seconds(lines, 1.0, 1.0, 0.0, 0.0, 0.0), 1e-6)
    machine = Machine(
        lines=lines,
        margin_prefill=model.margin_prefill,
        margin_decode=model.margin_decode,
        token_budget=float(limits.max_num_batched_tokens),
        max_seqs=float(limits.max_num_seqs),
        block_size=float(limits.block_size),
        free_blocks=float(state.num_free_kv_blocks),
        max_batch_s=batch_fixed_multiple * fixed_s,
    )
    order, demand, tokens, finished_at, given, predicted_s, work = _glance(
        table.rows, state.now_s, limits.guard_s, fixed_s, limits.block_size, machine, limits.num_kv_blocks,
        brief_share, reserve, limits.work_limit, most,
    )  # fmt: skip
    if predicted_s < 0.0:
        return None
    used = tokens > 0.0
    ids = table.request_ids
    batch = BatchPlan(
        request_ids=[ids[i] for i in order[used].tolist()],
        num_tokens=tokens[used].astype(np.int64),
        draft_lengths=np.zeros(int(used.sum()), np.int64),
        predicted_s=predicted_s,
    )
    verdicts = _verdicts(state, order, demand, finished_at, given) if given.any() else ()
    return Plan(batch=batch, verdicts=verdicts, work=work, headroom_tokens_per_s=headroom(machine, demand, 0.0))


def _verdicts(
    state: ReplicaState, order: IntArray, demand: Demand, finished_at: FloatArray, given: BoolArray
) -> tuple[Verdict, ...]:
    """Return the promises that are given now."""
    table = state.requests
    verdicts = []
    for k in given.nonzero()[0].tolist():
        row = int(order[k])
        done, deadline = float(finished_at[k]), float(demand[DEADLINE, k])
        verdicts.append(
            Verdict(
                request_id=table.request_ids[row],
                promised=True,
                slack_s=deadline - done if math.isfinite(deadline) else 0.0,
                predicted_ttft_s=done + state.now_s - float(table.rows["arrival_s"][row]),
            )
        )
    return tuple(verdicts)


@jit
def _in_order(rows: Rows, index: IntArray, deadline: FloatArray) -> IntArray:
    """Return rows in the order of a demand: by deadline, decodes as they began, then by age."""
    index = index[np.argsort(rows["seq"][index], kind="mergesort")]
    index = index[np.argsort(rows["first_token_s"][index], kind="mergesort")]
    return index[np.argsort(deadline[index], kind="mergesort")]


@jit
def _is_hopeless(table, i, machine, num_blocks):  # type: ignore[no-untyped-def]
    """Tell whether not even an idle engine could serve candidate `i` in time."""
    left, context, deadline = table[LEFT, i], table[CONTEXT, i], table[DEADLINE, i]
    alone_s = batch_seconds(machine.lines, left, 1.0, 0.0, 0.0, left * (context + 0.5 * left))
    token_s = batch_seconds(machine.lines, 1.0, 1.0, context, 0.0, 0.0)
    too_fast = needed_s(table, i, 0.0) < token_s - EPS_S
    return table[START, i] > num_blocks or deadline <= 0.0 or too_fast or alone_s > deadline + EPS_S


@jit
def _glance(  # type: ignore[no-untyped-def]
    rows, now_s, guard_s, fixed_s, block_size, machine, num_blocks, brief_share, reserve, work_limit, most
):
    """Do what `glance` says: order, demand, tokens and ends of prefills in it, who is promised, seconds, work.

    Seconds are -1 where one look is not enough.
    """
    table, flags, granted, sums = derive(
        rows, now_s, guard_s, fixed_s, block_size, machine.lines, machine.margin_decode
    )
    count, num_candidates, num_ended = 0, 0, 0
    free, missing = machine.free_blocks, -machine.free_blocks
    index = np.empty(len(rows), np.int64)
    none, no_flag = np.zeros(0), np.zeros(0, np.bool_)
    nothing = np.zeros(0, np.int64), np.zeros((NUM_COLUMNS, 0)), none, none, no_flag, -1.0, 0
    for i in range(len(rows)):
        if flags[IS_ENDED, i]:
            num_ended += 1
            continue
        if flags[IS_PROMISED, i]:
            missing += growth(machine, table, i) if table[LEFT, i] <= 0.0 else 0.0
        elif flags[IS_CANDIDATE, i] and not flags[IS_RUNNING, i] and not _is_hopeless(table, i, machine, num_blocks):
            num_candidates += 1
        else:
            return nothing
        index[count] = i
        count += 1
    if count == 0 or missing > 0.0 or num_candidates > most:
        return nothing
    machine = Machine(
        machine.lines, machine.margin_prefill, machine.margin_decode, machine.token_budget,
        machine.max_seqs - num_ended, machine.block_size, free + sums[RECLAIMABLE] - sums[OWED], machine.max_batch_s,
        machine.phase_is_gain,
    )  # fmt: skip
    order = _in_order(rows, index[:count], table[DEADLINE])
    for i in range(len(rows)):
        if not flags[IS_PROMISED, i]:
            granted[i] = 0.0
    demand = pick(table, order, granted)
    has_prompts = (demand[LEFT] > 0.0).any()
    if brief_share < 1.0 and has_prompts:
        machine = Machine(
            machine.lines, machine.margin_prefill, machine.margin_decode, machine.token_budget, machine.max_seqs,
            machine.block_size, machine.free_blocks, machine.max_batch_s * brief_share, machine.phase_is_gain,
        )  # fmt: skip
    finished_at = np.full(count, np.inf)
    limit = max(1, work_limit // (4 if num_candidates else 2))
    outcome, _, _, work = run(
        machine, demand.copy(), True, 0.0, -np.inf, limit, none, -np.inf, finished_at, np.zeros((0, count)), none
    )
    if outcome != KEPT:
        return nothing
    tokens, totals = np.zeros(count), np.zeros(NUM_TOTALS)
    live, prompts = sides(demand)
    compose(machine, demand, live, prompts, machine.free_blocks, True, 0.0, tokens, totals)
    if has_prompts and _fresh_blocks(table, flags, order, tokens, machine.block_size) > free:
        return nothing
    given = np.zeros(count, np.bool_)
    if num_candidates:
        given, more = _given(machine, demand, tokens, reserve, work_limit - work)
        work += more
    seconds = 0.0
    if totals[TOKENS] > 0.0:
        seconds = batch_seconds(machine.lines, totals[0], totals[1], totals[2], totals[3], totals[4])
    return order, demand, tokens, finished_at, given, seconds, work


@jit
def _given(machine, demand, tokens, reserve, limit):  # type: ignore[no-untyped-def]
    """Return who is promised now, and the work: prompts that end in this batch, or whose place nobody takes."""
    given = (demand[REQUIRED] == 0.0) & ((tokens >= demand[LEFT]) | (reserve == 1.0))
    if given.sum() == (demand[REQUIRED] == 0.0).sum():
        return given, 0
    ends, none = np.full(demand.shape[1], np.inf), np.zeros(0)
    slow = Machine(
        machine.lines, machine.margin_prefill * reserve, machine.margin_decode, machine.token_budget, machine.max_seqs,
        machine.block_size, machine.free_blocks, machine.max_batch_s, machine.phase_is_gain,
    )  # fmt: skip
    _, _, _, work = run(
        slow,
        demand.copy(),
        False,
        0.0,
        -np.inf,
        max(0, limit),
        none,
        -np.inf,
        ends,
        np.zeros((0, demand.shape[1])),
        none,
    )
    given |= (demand[REQUIRED] == 0.0) & (ends <= demand[DEADLINE])
    return given, work


@jit
def _fresh_blocks(table, flags, order, tokens, block_size):  # type: ignore[no-untyped-def]
    """Return the free KV blocks that the batch takes."""
    fresh = 0.0
    for k in range(len(order)):
        i = order[k]
        if tokens[k] > 0.0:
            after = math.ceil((table[CONTEXT, i] + tokens[k]) / block_size)
            if not flags[IS_RUNNING, i] and table[LEFT, i] > 0.0:
                after = table[START, i]
            fresh += max(after - table[HELD, i], 0.0)
    return fresh
