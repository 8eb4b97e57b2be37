"""A replica as a router sees it between two snapshots: the planner's test, on paper.

`VirtualCopy.slack_s` runs the planner's own `dry_run.simulate` on the snapshot's demand, moved on to now,
with what has been sent since and the request in question. `VirtualCopy.flow` sums up what was sent since;
`estimates` looks at many replicas with it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds, max_chunk_tokens
from slos_serve.core.planning import draft
from slos_serve.core.planning.demand import (
    CONTEXT,
    DEADLINE,
    DUE,
    GAIN,
    HELD,
    LEFT,
    OUTPUT_LEFT,
    START,
    STEPS,
    TPOT,
    VERIFY,
    Machine,
    WorkBudget,
    needed_each,
)
from slos_serve.core.planning.dry_run import simulate
from slos_serve.core.planning.programme import tiers_of
from slos_serve.core.routing.snapshots import PrefillRow, ReplicaSnapshot, group_demand, machine_of, prefill_demand

LEAST_SHARE = 0.05  # of the idle rate that a guess reckons with, however many decodes there are
NEVER_S = 1e9
Sent = tuple[float, PrefillRow]  # when a request was sent, and what it is


def _coming_load(prefills: FloatArray, now_s: float) -> float:
    """Return the decode tokens per second that prefills will add; until the deadline they decode half of the time."""
    return float((0.5 / needed_each(prefills, now_s)).sum())


@jit
def advance(demand, num_groups, lines, step_s, at_s, start_s, done):  # type: ignore[no-untyped-def]
    """Make absolute times relative to `start_s`, when the next step begins; tell which columns are still within reach.

    Decode groups come first, the request in question last. Decodes kept their lead over their schedule since the
    snapshot of `at_s`, and `done` prefill tokens were computed, earliest deadline first: what has ended decodes by
    now. The planner lets go of what the engine could not serve in time alone.
    """
    last = demand.shape[1] - 1
    demand[DEADLINE] -= start_s
    for i in range(num_groups):
        demand[DUE, i] = max(demand[DUE, i] - at_s, step_s)
        ran = max(0.0, start_s - at_s) / demand[TPOT, i] if math.isfinite(demand[TPOT, i]) else 0.0
        demand[OUTPUT_LEFT, i] = max(demand[GAIN, i], demand[OUTPUT_LEFT, i] - ran)
    for k in np.argsort(demand[DEADLINE, num_groups:last], kind="mergesort"):
        i = num_groups + k
        tokens = math.floor(min(max(done, 0.0), demand[LEFT, i]))
        done -= demand[LEFT, i]
        demand[LEFT, i] -= tokens
        demand[CONTEXT, i] += tokens
        if demand[LEFT, i] == 0.0:
            demand[DUE, i] = max(max(demand[DEADLINE, i], 0.0) + demand[TPOT, i], step_s)
            demand[HELD, i] = max(demand[HELD, i], demand[START, i])
            demand[DEADLINE, i] = -math.inf
    reach = np.ones(demand.shape[1], np.bool_)
    for i in range(num_groups, last):
        left = demand[LEFT, i]
        if left > 0.0:
            pairs = left * (demand[CONTEXT, i] + 0.5 * left)
            reach[i] = batch_seconds(lines, left, 1.0, 0.0, 0.0, pairs) <= demand[DEADLINE, i]
    return reach


class Flow(NamedTuple):
    """What was sent to a replica since its snapshot, and what that does to it.

    `clear_s`: when its prompts would all be computed, one after another; `listed`: their tokens, those of the
    snapshot included; `rate`: prefill tokens per second; `load`: decode tokens per second that they will add,
    half counted; `blocks`: KV blocks they will take; `backlog`: tokens due by each of `deadlines`, from 0 on.
    """

    rows: list[PrefillRow]
    clear_s: float
    listed: float
    rate: float
    load: float
    blocks: float
    deadlines: list[float]
    backlog: list[float]

    def due_by(self, at_s: float) -> float:
        """Return the prefill tokens due by then."""
        return self.backlog[bisect_right(self.deadlines, at_s)]


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
        decodes, prefills = group_demand(groups), prefill_demand(rows)
        periods = needed_each(decodes, snapshot.time_s)
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
            demand=np.concatenate([decodes, prefills], axis=1),
            num_groups=len(groups),
            counts=np.array([*(group.size for group in groups), *(0.5 + 0.5 * row.promised for row in rows)]),
            acceptance=np.array([*(group.acceptance for group in groups), *(row.acceptance for row in rows)]),
            peak=budget / whole,
            rate=max(0.0, min(room, budget - load)) / period,
            step_s=step_s,
            deadlines=[row.deadline_s for row in rows],
            backlog=np.cumsum([0.0, *(row.left_tokens for row in rows)]).tolist(),
            coming_load=_coming_load(prefills, snapshot.time_s),
            coming_blocks=sum(row.start_blocks - row.held_blocks for row in rows),
            sessions=dict(snapshot.sessions),
        )

    def flow(self, sent: Sequence[Sent]) -> Flow:
        """Sum up what was sent since the snapshot; see `Flow`."""
        rate = max(self.rate, LEAST_SHARE * self.peak)
        clear_s, listed = self.snapshot.time_s + self.backlog[-1] / rate, self.backlog[-1]
        load, blocks = self.coming_load, self.coming_blocks
        deadlines, backlog = self.deadlines, self.backlog
        for at_s, row in sent:
            clear_s = max(clear_s, at_s) + self.step_s + row.left_tokens / rate
            listed += row.left_tokens
            blocks += row.start_blocks
        rows = [row for _, row in sent]
        if rows:
            load += _coming_load(prefill_demand(rows), sent[0][0])
            due = sorted((row.deadline_s, row.left_tokens) for row in (*self.snapshot.prefills, *rows))
            deadlines, backlog = [at_s for at_s, _ in due], list(accumulate((left for _, left in due), initial=0.0))
        return Flow(rows, clear_s, listed, rate, load, blocks, deadlines, backlog)

    def slack_s(self, flow: Flow, row: PrefillRow, start_s: float, done: float, work_limit: int) -> float | None:
        """Return how long before its deadline the request would be prefilled; None where a promise would break.

        `start_s`: when the next step begins; `done`: prefill tokens of what is there computed by then.
        """
        rows = [*flow.rows, row]
        demand = np.concatenate([self.demand, prefill_demand(rows)], axis=1)
        kept = advance(demand, self.num_groups, self.machine.lines, self.step_s, self.snapshot.time_s, start_s, done)
        if self.snapshot.limits.max_draft_length:
            self._set_lengths(demand, rows)
        order = np.flatnonzero(kept)
        order = order[np.argsort(demand[DEADLINE, order], kind="stable")]
        position = int(np.flatnonzero(order == demand.shape[1] - 1)[0])
        demand = demand[:, order]
        work_budget = WorkBudget(work_limit)
        for run_ahead in (True, False):
            dry_run = simulate(self.machine, demand, 0.0, work_budget, run_ahead=run_ahead)
            if dry_run.kept:
                slack = demand[DEADLINE, position] - dry_run.finished_at[position]
                return float(slack) if math.isfinite(slack) else NEVER_S
        return None

    def _set_lengths(self, demand: FloatArray, rows: Sequence[PrefillRow]) -> None:
        """Choose draft lengths by TPOT as the planner does."""
        n = self.num_groups
        counts = np.concatenate([self.counts, np.full(len(rows), 0.5)])
        acceptance = np.concatenate([self.acceptance, [row.acceptance for row in rows]])
        tpots, group = tiers_of(draft.paces(demand, 0.0))
        totals = np.bincount(group, counts, len(tpots)).astype(np.float64)
        mean = np.bincount(group, counts * acceptance, len(tpots)) / np.maximum(totals, 1e-9)
        verify = draft.lengths(
            tpots, mean, totals, self.machine, self.snapshot.limits.max_draft_length + 1,
            context_tokens=float(demand[CONTEXT, :n].sum()),
        )  # fmt: skip
        gain = np.array([draft.expected_tokens(a, s) for a, s in zip(mean, verify, strict=True)])
        demand[VERIFY] *= verify[group]
        demand[GAIN] *= gain[group]
        demand[STEPS] = verify[group] - 1
