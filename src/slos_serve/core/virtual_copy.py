"""A replica as a router sees it between two snapshots: the planner's test, and a cheap guess before it.

`VirtualCopy.slack_s` runs the planner's own `trial.simulate` on the snapshot's demand, moved on to now,
with what has been sent since and the request in question. `VirtualCopy.guess` is a closed form over the
same figures for when there are many replicas to look at: prefill backlog due before the request, the
rate that the decodes leave, KV blocks, and the price of the promise.

The price is what the promise takes of each resource (seconds of an idle engine; share of the KV room times
seconds of residence), each times `PRICE_BASE` to the power of how full that resource would be: the
exponential weights of online routing, under which no resource is filled while another one is free.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slos_serve.core import demand as columns
from slos_serve.core import draft
from slos_serve.core.demand import Effort, Machine
from slos_serve.core.perf import FloatArray, batch_seconds, max_chunk_tokens
from slos_serve.core.snapshots import PrefillRow, ReplicaSnapshot, group_demand, machine_of, prefill_demand
from slos_serve.core.trial import simulate

BoolArray = npt.NDArray[np.bool_]
PRICE_BASE = 64.0  # how much dearer a full resource is than an empty one
FULLEST = 1.5  # beyond it a resource grows no dearer
LEAST_SHARE = 0.05  # of the idle rate that a guess reckons with, however many decodes there are
NEVER_S = 1e9


class Guess(NamedTuple):
    """The closed form's view of one replica: price, slack in seconds, prefill rate, and whether all seems to fit."""

    replica_id: str
    row: PrefillRow
    fits: bool
    price: float
    slack_s: float
    rate: float


@dataclass(slots=True)
class VirtualCopy:
    """Arrays made from a snapshot once: the engine, its demand, and the closed form's figures."""

    snapshot: ReplicaSnapshot
    machine: Machine
    demand: FloatArray  # absolute times; decode groups first, then prefills by deadline
    num_groups: int
    counts: FloatArray
    acceptance: FloatArray
    peak: float  # prefill tokens per second of an idle engine
    rate: float  # and with its decodes kept
    deadlines: list[float]  # of the prefills, ascending
    backlog: list[float]  # prefill tokens due by each, from 0 on
    coming_load: float  # decode tokens per second that the prefills will add, half counted
    coming_blocks: float  # KV blocks that they will take
    sessions: Mapping[str, int]

    @classmethod
    def of(cls, snapshot: ReplicaSnapshot) -> VirtualCopy:
        """Prepare the feasibility test for a snapshot."""
        machine = machine_of(snapshot)
        groups, rows = snapshot.decodes, snapshot.prefills
        margin, lines, budget = machine.margin_prefill, machine.lines, machine.token_budget
        whole = max(1e-9, margin * batch_seconds(lines, budget, 1.0, 0.0, 0.0, 0.0))
        periods = np.array([group.tpot_s for group in groups])
        period = min(float(periods.min(initial=math.inf)), whole)
        share = period / periods
        count = np.array([group.size for group in groups]) * share
        load = float(count.sum())
        read = float((np.array([group.context_tokens for group in groups]) * share).sum())
        room = max_chunk_tokens(lines, period / margin, load, load + 1.0, read, 0.0, 0.0, 0.0)
        return cls(
            snapshot=snapshot,
            machine=machine,
            demand=np.concatenate([group_demand(groups), prefill_demand(rows)], axis=1),
            num_groups=len(groups),
            counts=np.array([*(group.size for group in groups), *(0.5 + 0.5 * row.promised for row in rows)]),
            acceptance=np.array([*(group.acceptance for group in groups), *(row.acceptance for row in rows)]),
            peak=budget / whole,
            rate=max(0.0, min(room, budget - load)) / period,
            deadlines=[row.deadline_s for row in rows],
            backlog=np.cumsum([0.0, *(row.left_tokens for row in rows)]).tolist(),
            coming_load=sum(0.5 / row.tpot_s for row in rows),
            coming_blocks=sum(row.start_blocks - row.held_blocks for row in rows),
            sessions=dict(snapshot.sessions),
        )

    def slack_s(self, sent: Sequence[PrefillRow], row: PrefillRow, now_s: float, work_limit: int) -> float | None:
        """Return how long before its deadline the request would be prefilled; None where a promise would break."""
        rows = [*sent, row]
        demand = np.concatenate([self.demand, prefill_demand(rows)], axis=1)
        self._advance(demand, max(0.0, now_s - self.snapshot.time_s), now_s)
        is_new = np.zeros(demand.shape[1], np.bool_)
        is_new[-1] = True
        if self.snapshot.limits.max_draft_length:
            self._set_lengths(demand, rows)
        kept = self._within_reach(demand) | is_new
        order = np.flatnonzero(kept)
        order = order[np.argsort(demand[columns.DEADLINE, order], kind="stable")]
        demand = demand[:, order]
        position = int(np.flatnonzero(is_new[order])[0])
        effort = Effort(work_limit)
        for eager in (True, False):
            trial = simulate(self.machine, demand, 0.0, effort, eager=eager)
            if trial.kept:
                slack = demand[columns.DEADLINE, position] - trial.finished_at[position]
                return float(slack) if math.isfinite(slack) else NEVER_S
        return None

    def _advance(self, demand: FloatArray, elapsed_s: float, now_s: float) -> None:
        """Make times relative to now, and let the engine have worked since the snapshot: a fluid estimate.

        Decodes kept their lead over their schedule, and prefills went on at the rate they leave, earliest
        deadline first.
        """
        at_s = self.snapshot.time_s
        n, m = self.num_groups, self.demand.shape[1]
        groups, rows = demand[:, :n], demand[:, n:m]
        demand[columns.DEADLINE] -= now_s
        everyone = batch_seconds(
            self.machine.lines, groups[columns.VERIFY].sum(), float(n), groups[columns.CONTEXT].sum(), 0.0, 0.0
        )
        groups[columns.DUE] = np.maximum(groups[columns.DUE] - at_s, self.machine.margin_decode * everyone)
        if elapsed_s > 0.0:
            ran = np.where(np.isfinite(groups[columns.TPOT]), elapsed_s / groups[columns.TPOT], 0.0)
            groups[columns.OUTPUT_LEFT] = np.maximum(groups[columns.GAIN], groups[columns.OUTPUT_LEFT] - ran)
            left = rows[columns.LEFT]
            before = np.cumsum(left) - left
            done = np.floor(np.clip(self.rate * elapsed_s - before, 0.0, left - 1.0))
            rows[columns.LEFT] -= done
            rows[columns.CONTEXT] += done

    def _within_reach(self, demand: FloatArray) -> BoolArray:
        """Tell which columns the engine could still serve in time alone: the planner lets go of the others."""
        lines = self.machine.lines
        left = demand[columns.LEFT]
        pairs = left * (demand[columns.CONTEXT] + 0.5 * left)
        alone = (lines[:, 0:1] * left + lines[:, 4:5] * pairs + lines[:, 1:2] + lines[:, 5:6]).max(axis=0)
        reach: BoolArray = (left == 0.0) | (alone <= demand[columns.DEADLINE])
        return reach

    def _set_lengths(self, demand: FloatArray, rows: Sequence[PrefillRow]) -> None:
        """Choose draft lengths by TPOT as the planner does."""
        n = self.num_groups
        tpot = demand[columns.TPOT].copy()
        tpot[:n] *= self.counts[:n]
        counts = np.concatenate([self.counts, np.full(len(rows), 0.5)])
        acceptance = np.concatenate([self.acceptance, [row.acceptance for row in rows]])
        tpots, group = np.unique(tpot, return_inverse=True)
        totals = np.bincount(group, counts, len(tpots)).astype(np.float64)
        mean = np.bincount(group, counts * acceptance, len(tpots)) / totals
        verify = draft.lengths(
            tpots, mean, totals, self.machine, self.snapshot.limits.max_draft_length + 1,
            context_tokens=float(demand[columns.CONTEXT, :n].sum()),
        )  # fmt: skip
        gain = np.array([draft.expected_tokens(a, s) for a, s in zip(mean, verify, strict=True)])
        demand[columns.VERIFY] *= verify[group]
        demand[columns.GAIN] *= gain[group]
        demand[columns.STEPS] = verify[group] - 1

    def guess(
        self, replica_id: str, row: PrefillRow, sent: Sequence[PrefillRow], now_s: float, extra_tokens: float
    ) -> Guess:
        """Return the closed form for a request; `extra_tokens` is backlog to reckon with beside what is known."""
        snapshot = self.snapshot
        deadline_s = row.deadline_s
        done = self.rate * max(0.0, now_s - snapshot.time_s)
        before = max(0.0, self.backlog[bisect_right(self.deadlines, deadline_s)] - done) + extra_tokens
        load, blocks = self.coming_load, self.coming_blocks
        for other in sent:
            if other.deadline_s <= deadline_s:
                before += other.left_tokens
            load += 0.5 / other.tpot_s  # until the deadline they decode for half of the time
            blocks += other.start_blocks
        rate = max(self.rate - load, LEAST_SHARE * self.peak)
        left_s = max(deadline_s - now_s, 1e-3) if math.isfinite(deadline_s) else 10.0
        slack_s = left_s - (before + row.left_tokens) / rate
        num_blocks = float(snapshot.limits.num_kv_blocks)
        free = snapshot.free_kv_blocks - blocks - row.start_blocks
        pace = row.tpot_s if math.isfinite(row.tpot_s) else 0.1
        compute = 1.0 - rate / self.peak + (before + row.left_tokens) / (self.peak * left_s)
        memory = 1.0 - free / num_blocks
        seconds = (row.left_tokens + row.output_tokens) / self.peak
        room = (row.start_blocks + row.output_tokens / snapshot.limits.block_size) / num_blocks
        price = seconds * PRICE_BASE ** min(compute, FULLEST)
        price += room * row.output_tokens * pace * PRICE_BASE ** min(memory, FULLEST)
        fits = slack_s >= 0.0 and free >= 0.0 and self.rate - load >= 1.0 / pace
        return Guess(replica_id, row, fits, price, slack_s, rate)
