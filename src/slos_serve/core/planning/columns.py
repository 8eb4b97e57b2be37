"""A replica's state as a plan reads it: what each request owes, holds and may take, relative to now.

Everything is derived in one compiled pass over the request table, once per plan. `demand` picks the columns that
dry_runs and batches work on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds, each_batch_seconds
from slos_serve.core.planning import draft
from slos_serve.core.planning.demand import (
    CONTEXT,
    DEADLINE,
    DUE,
    EPS_S,
    GAIN,
    GAP,
    HELD,
    LEAD,
    LEFT,
    NUM_COLUMNS,
    OUTPUT_LEFT,
    REQUIRED,
    START,
    STEPS,
    TPOT,
    VALUE,
    VERIFY,
    Demand,
    Machine,
)
from slos_serve.core.planning.programme import tiers_of
from slos_serve.core.slo.next_due import PROMISED, is_late, row_pace, row_scheduled, row_silence_ends
from slos_serve.core.types import Status, Tier

if TYPE_CHECKING:
    from slos_serve.core.types import BoolArray, IntArray, ReplicaState, Rows


RUNNING = int(Status.RUNNING)
PENDING, BEST_EFFORT = int(Tier.PENDING), int(Tier.BEST_EFFORT)
MAX_ACCEPTANCE = 0.99
MIN_TPOT_S = 1e-6
BATCH_FIXED_MULTIPLE = 8.0  # a batch lasts at most so many times the fixed cost of a step

# rows of the flags
IS_RUNNING, IS_PENDING, IS_PROMISED, IS_BROKEN, IS_DECLINED, IS_CANDIDATE, IS_UNDECIDED, IS_LIVE, IS_ENDED = range(9)
HAS_SLO = 9
NUM_FLAGS = 10
OWED, RECLAIMABLE, READ = range(3)  # sums: blocks granted and not held, blocks of the others, context of live decodes


@jit
def predicted_until(rows: Rows, i: int) -> float:
    """Return the output length, in tokens, at which row `i`'s predicted and drawn lengths expire and are made anew."""
    return min(float(rows["predicted_output_tokens"][i]), float(rows["drawn_output_tokens"][i]))


@jit
def planned_rests(rows: Rows) -> FloatArray:
    """Return the output tokens that each row is planned to produce still, at least 1.

    The sum of many lengths is easier to predict than one of them. So a promised or running row is planned with its
    drawn length plus `share` of the distance to its high quantile, where share = sqrt(sum r^2) / sum r over promised
    and running rows with predicted rests r: 1 for one row alone, 1 / sqrt(n) for n equal ones, as the standard error of
    a sum. Best-effort rows keep the high quantile: they can be preempted.
    """
    rests: FloatArray = np.maximum(rows["predicted_output_tokens"] - rows["num_output_tokens"], 1.0)
    total = squares = 0.0
    for i in range(len(rows)):
        if rows["tier"][i] == PROMISED or (rows["status"][i] == RUNNING and rows["tier"][i] != BEST_EFFORT):
            total += rests[i]
            squares += rests[i] * rests[i]
    share = math.sqrt(squares) / total if total > 0.0 else 1.0
    for i in range(len(rows)):
        if rows["tier"][i] == PROMISED or rows["status"][i] == RUNNING:
            rests[i] -= (1.0 - share) * (rows["predicted_output_tokens"][i] - rows["drawn_output_tokens"][i])
        rests[i] = max(rests[i], 1.0)
    return rests


@jit
def read_rows(
    rows: Rows, now_s: float, origin_s: float, guard_s: float, fixed_s: float, block_size: int
) -> tuple[Demand, BoolArray, FloatArray]:
    """Return what every row owes, holds and may take: its demand, its flags, and the KV blocks granted to it.

    Times are counted from `origin_s`, without the guard; `fixed_s`: the least time of a step. Nobody drafts yet; `HELD`
    is what is held. Who has ended, its last token being in flight, keeps seat and blocks for this step and wants
    nothing. Shapes (`NUM_COLUMNS`, rows), (`NUM_FLAGS`, rows), (rows,); `IS_DECLINED` is left to `derive`.
    """
    count = len(rows)
    table, flags, granted = np.empty((NUM_COLUMNS, count)), np.zeros((NUM_FLAGS, count), np.bool_), np.empty(count)
    rests = planned_rests(rows)
    for i in range(count):
        computed, produced, tier = rows["num_computed_tokens"][i], rows["num_output_tokens"][i], rows["tier"][i]
        running = rows["status"][i] == RUNNING
        total = rows["num_prompt_tokens"][i] + produced
        done = rows["num_cached_tokens"][i] if computed == 0 else computed
        remaining = max(1, total - done)
        decoding = produced > 0 and remaining == 1 and computed > 0
        held, start = float(rows["num_kv_blocks"][i]), math.ceil((total + 1) / block_size)
        scheduled = row_scheduled(rows, i, fixed_s) - origin_s - guard_s
        silence_ends = row_silence_ends(rows, i) - origin_s - guard_s
        due = min(scheduled, silence_ends)
        tpot, gap = max(row_pace(rows, i, fixed_s), MIN_TPOT_S), rows["max_gap_s"][i]
        has_slo = math.isfinite(due) or math.isfinite(tpot) or math.isfinite(gap)
        ended = produced >= rows["max_output_tokens"][i]
        alive = has_slo and not ended and not is_late(rows, i, now_s)
        promised = alive and tier == PROMISED
        in_time = due > now_s - origin_s
        # Blocks that promised prefills under way have been granted, though they do not hold them yet.
        granted[i] = 0.0 if not running else held if decoding else max(held, float(start))
        table[LEFT, i] = 0 if decoding else remaining
        table[CONTEXT, i] = done
        table[DEADLINE, i] = -math.inf if decoding else due
        table[DUE, i] = due if decoding else math.inf
        table[LEAD, i] = scheduled - due if decoding and due < scheduled else 0.0
        table[TPOT, i] = tpot
        table[GAP, i] = gap
        table[VERIFY, i] = table[GAIN, i] = 1.0
        table[STEPS, i] = 0.0
        table[OUTPUT_LEFT, i] = rests[i]
        table[HELD, i] = held
        table[START, i] = start
        table[VALUE, i] = rows["weight"][i]
        table[REQUIRED, i] = promised
        flags[HAS_SLO, i] = has_slo
        flags[IS_RUNNING, i] = running
        flags[IS_ENDED, i] = ended
        flags[IS_PENDING, i] = tier == PENDING and not ended
        flags[IS_PROMISED, i] = promised
        flags[IS_BROKEN, i] = tier == PROMISED and not alive and not ended
        flags[IS_CANDIDATE, i] = alive and produced == 0 and (tier == PENDING or (tier == BEST_EFFORT and in_time))
        flags[IS_LIVE, i] = decoding and promised
    return table, flags, granted


@jit
def derive(
    rows: Rows, now_s: float, guard_s: float, fixed_s: float, block_size: int, lines: FloatArray, margin_decode: float
) -> tuple[Demand, BoolArray, FloatArray, FloatArray]:
    """Return what a plan reads of every row, and sums: `read_rows` from now on, and what the engine's speed adds."""
    table, flags, granted = read_rows(rows, now_s, now_s, guard_s, fixed_s, block_size)
    count, sums = len(rows), np.zeros(3)
    num_promised = num_late = 0
    late_read = 0.0
    for i in range(count):
        held, done = table[HELD, i], table[CONTEXT, i]
        declined = rows["tier"][i] == BEST_EFFORT and flags[HAS_SLO, i]
        flags[IS_DECLINED, i] = declined and _is_possible(rows, i, table[TPOT, i], fixed_s, lines)
        # Beside promised work, the last token of a prompt waits for a promise: after it none can be given.
        undecided = flags[IS_CANDIDATE, i] and flags[IS_PENDING, i]
        flags[IS_UNDECIDED, i] = undecided and math.isfinite(table[DEADLINE, i])
        if flags[IS_PROMISED, i]:
            num_promised += 1
            sums[OWED] += granted[i] - held
        elif flags[IS_RUNNING, i] and not flags[IS_ENDED, i]:
            sums[RECLAIMABLE] += held
        if flags[IS_LIVE, i]:
            sums[READ] += done
            if table[DUE, i] < _alone_s(lines, margin_decode, done) - EPS_S:
                num_late += 1
                late_read += done
    if num_promised == 0:
        flags[IS_UNDECIDED, :] = False
    if num_late > 0:
        # A token that not even a batch of its own could deliver in time is owed with those like it.
        together = margin_decode * batch_seconds(lines, float(num_late), float(num_late), late_read, 0.0, 0.0)
        for i in range(count):
            if flags[IS_LIVE, i] and table[DUE, i] < _alone_s(lines, margin_decode, table[CONTEXT, i]) - EPS_S:
                table[DUE, i] = max(table[DUE, i], together)
    return table, flags, granted, sums


@jit
def _is_possible(rows: Rows, i: int, tpot: float, fixed_s: float, lines: FloatArray) -> bool:
    """Tell whether an idle engine could have served row `i` as it asks: only then was it declined for want of room."""
    prompt = float(rows["num_prompt_tokens"][i])
    alone = batch_seconds(lines, prompt, 1.0, 0.0, 0.0, 0.5 * prompt * prompt)
    return bool(tpot >= fixed_s and alone <= rows["ttft_deadline_s"][i] - rows["arrival_s"][i])


@jit
def _alone_s(lines: FloatArray, margin: float, context: float) -> float:
    """Return the time of a batch of one decode, margin included."""
    return margin * batch_seconds(lines, 1.0, 1.0, context, 0.0, 0.0)


@jit
def pick(table: Demand, index: IntArray, held: FloatArray) -> Demand:
    """Return the demand of the rows at `index`, with what `held` says that each holds."""
    demand = np.empty((NUM_COLUMNS, len(index)))
    for k in range(len(index)):
        i = index[k]
        for column in range(NUM_COLUMNS):
            demand[column, k] = table[column, i]
        demand[STEPS, k] = table[VERIFY, i] - 1
        demand[HELD, k] = held[i]
    return demand


@jit
def growth_of(table: Demand, index: IntArray, block_size: float) -> FloatArray:
    """Return the KV blocks that the next token of each decode takes; 0 for prefills."""
    growth = np.zeros(len(index))
    for k in range(len(index)):
        i = index[k]
        if table[LEFT, i] <= 0.0:
            after = math.ceil((table[CONTEXT, i] + table[VERIFY, i]) / block_size)
            growth[k] = max(after - table[HELD, i], 0.0)
    return growth


class Columns:
    """The columns that one plan reads, one entry per row of the request table, and the machine.

    `batch_fixed_multiple`: a batch lasts at most this many times the fixed cost of a step.
    """

    def __init__(self, state: ReplicaState, batch_fixed_multiple: float) -> None:
        self.state = state
        # Times are relative to now: a double of seconds since 1970 resolves no finer than 0.2 microseconds.
        self.now = 0.0
        self.ids = state.requests.request_ids
        limits, model = state.limits, state.perf_model
        rows = self.rows = state.requests.rows
        lines = model.planned()
        fixed = self.fixed_s = max(batch_seconds(lines, 1.0, 1.0, 0.0, 0.0, 0.0), 1e-6)
        self.table, flags, self.granted, sums = derive(
            rows, state.now_s, limits.guard_s, fixed, limits.block_size, lines, model.margin_decode
        )
        self.left, self.context, self.held = self.table[LEFT], self.table[CONTEXT], self.table[HELD]
        self.deadline, self.due = self.table[DEADLINE], self.table[DUE]
        self.verify, self.gain, self.start = self.table[VERIFY], self.table[GAIN], self.table[START]
        self.produced = rows["num_output_tokens"]
        self.running, self.pending, self.is_promised = flags[IS_RUNNING], flags[IS_PENDING], flags[IS_PROMISED]
        self.broken, self.declined, self.undecided = flags[IS_BROKEN], flags[IS_DECLINED], flags[IS_UNDECIDED]
        self.ended = flags[IS_ENDED]
        self.promised: IntArray = self.is_promised.nonzero()[0]
        self.candidates: IntArray = flags[IS_CANDIDATE].nonzero()[0]
        self.machine = Machine(
            lines=lines,
            margin_prefill=model.margin_prefill,
            margin_decode=model.margin_decode,
            token_budget=float(limits.max_num_batched_tokens),
            max_seqs=float(limits.max_num_seqs - int(self.ended.sum())),
            block_size=float(limits.block_size),
            free_blocks=state.num_free_kv_blocks + float(sums[RECLAIMABLE]) - float(sums[OWED]),
            max_batch_s=batch_fixed_multiple * fixed,
        )
        if limits.max_draft_length > 0:
            self.choose_lengths((self.is_promised | flags[IS_CANDIDATE]).nonzero()[0], float(sums[READ]))

    def token_seconds(self, index: IntArray) -> FloatArray:
        """Return how long an idle engine takes for a decode of each of the rows at `index`."""
        verify = self.verify[index]
        return each_batch_seconds(self.machine.lines, verify, context=self.context[index], draft_steps=verify - 1.0)

    def decode_seconds(self, mask: BoolArray) -> float:
        """Return the time of one batch of the masked decodes, margin included."""
        lines, margin = self.machine.lines, self.machine.margin_decode
        count = float(mask.sum())
        return margin * batch_seconds(lines, count, count, float(self.context[mask].sum()), 0.0, 0.0)

    def choose_lengths(self, index: IntArray, read: float) -> None:
        """Set how many tokens the requests at `index` verify per decode, and what that yields."""
        if not index.size:
            return
        state, classes = self.state, self.state.requests.classes
        acceptance = np.array([min(max(state.acceptance.get(name, 0.0), 0.0), MAX_ACCEPTANCE) for name in classes])
        current = np.array([1 + state.draft_lengths.get(name, -1) for name in classes])
        tiers, tier = tiers_of(draft.paces(self.demand(index, self.held), self.now))
        keys, group = np.unique(tier * len(classes) + self.rows["class_index"][index], return_inverse=True)
        tpots, class_of = tiers[keys // len(classes)], keys % len(classes)
        # without a promise yet: half
        counts = np.bincount(group, np.where(self.is_promised[index], 1.0, 0.5)).astype(np.float64)
        verify = draft.lengths(
            tpots, acceptance[class_of], counts, self.machine, state.limits.max_draft_length + 1,
            context_tokens=read, current=current[class_of], waiting=self.prompts_wait(index),
        )  # fmt: skip
        gains = np.array([draft.expected_tokens(a, s) for a, s in zip(acceptance[class_of], verify, strict=True)])
        self.verify[index] = verify[group]
        self.gain[index] = gains[group]

    def prompts_wait(self, index: IntArray) -> bool:
        """Tell whether any prompt of the rows at `index` could go on: it has its KV blocks, or finds them."""
        fits = self.running[index] | (self.start[index] <= self.machine.free_blocks)
        return bool(((self.left[index] > 0) & fits).any())

    def demand(self, index: IntArray, held: FloatArray) -> Demand:
        """Return the demand of the given rows, in that order."""
        return pick(self.table, index, held)

    def by_deadline(self, index: IntArray) -> IntArray:
        """Return rows in the order of a demand."""
        if index.size < 2:
            return index
        # decodes as a dry run has them: in the order in which they began
        rows, deadline = self.rows, self.deadline
        order: IntArray = index[np.lexsort((rows["seq"][index], rows["first_token_s"][index], deadline[index]))]
        return order

    def growth(self, index: IntArray) -> FloatArray:
        """Return the KV blocks that the next token of each decode takes; 0 for prefills."""
        return growth_of(self.table, index, self.machine.block_size)

    def fresh_blocks(self, index: IntArray, counts: FloatArray) -> float:
        """Return the free KV blocks that computing `counts` tokens for the rows takes."""
        after = np.ceil((self.context[index] + counts) / self.machine.block_size)
        starting = ~self.running[index] & (self.left[index] > 0)
        after = np.where(starting, self.start[index], after)
        return float((after - self.held[index]).clip(min=0).sum())
