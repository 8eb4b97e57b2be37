"""A replica as a router sees it between two snapshots: the planner's test, and a cheap guess before it.

`VirtualCopy.slack_s` runs the planner's own `trial.simulate` on the snapshot's demand, moved on to now,
with what has been sent since and the request in question. `VirtualCopy.guess` is a closed form over the
same figures for when there are many replicas to look at: prefill backlog due before the request, the
rate that the decodes leave, KV blocks, and the price of the promise.

The price is what the promise takes of each resource until `RENT_S` from now (seconds of an idle engine; share
of the KV room, times seconds), each times `PRICE_BASE` to the power of how full that resource would be: the
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
RENT_S = 1.0
FULLEST = 1.5  # beyond it a resource grows no dearer
LEAST_SHARE = 0.05  # of the idle rate that a guess reckons with, however many decodes there are
NEVER_S = 1e9


Sent = tuple[float, PrefillRow]  # when a request was sent, and what it is


class Guess(NamedTuple):
    """The closed form's view of one replica: price, slack in seconds, prefill rate, and whether all seems to fit."""

    replica_id: str
    row: PrefillRow
    fits: bool
    price: float
    slack_s: float
    rate: float


class Flow(NamedTuple):
    """What was sent to a replica since its snapshot, and what that does to it.

    `clear_s`: when its prompts would all be computed, one after another; `listed`: their tokens, those of the
    snapshot included; `rate`: prefill tokens per second; `load`: decode tokens per second that they will add,
    half counted; `blocks`: KV blocks they will take.
    """

    rows: list[PrefillRow]
    clear_s: float
    listed: float
    rate: float
    load: float
    blocks: float


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
    step_s: float  # a step of its decodes alone, with margin
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
        sizes = np.array([group.size for group in groups])
        context = sum(group.context_tokens for group in groups)
        step_s = machine.margin_decode * batch_seconds(lines, sizes.sum(), float(len(groups)), context, 0.0, 0.0)
        return cls(
            snapshot=snapshot,
            machine=machine,
            demand=np.concatenate([group_demand(groups), prefill_demand(rows)], axis=1),
            num_groups=len(groups),
            counts=np.array([*(group.size for group in groups), *(0.5 + 0.5 * row.promised for row in rows)]),
            acceptance=np.array([*(group.acceptance for group in groups), *(row.acceptance for row in rows)]),
            peak=budget / whole,
            rate=max(0.0, min(room, budget - load)) / period,
            step_s=step_s,
            deadlines=[row.deadline_s for row in rows],
            backlog=np.cumsum([0.0, *(row.left_tokens for row in rows)]).tolist(),
            coming_load=sum(0.5 / row.tpot_s for row in rows),
            coming_blocks=sum(row.start_blocks - row.held_blocks for row in rows),
            sessions=dict(snapshot.sessions),
        )

    def flow(self, sent: Sequence[Sent]) -> Flow:
        """Sum up what was sent since the snapshot; see `Flow`."""
        rate = max(self.rate, LEAST_SHARE * self.peak)
        clear_s, listed = self.snapshot.time_s + self.backlog[-1] / rate, self.backlog[-1]
        load, blocks = self.coming_load, self.coming_blocks
        rows = []
        for at_s, row in sent:
            clear_s = max(clear_s, at_s) + self.step_s + row.left_tokens / rate
            listed += row.left_tokens
            load += 0.5 / row.tpot_s  # until the deadline they decode for half of the time
            blocks += row.start_blocks
            rows.append(row)
        return Flow(rows, clear_s, listed, rate, load, blocks)

    def _progress(self, flow: Flow, now_s: float) -> tuple[float, float]:
        """Return how long a newcomer waits for the step under way, and the prefill tokens done by its end.

        A fluid estimate: since the snapshot prefills went on at the rate that decodes leave. A step is not
        interrupted. After the one that the snapshot tells of, it is taken to have just begun, as long as a
        step may be while there are prompts to compute.
        """
        left = max(0.0, flow.clear_s - now_s) * flow.rate
        wait_s = self.snapshot.time_s + self.snapshot.step_s - now_s
        if wait_s < 0.0:
            # a step with prompts is as long as it may be, one without is short
            wait_s = min(self.machine.max_batch_s, self.step_s + left / self.peak) if left > 0.0 else self.step_s
        return wait_s, max(0.0, flow.listed - left) + flow.rate * wait_s

    def slack_s(self, flow: Flow, row: PrefillRow, now_s: float, work_limit: int) -> float | None:
        """Return how long before its deadline the request would be prefilled; None where a promise would break."""
        rows = [*flow.rows, row]
        demand = np.concatenate([self.demand, prefill_demand(rows)], axis=1)
        wait_s, done = self._progress(flow, now_s)
        self._advance(demand, done, now_s + wait_s)
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

    def _advance(self, demand: FloatArray, done: float, start_s: float) -> None:
        """Make times relative to `start_s`, when the next step begins.

        Decodes kept their lead over their schedule since the snapshot, and `done` prefill tokens were computed,
        earliest deadline first.
        """
        at_s, n = self.snapshot.time_s, self.num_groups
        groups, rows = demand[:, :n], demand[:, n:-1]
        demand[columns.DEADLINE] -= start_s
        groups[columns.DUE] = np.maximum(groups[columns.DUE] - at_s, self.step_s)
        elapsed_s = max(0.0, start_s - at_s)
        ran = np.where(np.isfinite(groups[columns.TPOT]), elapsed_s / groups[columns.TPOT], 0.0)
        groups[columns.OUTPUT_LEFT] = np.maximum(groups[columns.GAIN], groups[columns.OUTPUT_LEFT] - ran)
        order = np.argsort(rows[columns.DEADLINE], kind="stable")
        left = rows[columns.LEFT, order]
        tokens = np.floor(np.clip(done - (np.cumsum(left) - left), 0.0, left))
        rows[columns.LEFT, order] -= tokens
        rows[columns.CONTEXT, order] += tokens
        ended = rows[columns.LEFT] == 0.0  # they decode by now
        rows[columns.DUE, ended] = np.maximum(rows[columns.DEADLINE, ended], 0.0) + rows[columns.TPOT, ended]
        rows[columns.DUE, ended] = np.maximum(rows[columns.DUE, ended], self.step_s)
        rows[columns.HELD, ended] = np.maximum(rows[columns.HELD, ended], rows[columns.START, ended])
        rows[columns.DEADLINE, ended] = -math.inf

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

    def guess(self, replica_id: str, row: PrefillRow, flow: Flow, now_s: float, extra_tokens: float) -> Guess:
        """Return the closed form for a request; `extra_tokens` is backlog to reckon with beside what is known."""
        snapshot, deadline_s, load = self.snapshot, row.deadline_s, flow.load
        wait_s, done = self._progress(flow, now_s)
        before = self.backlog[bisect_right(self.deadlines, deadline_s)]
        for other in flow.rows:
            if other.deadline_s <= deadline_s:
                before += other.left_tokens
        before = max(0.0, before - done) + extra_tokens
        rate = max(self.rate - load, LEAST_SHARE * self.peak)
        left_s = max(deadline_s - now_s, 1e-3) if math.isfinite(deadline_s) else 10.0
        slack_s = left_s - wait_s - (before + row.left_tokens) / rate
        num_blocks = float(snapshot.limits.num_kv_blocks)
        free = snapshot.free_kv_blocks - flow.blocks - row.start_blocks
        decodes = min(row.output_tokens, RENT_S / row.tpot_s)
        compute = 1.0 - rate / self.peak + wait_s / left_s + (before + row.left_tokens) / (self.peak * left_s)
        memory = 1.0 - free / num_blocks
        room = (row.start_blocks + decodes / snapshot.limits.block_size) / num_blocks
        price = (row.left_tokens + decodes) / self.peak * PRICE_BASE ** min(compute, FULLEST)
        price += room * RENT_S * PRICE_BASE ** min(memory, FULLEST)
        fits = slack_s >= 0.0 and free >= 0.0 and self.rate - load >= 1.0 / row.tpot_s
        return Guess(replica_id, row, fits, price, slack_s, rate)
