"""What one step runs: the batch of the promised, who gives way to it, and who fills what it leaves.

Best-effort requests give up their blocks and seats, newest first. Where even the promised do not all fit, because
outputs outran their predicted lengths, the cheapest of them give way too.

Best-effort work fills the batch up to the time at which the next promise needs the engine. While requests are being
declined, it may lengthen only brief steps, because every newcomer waits for the end of the step; in the first tenth of
each second that limit is off, so that nobody starves. Where the search had to end before it was known whether the
promises hold, it takes what costs no time and nothing else. What was promised and became late, or is at risk, comes
first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.perf import batch_seconds
from slos_serve.core.planning import batching
from slos_serve.core.planning.columns import Columns
from slos_serve.core.planning.demand import (
    CUT_OFF,
    EPS_S,
    HAS_PREFILL,
    KEPT,
    LEFT,
    LIMIT,
    NUM_TOTALS,
    TOKENS,
    Demand,
    WorkBudget,
    needed_each,
)
from slos_serve.core.planning.dry_run import simulate
from slos_serve.core.types import BatchPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slos_serve.core.perf import FloatArray
    from slos_serve.core.types import IntArray, ReplicaState

NOBODY: IntArray = np.zeros(0, np.int64)
# Where promises are declined, best-effort work lengthens a step beside promised work to so many times its fixed cost.
CROWDED_FIXED_MULTIPLE = 1.5
# It must not stand still where promised decodes fill such steps: for this share of every second it has all the time.
OPEN_SHARE = 0.1


def _turns(tenant: IntArray, arrival_s: FloatArray, seq: IntArray) -> IntArray:
    """Return how many requests of the same tenant are older, for each request; 0 for all where there is one tenant."""
    turns: IntArray = np.zeros(len(tenant), np.int64)
    if not len(tenant) or (tenant == tenant[0]).all():
        return turns
    order = np.lexsort((seq, arrival_s, tenant))
    begins = np.flatnonzero(np.diff(tenant[order], prepend=tenant[order[0]] - 1))
    turns[order] = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    return turns


class Stepping(Columns):
    """A state, and the batches that it allows; `work_budget` is what dry runs may still cost."""

    def __init__(self, state: ReplicaState, batch_fixed_multiple: float) -> None:
        super().__init__(state, batch_fixed_multiple)
        self.work_budget = WorkBudget(state.limits.work_limit)

    def crowded_out(self) -> IntArray:
        """Return the promised rows whose blocks the others need to go on: the cheapest, newest first.

        Output lengths are predictions. Where they were too short and nothing else can give way, a promise
        must be broken on purpose, or the engine breaks one by chance.
        """
        index = self.promised
        growth = self.growth(index)
        missing = float(growth.sum()) - self.state.num_free_kv_blocks
        if missing <= 0:
            return NOBODY
        missing -= float(self.held[self.running & ~self.is_promised & ~self.ended].sum())
        gone: list[int] = []
        for k in np.lexsort((-self.rows["seq"][index], self.rows["weight"][index])).tolist():
            if missing <= 0:
                break
            if self.running[index[k]]:
                gone.append(int(index[k]))
                missing -= float(self.held[index[k]] + growth[k])
        out: IntArray = np.array(gone, np.int64)
        self.machine = self.machine._replace(free_blocks=self.machine.free_blocks + float(self.granted[out].sum()))
        return out

    def batch(
        self,
        order: IntArray,
        demand: Demand,
        at_risk: IntArray,
        crowded_out: IntArray,
        *,
        run_ahead: bool,
        outcome: int,
    ) -> BatchPlan:
        """Compose the next batch for the promised rows and fill it up; `outcome`: how their dry run ended."""
        machine, now = self.machine, self.now
        tokens, totals = np.zeros(len(order)), np.zeros(NUM_TOTALS)
        live, prompts = batching.sides(demand)
        gives_way = self.running & ~self.is_promised & ~self.ended
        gives_way[crowded_out] = True
        available = self.state.num_free_kv_blocks + float(self.held[gives_way].sum())
        while True:
            end = batching.compose(machine, demand, live, prompts, machine.free_blocks, run_ahead, now, tokens, totals)
            used = tokens > 0
            index, counts = order[used], tokens[used]
            if not len(prompts) or self.fresh_blocks(index, counts) <= available:
                break
            # Decodes that outran their predicted lengths took what a prompt was granted: it waits for others to end.
            prompts = prompts[:-1]
        preempted = NOBODY
        if len(order) < len(self.rows) or gives_way.any():
            preempted = self.make_room(order, index, counts, crowded_out)
            window = min(float(needed_each(demand, now).min(initial=math.inf)), machine.max_batch_s)
            until = min(now + window, float(totals[LIMIT]))
            if outcome == CUT_OFF:  # nobody knows whether they can spare it
                until = end
            brief = until
            if len(order) and self.declined.any() and self.state.now_s % 1.0 >= OPEN_SHARE:
                brief = min(until, max(end, now + CROWDED_FIXED_MULTIPLE * self.fixed_s))
            first, rest = self.others(order, preempted, at_risk)
            composed, composed_totals = (index, counts), totals.copy()
            index, counts = self.fill([(first, until), (rest, brief)], *composed, preempted, totals)
            later = batching.batch_end(machine, totals, now)
            checked = outcome == KEPT and len(order) > 0 and later > end + EPS_S
            if checked and not self.goes_on(demand, tokens, later, run_ahead=run_ahead):
                # What the promised will need later may only use the room that costs no time.
                totals = composed_totals
                index, counts = self.fill([(first, end), (rest, end)], *composed, preempted, totals)
        drafts = np.where(self.left[index] > 0, 0, self.verify[index] - 1)
        predicted = batch_seconds(machine.lines, *totals[:HAS_PREFILL]) if totals[TOKENS] else 0.0
        return BatchPlan(
            request_ids=[self.ids[i] for i in index.tolist()],
            num_tokens=(counts - drafts).astype(np.int64),
            draft_lengths=drafts.astype(np.int64),
            preempted=[self.ids[i] for i in preempted.tolist()],
            predicted_s=float(predicted),
        )

    def make_room(self, order: IntArray, index: IntArray, counts: FloatArray, crowded_out: IntArray) -> IntArray:
        """Return the running rows that give up blocks or seats: those outside `order`, newest first.

        Room is needed for `index` and for the next token of every other running request: where all wait
        for a block that another holds, nobody ends. What waits in `order` without a promise, and what was promised and
        is late, gives way last.
        """
        others = self.running & ~self.ended
        others[order[self.is_promised[order]]] = False
        others[index] = False
        others[crowded_out] = False
        in_order = np.zeros(len(others), np.bool_)
        in_order[order] = True
        rows = np.flatnonzero(others)
        growth = self.growth(rows)
        held = float(self.held[crowded_out].sum())
        missing = self.fresh_blocks(index, counts) + float(growth.sum()) - self.state.num_free_kv_blocks - held
        starting = int((~self.running[index]).sum())
        seats = (
            int(self.running.sum()) - len(crowded_out) + starting - self.state.limits.max_num_seqs if starting else 0
        )
        taken = crowded_out.tolist()
        last = (-self.rows["seq"][rows], in_order[rows], self.broken[rows], self.is_promised[rows])
        for k in np.lexsort(last).tolist():
            if missing <= 0 and seats <= 0:
                break
            taken.append(int(rows[k]))
            missing -= float(self.held[rows[k]] + growth[k])
            seats -= 1
        return np.array(taken, np.int64)

    def goes_on(self, demand: Demand, tokens: FloatArray, end: float, *, run_ahead: bool) -> bool:
        """Tell whether all promises still hold after a batch of these `tokens` that ends at `end`."""
        return simulate(self.machine, demand, self.now, self.work_budget, run_ahead=run_ahead, head=(tokens, end)).kept

    def others(self, order: IntArray, preempted: IntArray, at_risk: IntArray) -> tuple[IntArray, IntArray]:
        """Return the rows outside `order` that may run in what it leaves.

        First what was promised and is at risk or late, then the undecided and best-effort work, of each tenant the
        oldest before anybody's next.
        """
        rows = self.rows
        mask = ~((self.undecided & (self.left == 1)) | self.ended)
        mask[order] = False
        mask[preempted] = False
        owed = self.broken.copy()
        owed[at_risk] = True
        rest = np.flatnonzero(mask)
        rank = np.where(owed[rest], 0, np.where(self.pending[rest], 1, 2))
        urgency = np.where(rank == 2, rows["arrival_s"][rest], np.minimum(self.deadline, self.due)[rest])
        turn = np.where(rank == 2, _turns(rows["tenant"][rest], rows["arrival_s"][rest], rows["seq"][rest]), 0)
        ordered: IntArray = rest[np.lexsort((rows["seq"][rest], urgency, self.left[rest] > 0, turn, rank))]
        num_owed = int((rank == 0).sum())
        return ordered[:num_owed], ordered[num_owed:]

    def fill(
        self,
        parts: Sequence[tuple[IntArray, float]],
        index: IntArray,
        counts: FloatArray,
        preempted: IntArray,
        totals: FloatArray,
    ) -> tuple[IntArray, FloatArray]:
        """Return the batch of `index` and whom of each part of rows may run beside it until that part's time."""
        state = self.state
        for rest, until in parts:
            if not len(rest):
                continue
            free_blocks = state.num_free_kv_blocks + float(self.held[preempted].sum())
            starting = int((~self.running[index]).sum())
            seats = state.limits.max_num_seqs - int(self.running.sum()) + len(preempted) - starting
            tokens = np.zeros(len(rest))
            demand = self.demand(rest, self.held)
            demand[LEFT] -= self.undecided[rest]
            batching.fill(
                self.machine,
                demand,
                seats,
                free_blocks - self.fresh_blocks(index, counts),
                float(self.running.sum()),
                until - self.now,
                tokens,
                totals,
            )
            used = tokens > 0
            index, counts = np.concatenate([index, rest[used]]), np.concatenate([counts, tokens[used]])
        return index, counts
