"""A replica's state as a plan reads it: what each request owes, holds and may take, relative to now.

Everything is derived in one pass over the request table, once per plan. `demand` picks the columns that
trials and batches work on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slos_serve.core import draft
from slos_serve.core.deadlines import next_due_s, pace_s
from slos_serve.core.demand import (
    CONTEXT,
    DEADLINE,
    DUE,
    EPS_S,
    GAIN,
    GAP,
    HELD,
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
from slos_serve.core.perf import FloatArray, batch_seconds
from slos_serve.core.types import Status, Tier

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, ReplicaState

BoolArray = npt.NDArray[np.bool_]

RUNNING = int(Status.RUNNING)
PENDING, PROMISED, BEST_EFFORT = int(Tier.PENDING), int(Tier.PROMISED), int(Tier.BEST_EFFORT)
MAX_ACCEPTANCE = 0.99
MIN_TPOT_S = 1e-6


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
        lines = model.as_array()
        fixed = max(batch_seconds(lines, 1.0, 1.0, 0.0, 0.0, 0.0), 1e-6)

        computed = rows["num_computed_tokens"]
        self.produced = produced = rows["num_output_tokens"]
        self.running = rows["status"] == RUNNING
        total = rows["num_prompt_tokens"] + produced
        done = np.where(computed == 0, rows["num_cached_tokens"], computed)
        remaining = np.maximum(1, total - done)
        decoding = (produced > 0) & (remaining == 1) & (computed > 0)
        self.context = done.astype(np.float64)
        self.left = np.where(decoding, 0, remaining).astype(np.float64)
        self.held = rows["num_kv_blocks"].astype(np.float64)
        self.start = np.ceil((total + 1) / limits.block_size)

        due = next_due_s(rows, fixed) - state.now_s - limits.guard_s
        self.deadline = np.where(decoding, -math.inf, due)
        self.tpot = np.maximum(pace_s(rows, fixed), MIN_TPOT_S)

        tier = rows["tier"]
        has_slo = np.isfinite(due) | np.isfinite(self.tpot) | np.isfinite(rows["max_gap_s"])
        alive = has_slo & (rows["missed"] == 0)
        self.pending = tier == PENDING
        self.is_promised = alive & (tier == PROMISED)
        self.promised = np.flatnonzero(self.is_promised)
        # A token that not even a batch of its own could deliver in time is owed with those like it.
        live = decoding & self.is_promised
        alone = model.margin_decode * (lines[:, :2].sum(axis=1)[:, None] + lines[:, 2:3] * self.context + lines[:, 5:])
        late = live & (due < alone.max(axis=0) - EPS_S)
        self.due = np.where(decoding, due, math.inf)
        self.due[late] = np.maximum(due[late], self.decode_seconds(late))
        open_to = alive & (produced == 0) & (self.pending | ((tier == BEST_EFFORT) & (due > self.now)))
        self.candidates = np.flatnonzero(open_to)
        # Beside promised work, the last token of a prompt waits for a promise: after it none can be given.
        self.undecided = self.pending & open_to & np.isfinite(due) & (len(self.promised) > 0)
        # Blocks that promised prefills under way have been granted, though they do not hold them yet.
        self.granted = np.where(decoding, self.held, np.maximum(self.held, self.start))
        self.granted[~self.running] = 0.0
        owed = float((self.granted - self.held)[self.promised].sum())
        reclaimable = float(self.held[self.running & ~self.is_promised].sum())
        self.machine = Machine(
            lines=lines,
            margin_prefill=model.margin_prefill,
            margin_decode=model.margin_decode,
            token_budget=float(limits.max_num_batched_tokens),
            max_seqs=float(limits.max_num_seqs),
            block_size=float(limits.block_size),
            free_blocks=state.num_free_kv_blocks + reclaimable - owed,
            max_batch_s=batch_fixed_multiple * fixed,
        )
        self.verify = np.ones(len(rows))
        self.gain = np.ones(len(rows))
        if limits.max_draft_length > 0:
            self.choose_lengths(np.flatnonzero(self.is_promised | open_to), float(self.context[live].sum()))

    def decode_seconds(self, mask: BoolArray) -> float:
        """Return the time of one batch of the masked decodes, margin included."""
        lines, margin = self.state.perf_model.as_array(), self.state.perf_model.margin_decode
        count = float(mask.sum())
        return margin * batch_seconds(lines, count, count, float(self.context[mask].sum()), 0.0, 0.0)

    def choose_lengths(self, index: IntArray, read: float) -> None:
        """Set how many tokens the requests at `index` verify per decode, and what that yields."""
        if not index.size:
            return
        state, classes = self.state, self.state.requests.classes
        acceptance = np.array([min(max(state.acceptance.get(name, 0.0), 0.0), MAX_ACCEPTANCE) for name in classes])
        current = np.array([1 + state.draft_lengths.get(name, -1) for name in classes])
        by_class = self.rows["class_index"][index]
        tpot = self.tpot[index]
        # as complex numbers the pairs sort as pairs, at a fraction of what unique columns cost
        groups, group = np.unique(tpot + 1j * by_class, return_inverse=True)
        weights = np.where(self.is_promised[index], 1.0, 0.5)
        counts: FloatArray = np.bincount(group, weights, len(groups)).astype(np.float64)
        class_of = groups.imag.astype(np.int64)
        verify = draft.lengths(
            groups.real.copy(), acceptance[class_of], counts, self.machine, state.limits.max_draft_length + 1,
            context_tokens=read, current=current[class_of], waiting=bool((self.left[index] > 0).any()),
        )  # fmt: skip
        gains = np.array([draft.expected_tokens(a, s) for a, s in zip(acceptance[class_of], verify, strict=True)])
        self.verify[index] = verify[group]
        self.gain[index] = gains[group]

    def demand(self, index: IntArray, held: FloatArray) -> Demand:
        """Return the demand of the given rows, in that order."""
        rows = self.rows
        demand = np.empty((NUM_COLUMNS, len(index)))
        demand[LEFT] = self.left[index]
        demand[CONTEXT] = self.context[index]
        demand[DEADLINE] = self.deadline[index]
        demand[DUE] = self.due[index]
        demand[TPOT] = self.tpot[index]
        demand[GAP] = rows["max_gap_s"][index]
        demand[VERIFY] = self.verify[index]
        demand[GAIN] = self.gain[index]
        demand[STEPS] = self.verify[index] - 1
        demand[OUTPUT_LEFT] = np.maximum(1.0, rows["predicted_output_tokens"] - self.produced)[index]
        demand[HELD] = held[index]
        demand[START] = self.start[index]
        demand[VALUE] = rows["weight"][index]
        demand[REQUIRED] = self.is_promised[index]
        return demand

    def by_deadline(self, index: IntArray) -> IntArray:
        """Return rows in the order of a demand."""
        # stable sorts of what is nearly in order already; decodes as a trial has them: in the order in which they began
        order: IntArray = index[np.argsort(self.rows["seq"][index], kind="stable")]
        order = order[np.argsort(self.rows["first_token_s"][order], kind="stable")]
        return order[np.argsort(self.deadline[order], kind="stable")]

    def growth(self, index: IntArray) -> FloatArray:
        """Return the KV blocks that the next token of each decode takes; 0 for prefills."""
        after = np.ceil((self.context[index] + self.verify[index]) / self.machine.block_size)
        return np.where(self.left[index] > 0, 0.0, (after - self.held[index]).clip(min=0))

    def fresh_blocks(self, index: IntArray, counts: FloatArray) -> float:
        """Return the free KV blocks that computing `counts` tokens for the rows takes."""
        after = np.ceil((self.context[index] + counts) / self.machine.block_size)
        starting = ~self.running[index] & (self.left[index] > 0)
        after = np.where(starting, self.start[index], after)
        return float((after - self.held[index]).clip(min=0).sum())
