"""The SLO planner: which requests are promised, and what the next batch computes.

Theory of operation. A step has four questions, answered in this order.

1. *Can what was promised be kept?* Simulate the promised requests with the mean model. If a deadline
   cannot be met, recovery lets the cheapest promises go until the rest can (`Plan.at_risk`); they keep
   being served, after the others.
2. *Who else can be promised?* A request stays a candidate while its slack lasts. The dynamic programme
   of `admission` (or all candidates at once, where a simulation shows that they fit) proposes a set; the
   set is simulated with the model's margin, repaired and extended. A candidate that even an idle engine
   could not serve in time is told so.
3. *What runs next?* `batching.compose` for everything promised: eagerly, if the promises also hold with
   every decode in every batch, otherwise decodes join only when they must.
4. *What is left over* goes to undecided candidates, then to best-effort work, oldest first. Best-effort
   requests lose their KV blocks, newest first, when promised work needs them.

The planner keeps nothing between calls: the same state gives the same plan.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core import admission, batching
from slos_serve.core.batching import MISSED, Capacity, Demand, Effort, simulate
from slos_serve.core.deadlines import next_due_s
from slos_serve.core.perf import batch_seconds, max_chunk_tokens
from slos_serve.core.types import BatchPlan, Plan, Status, Tier, Verdict

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.types import IntArray, ReplicaState

DEFAULT_PERIOD_S = 0.05


class SloPlanner:
    """Plan for the SLOs of every request; see the module's text.

    `batch_fixed_multiple`: a batch with prefill lasts at most this many times the fixed cost of a step,
    so that a newcomer never waits long behind it. `fill_share`: the share of the tightest live TPOT that
    a batch filled with work without promises may last. `admission_name`: `dp` (the dynamic programme) or
    `greedy` (by value density, for comparison). `beam_width`: most labels of the programme.
    """

    def __init__(
        self,
        *,
        batch_fixed_multiple: float = 8.0,
        fill_share: float = 1.0,
        admission_name: str = "dp",
        beam_width: int = 200,
    ) -> None:
        if admission_name not in ("dp", "greedy"):
            raise ValueError(f"admission_name = {admission_name!r}: expected 'dp' or 'greedy'")
        if not batch_fixed_multiple > 0 or not fill_share > 0 or beam_width < 1:
            raise ValueError("batch_fixed_multiple, fill_share and beam_width: expected positive values")
        self._batch_fixed_multiple = batch_fixed_multiple
        self._fill_share = fill_share
        self._admission_name = admission_name
        self._beam_width = beam_width

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch and what has become known about promises."""
        return _Planning(self, state).run()


class _Planning:
    """One call of `SloPlanner.plan`: the columns it reads and the steps it takes."""

    def __init__(self, options: SloPlanner, state: ReplicaState) -> None:
        self.options = options
        self.state = state
        self.now = state.now_s
        self.effort = Effort(state.limits.work_limit)
        limits, model = state.limits, state.perf_model
        rows = self.rows = state.requests.rows
        self.lines = model.as_array()
        fixed = max(batch_seconds(self.lines, 1.0, 1.0, 0.0, 1.0, 0.0), 1e-6)
        block_size = limits.block_size

        computed = rows["num_computed_tokens"]
        cached = np.where(computed == 0, rows["num_cached_tokens"], 0)
        total = rows["num_prompt_tokens"] + rows["num_output_tokens"]
        remaining = np.maximum(1, total - computed - cached)
        produced = rows["num_output_tokens"]
        decoding = (produced > 0) & (remaining == 1) & (computed > 0)
        self.context = (computed + cached).astype(np.float64)
        self.left = np.where(decoding, 0, remaining).astype(np.float64)
        self.held = rows["num_kv_blocks"].astype(np.float64)
        full = np.ceil((total + 1) / block_size)
        reserved = np.where(rows["status"] == Status.RUNNING, np.maximum(self.held, np.where(decoding, 0, full)), 0.0)
        self.start = np.maximum(1.0, full)

        due = next_due_s(rows, fixed) - limits.guard_s
        # A token that is already late is owed with the next batch, however short that is.
        soonest = self.now + model.margin_decode * batch_seconds(
            self.lines, float(decoding.sum()), float(decoding.sum()), float(self.context[decoding].sum()), 1.0, 0.0
        )
        self.due = np.where(decoding, np.maximum(due, soonest), math.inf)
        self.deadline = np.where(decoding, math.inf, due)
        thinking = (rows["is_thinking"] == 1) & np.isfinite(rows["thinking_tpot_s"])
        tpot = np.where(thinking, rows["thinking_tpot_s"], rows["tpot_s"])
        e2e_pace = (rows["e2e_deadline_s"] - due) / np.maximum(1.0, rows["predicted_output_tokens"] - produced)
        self.tpot = np.where(np.isfinite(e2e_pace), np.minimum(tpot, np.maximum(e2e_pace, fixed)), tpot)
        self.output_left = np.maximum(1.0, rows["predicted_output_tokens"] - produced)

        has_slo = np.isfinite(due) | np.isfinite(rows["tpot_s"]) | np.isfinite(rows["max_gap_s"])
        alive = has_slo & (rows["missed"] == 0)
        tier = rows["tier"]
        self.promised = np.flatnonzero(alive & (tier == Tier.PROMISED))
        self.candidates = np.flatnonzero(
            alive
            & (produced == 0)
            & ((tier == Tier.PENDING) | ((tier == Tier.BEST_EFFORT) & (self.deadline > self.now)))
        )
        self.pending = tier == Tier.PENDING
        others = rows["status"] == Status.RUNNING
        others[self.promised] = False
        self.reclaimable = float(self.held[others].sum())
        # Blocks that promised prefills under way have been granted but do not hold yet.
        owed = float((reserved - self.held)[self.promised].clip(min=0).sum())
        self.capacity = Capacity(
            lines=self.lines,
            margin_prefill=model.margin_prefill,
            margin_decode=model.margin_decode,
            token_budget=limits.max_num_batched_tokens,
            max_seqs=limits.max_num_seqs,
            block_size=block_size,
            free_blocks=state.num_free_kv_blocks + self.reclaimable - owed,
            max_batch_s=options._batch_fixed_multiple * fixed,
        )
        self.reserved = reserved

    # -- demand -----------------------------------------------------------------------------------

    def demand(self, index: IntArray) -> tuple[Demand, IntArray]:
        """Return the demand of the given rows in order of deadline, and the rows in that order."""
        rows = self.rows
        order = index[np.lexsort((rows["seq"][index], self.deadline[index]))]
        ones = np.ones(len(order))
        kept = np.isin(order, self.promised, assume_unique=True)
        return (
            Demand(
                left=self.left[order],
                context=self.context[order],
                deadline=self.deadline[order],
                due=self.due[order],
                tpot=self.tpot[order],
                gap=rows["max_gap_s"][order],
                verify=ones,
                gain=ones.copy(),
                output_left=self.output_left[order],
                held=np.where(kept, self.reserved[order], 0.0),
                start=self.start[order],
                value=rows["weight"][order],
                required=kept.astype(np.int64),
            ),
            order,
        )

    # -- the four questions -----------------------------------------------------------------------

    def run(self) -> Plan:
        """Answer the four questions and assemble the plan."""
        at_risk = self.recover()
        keep = np.setdiff1d(self.promised, at_risk, assume_unique=True) if at_risk.size else self.promised
        verdicts: list[Verdict] = []
        chosen, eager = self.admit(keep, verdicts)
        batch = self.batch(np.concatenate([keep, chosen]), at_risk, eager)
        ids = self.state.requests.request_ids
        return Plan(
            batch=batch,
            verdicts=tuple(verdicts),
            at_risk=tuple(ids[i] for i in sorted(at_risk.tolist(), key=lambda i: self.rows["seq"][i])),
            work=self.effort.spent,
            headroom_tokens_per_s=self.headroom(np.concatenate([keep, chosen])),
        )

    def recover(self) -> IntArray:
        """Return the promised rows that have to be let go for the others to be kept."""
        none = np.zeros(0, np.int64)
        if not (self.left[self.promised] > 0).any():
            return none
        demand, order = self.demand(self.promised)
        if simulate(demand, self.capacity, self.now, self.effort, eager=False, margin=False).outcome != MISSED:
            return none
        mean = replace(self.capacity, margin_prefill=1.0, margin_decode=1.0)
        candidates = replace(demand, required=np.zeros(len(demand), np.int64))
        effort = Effort(max(1, self.effort.left // 2))
        kept, _ = admission.select(candidates, mean, self.now, effort, name="greedy", width=1)
        self.effort.spent += effort.spent
        return np.delete(order, kept)

    def admit(self, keep: IntArray, verdicts: list[Verdict]) -> tuple[IntArray, bool]:
        """Return the rows promised now, and whether decodes may run ahead; appends the verdicts."""
        options = self.options
        candidates = self.servable(verdicts)
        everyone, order = self.demand(np.concatenate([keep, candidates]))
        if not (everyone.left > 0).any():
            return candidates, True
        trial = simulate(everyone, self.capacity, self.now, self.effort, eager=True, margin=True)
        if trial.kept:
            chosen = np.arange(len(order))
            eager = True
        elif not candidates.size:
            return candidates, False
        else:
            chosen, trial = admission.select(
                everyone, self.capacity, self.now, self.effort, name=options._admission_name, width=options._beam_width
            )
            eager = False
        ids, arrival = self.state.requests.request_ids, self.rows["arrival_s"]
        promised = [int(i) for i in chosen.tolist() if not everyone.required[i]]
        for position, i in enumerate(chosen.tolist()):
            if everyone.required[i]:
                continue
            done = float(trial.finished_at[position])
            row = int(order[i])
            deadline = float(everyone.deadline[i])
            verdicts.append(
                Verdict(
                    request_id=ids[row],
                    promised=True,
                    slack_s=deadline - done if math.isfinite(deadline) else 0.0,
                    predicted_ttft_s=done - float(arrival[row]),
                )
            )
        return order[promised] if promised else np.zeros(0, np.int64), eager

    def servable(self, verdicts: list[Verdict]) -> IntArray:
        """Drop the candidates that no plan can serve in time any more, with a verdict where it is news."""
        keep: list[int] = []
        ids = self.state.requests.request_ids
        for i in self.candidates.tolist():
            reason = ""
            if self.start[i] > self.state.limits.num_kv_blocks:
                reason = "memory"
            elif self.deadline[i] <= self.now:
                reason = "deadline-passed"
            else:
                left, context = float(self.left[i]), float(self.context[i])
                alone = batch_seconds(self.lines, left, 1.0, 0.0, 0.0, left * (context + 0.5 * left))
                if self.now + alone > self.deadline[i]:
                    reason = "compute"
            if not reason:
                keep.append(i)
            elif self.pending[i]:
                verdicts.append(Verdict(request_id=ids[i], promised=False, reason=reason))
        # Unpromised requests whose first token is out can no longer be promised.
        produced = self.rows["num_output_tokens"]
        for i in np.flatnonzero(self.pending & ((produced > 0) | (self.rows["missed"] == 1))).tolist():
            reason = "deadline-passed" if self.rows["missed"][i] else "compute"
            verdicts.append(Verdict(request_id=ids[i], promised=False, reason=reason))
        return np.array(keep, np.int64)

    # -- the batch --------------------------------------------------------------------------------

    def batch(self, served: IntArray, at_risk: IntArray, eager: bool) -> BatchPlan:
        """Compose the next batch for the promised rows and fill it up."""
        demand, order = self.demand(served)
        capacity, state = self.capacity, self.state
        tokens, totals = np.zeros(len(order)), np.zeros(7)
        batching.compose(
            capacity.lines, capacity.margin_prefill, capacity.margin_decode, capacity.token_budget, capacity.max_seqs,
            capacity.free_blocks, capacity.max_batch_s, eager, self.now,
            demand.left, demand.context, demand.deadline, demand.due, demand.tpot, demand.verify, demand.gain,
            demand.output_left, demand.held, demand.start, tokens, totals,
        )  # fmt: skip
        used = tokens > 0
        rows_in, counts = order[used], tokens[used].astype(np.int64)
        preempted = self.make_room(rows_in, counts)
        filled, filled_counts = self.fill(served, rows_in, counts, at_risk, preempted, demand, totals)
        index = np.concatenate([rows_in, filled])
        ids = state.requests.request_ids
        predicted = (
            batch_seconds(self.lines, totals[0], totals[1], totals[2], totals[3], totals[4]) if totals[0] else 0.0
        )
        return BatchPlan(
            request_ids=[ids[i] for i in index.tolist()],
            num_tokens=np.concatenate([counts, filled_counts]),
            draft_lengths=np.zeros(len(index), np.int64),
            preempted=[ids[i] for i in preempted.tolist()],
            predicted_s=float(predicted),
        )

    def fresh_blocks(self, index: IntArray, counts: IntArray) -> float:
        """Return the KV blocks that computing `counts` tokens for the rows takes from the free ones."""
        after = np.ceil((self.context[index] + counts) / self.state.limits.block_size)
        starting = (self.rows["status"][index] != Status.RUNNING) & (self.left[index] > 0)
        after = np.where(starting, self.start[index], after)
        return float((after - self.held[index]).clip(min=0).sum())

    def make_room(self, rows_in: IntArray, counts: IntArray) -> IntArray:
        """Return the running rows without a promise that give up their blocks or seats, newest first."""
        running = self.rows["status"] == Status.RUNNING
        missing = self.fresh_blocks(rows_in, counts) - self.state.num_free_kv_blocks
        starting = int((~running[rows_in]).sum())
        seats = int(running.sum()) + starting - self.state.limits.max_num_seqs
        if missing <= 0 and seats <= 0:
            return np.zeros(0, np.int64)
        victims = running.copy()
        victims[self.promised] = False
        victims[rows_in] = False
        index = np.flatnonzero(victims)
        taken: list[int] = []
        for i in index[np.argsort(-self.rows["seq"][index])].tolist():
            if missing <= 0 and seats <= 0:
                break
            taken.append(i)
            missing -= float(self.held[i])
            seats -= 1
        return np.array(taken, np.int64)

    def fill(
        self,
        served: IntArray,
        rows_in: IntArray,
        counts: IntArray,
        at_risk: IntArray,
        preempted: IntArray,
        demand: Demand,
        totals: FloatArray,
    ) -> tuple[IntArray, IntArray]:
        """Return rows without a (keepable) promise that run in what is left, and their token counts."""
        rows, limits, state = self.rows, self.state.limits, self.state
        rest = np.ones(len(rows), np.bool_)
        rest[served] = False
        rest[preempted] = False
        index = np.flatnonzero(rest)
        if not index.size:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rank = np.where(self.pending[index], 1, 2)
        rank[np.isin(index, at_risk)] = 0
        urgency = np.where(rank == 2, rows["arrival_s"][index], np.minimum(self.deadline, self.due)[index])
        index = index[np.lexsort((rows["seq"][index], urgency, self.left[index] > 0, rank))]
        live = np.isfinite(demand.tpot)
        window = self.options._fill_share * float(demand.tpot[live].min()) if live.any() else self.capacity.max_batch_s
        if not math.isfinite(window):
            window = DEFAULT_PERIOD_S
        seconds = min(window, float(totals[6]) - self.now)
        freed = float(self.held[preempted].sum())
        free_blocks = state.num_free_kv_blocks + freed - self.fresh_blocks(rows_in, counts)
        running = rows["status"] == Status.RUNNING
        seats = limits.max_num_seqs - int(running.sum()) + len(preempted) - int((~running[rows_in]).sum())
        tokens = np.zeros(len(index))
        batching.fill(
            self.lines, self.capacity.margin_prefill, self.capacity.margin_decode, limits.max_num_batched_tokens,
            seats, free_blocks, float(limits.block_size), seconds,
            self.left[index], self.context[index], np.ones(len(index)), self.held[index], tokens, totals,
        )  # fmt: skip
        used = tokens > 0
        return index[used], tokens[used].astype(np.int64)

    def headroom(self, served: IntArray) -> float:
        """Return the prefill rate that the promised decodes leave, in tokens per second."""
        live = served[np.isfinite(self.tpot[served])]
        capacity = self.capacity
        if not live.size:
            whole = batch_seconds(self.lines, float(capacity.token_budget), 1.0, 0.0, 1.0, 0.0)
            return float(capacity.token_budget / (whole * capacity.margin_prefill))
        period = float(self.tpot[live].min())
        share = period / self.tpot[live]
        context = float((self.context[live] * share).sum())
        room = max_chunk_tokens(
            self.lines, period / capacity.margin_prefill, float(share.sum()), float(share.sum()), context, 1.0, 0.0, 0.0
        )
        return max(0.0, float(min(room, capacity.token_budget))) / period
