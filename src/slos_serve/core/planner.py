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
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core import admission, batching, draft
from slos_serve.core.batching import Demand, Effort, Machine, simulate
from slos_serve.core.deadlines import next_due_s, pace_s
from slos_serve.core.perf import batch_seconds, max_chunk_tokens
from slos_serve.core.types import BatchPlan, Plan, Status, Tier, Verdict

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.types import IntArray, ReplicaState

RUNNING = int(Status.RUNNING)
PENDING, PROMISED, BEST_EFFORT = int(Tier.PENDING), int(Tier.PROMISED), int(Tier.BEST_EFFORT)
NOBODY: IntArray = np.zeros(0, np.int64)
MAX_ACCEPTANCE = 0.99
MIN_TPOT_S = 1e-6
# Promises are let go only where they are out of reach by more than the model's usual error.
RECOVERY_MARGIN = 0.97
# More candidates than this are looked at in order of urgency.
MAX_CANDIDATES = 256


class SloPlanner:
    """Plan for the SLOs of every request; see the module's text.

    `batch_fixed_multiple`: a batch lasts at most this many times the fixed cost of a step, so that a
    newcomer never waits long behind it. `fill_share`: the share of the tightest live TPOT that a batch
    filled with work without promises may last. `admission_name`: `dp` (the dynamic programme) or `greedy`
    (by value density, for comparison). `beam_width`: most labels of the programme.
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
        self.batch_fixed_multiple = batch_fixed_multiple
        self.fill_share = fill_share
        self.admission_name = admission_name
        self.beam_width = beam_width

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch and what has become known about promises."""
        return _Planning(self, state).run()


class _Planning:
    """One call of `SloPlanner.plan`: the columns it reads and the steps it takes."""

    def __init__(self, options: SloPlanner, state: ReplicaState) -> None:
        self.options = options
        self.state = state
        # Times are relative to now: a double of seconds since 1970 resolves no finer than 0.2 microseconds.
        self.now = 0.0
        self.effort = Effort(state.limits.work_limit)
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
        self.tpot = np.maximum(pace_s(rows), MIN_TPOT_S)

        tier = rows["tier"]
        has_slo = np.isfinite(due) | np.isfinite(self.tpot) | np.isfinite(rows["max_gap_s"])
        alive = has_slo & (rows["missed"] == 0)
        self.pending = tier == PENDING
        self.is_promised = alive & (tier == PROMISED)
        self.promised = np.flatnonzero(self.is_promised)
        # A token that is already late is owed with the next batch, however short that is.
        live = decoding & self.is_promised
        num_live, read = float(live.sum()), float(self.context[live].sum())
        soonest = self.now + model.margin_decode * batch_seconds(lines, num_live, num_live, read, 0.0, 0.0)
        self.due = np.where(decoding, np.maximum(due, soonest), math.inf)
        open_to = alive & (produced == 0) & (self.pending | ((tier == BEST_EFFORT) & (due > self.now)))
        self.candidates = np.flatnonzero(open_to)
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
            max_batch_s=options.batch_fixed_multiple * fixed,
        )
        self.verify = np.ones(len(rows))
        self.gain = np.ones(len(rows))
        if limits.max_draft_length > 0:
            self.choose_lengths(np.flatnonzero(self.is_promised | open_to), read)

    def choose_lengths(self, index: IntArray, read: float) -> None:
        """Set how many tokens the requests at `index` verify per decode, and what that yields."""
        if not index.size:
            return
        state, classes = self.state, self.state.requests.classes
        acceptance = np.array([min(max(state.acceptance.get(name, 0.0), 0.0), MAX_ACCEPTANCE) for name in classes])
        current = np.array([1 + state.draft_lengths.get(name, 0) for name in classes])
        by_class = self.rows["class_index"][index]
        tpot = self.tpot[index]
        groups, group = np.unique(np.stack([tpot, by_class.astype(np.float64)]), axis=1, return_inverse=True)
        group = group.reshape(-1)
        weights = np.where(self.is_promised[index], 1.0, 0.5)
        counts: FloatArray = np.bincount(group, weights, groups.shape[1]).astype(np.float64)
        class_of = groups[1].astype(np.int64)
        verify = draft.lengths(
            groups[0], acceptance[class_of], counts, self.machine, state.limits.max_draft_length + 1,
            context_tokens=read, current=current[class_of],
        )  # fmt: skip
        gains = np.array([draft.expected_tokens(a, s) for a, s in zip(acceptance[class_of], verify, strict=True)])
        self.verify[index] = verify[group]
        self.gain[index] = gains[group]

    def demand(self, index: IntArray, held: FloatArray) -> Demand:
        """Return the demand of the given rows, in that order."""
        rows = self.rows
        demand = np.empty((batching.NUM_COLUMNS, len(index)))
        demand[batching.LEFT] = self.left[index]
        demand[batching.CONTEXT] = self.context[index]
        demand[batching.DEADLINE] = self.deadline[index]
        demand[batching.DUE] = self.due[index]
        demand[batching.TPOT] = self.tpot[index]
        demand[batching.GAP] = rows["max_gap_s"][index]
        demand[batching.VERIFY] = self.verify[index]
        demand[batching.GAIN] = self.gain[index]
        demand[batching.STEPS] = self.verify[index] - 1
        demand[batching.OUTPUT_LEFT] = np.maximum(1.0, rows["predicted_output_tokens"] - self.produced)[index]
        demand[batching.HELD] = held[index]
        demand[batching.START] = self.start[index]
        demand[batching.VALUE] = rows["weight"][index]
        demand[batching.REQUIRED] = self.is_promised[index]
        return demand

    def by_deadline(self, index: IntArray) -> IntArray:
        """Return rows in the order of a demand."""
        order: IntArray = index[np.lexsort((self.rows["seq"][index], self.deadline[index]))]
        return order

    # -- the four questions -----------------------------------------------------------------------

    def run(self) -> Plan:
        """Answer the four questions and assemble the plan."""
        verdicts: list[Verdict] = []
        crowded_out = self.crowded_out()
        order = self.by_deadline(np.setdiff1d(self.promised, crowded_out) if crowded_out.size else self.promised)
        demand = self.demand(order, self.granted)
        kept = self.recover(demand)
        at_risk = crowded_out
        if kept is not None:
            at_risk = np.concatenate([crowded_out, np.delete(order, kept)])
            order, demand = order[kept], demand[:, kept]
        candidates = self.servable(verdicts)
        if candidates.size and not at_risk.size:
            order = self.by_deadline(np.concatenate([order, candidates]))
            demand = self.demand(order, np.where(self.is_promised, self.granted, 0.0))
        chosen, eager = self.admit(order, demand, verdicts)
        if chosen is not None:
            order, demand = order[chosen], demand[:, chosen]
        return Plan(
            batch=self.batch(order, demand, at_risk, crowded_out, eager=eager),
            verdicts=tuple(verdicts),
            at_risk=tuple(self.ids[i] for i in self.by_deadline(at_risk).tolist()),
            work=self.effort.spent,
            headroom_tokens_per_s=self.headroom(demand),
        )

    def growth(self, index: IntArray) -> FloatArray:
        """Return the KV blocks that the next token of each decode takes; 0 for prefills."""
        after = np.ceil((self.context[index] + self.verify[index]) / self.machine.block_size)
        return np.where(self.left[index] > 0, 0.0, (after - self.held[index]).clip(min=0))

    def crowded_out(self) -> IntArray:
        """Return the promised rows whose blocks the others need to go on: the cheapest, newest first.

        Output lengths are predictions. Where they were too short and nothing else can give way, a promise
        must be broken on purpose, or the engine breaks one by chance.
        """
        index = self.promised
        missing = float(self.growth(index).sum()) - self.state.num_free_kv_blocks
        if missing <= 0:
            return NOBODY
        missing -= float(self.held[self.running & ~self.is_promised].sum())
        running = index[self.running[index]]
        gone: list[int] = []
        for i in running[np.lexsort((-self.rows["seq"][running], self.rows["weight"][running]))].tolist():
            if missing <= 0:
                break
            gone.append(i)
            missing -= float(self.held[i] + self.growth(np.array([i]))[0])
        return np.array(gone, np.int64)

    def recover(self, demand: Demand) -> IntArray | None:
        """Return the positions in `demand` to keep where not all can be; None where all can."""
        mean = self.machine._replace(margin_prefill=RECOVERY_MARGIN, margin_decode=RECOVERY_MARGIN)
        outcome = simulate(mean, demand, self.now, self.effort, eager=False).outcome
        if outcome not in (batching.MISSED, batching.STUCK):
            return None
        if simulate(mean, demand, self.now, self.effort, eager=True).kept:
            return None
        free = demand.copy()
        free[batching.REQUIRED] = 0
        effort = Effort(max(1, self.effort.left // 2))
        kept, _ = admission.select(mean, free, self.now, effort, name="greedy", width=1)
        self.effort.spent += effort.spent
        return kept

    def servable(self, verdicts: list[Verdict]) -> IntArray:
        """Return the candidates that an idle engine could still serve in time; say so of the others."""
        started = np.flatnonzero(self.pending & ((self.produced > 0) | (self.rows["missed"] == 1)))
        for i in started.tolist():
            # A first token without a promise: it can no longer be promised.
            reason = "deadline-passed" if self.rows["missed"][i] else "compute"
            verdicts.append(Verdict(request_id=self.ids[i], promised=False, reason=reason))
        index = self.candidates
        if not index.size:
            return index
        lines, left = self.machine.lines, self.left[index]
        alone = (
            lines[:, 0:1] * left
            + lines[:, 4:5] * (left * (self.context[index] + 0.5 * left))
            + lines[:, 1:2]
            + lines[:, 5:6]
        ).max(axis=0)
        too_big = self.start[index] > self.state.limits.num_kv_blocks
        past = self.deadline[index] <= self.now
        hopeless = too_big | past | (self.now + alone > self.deadline[index])
        for k in np.flatnonzero(hopeless & self.pending[index]).tolist():
            reason = "memory" if too_big[k] else "deadline-passed" if past[k] else "compute"
            verdicts.append(Verdict(request_id=self.ids[int(index[k])], promised=False, reason=reason))
        return self.by_deadline(index[~hopeless])[:MAX_CANDIDATES]

    def admit(self, order: IntArray, demand: Demand, verdicts: list[Verdict]) -> tuple[IntArray | None, bool]:
        """Return the positions to promise or keep (None: all), and whether decodes may run ahead."""
        new = demand[batching.REQUIRED] == 0
        if not (demand[batching.LEFT] > 0).any():
            return None, True
        chosen: IntArray | None = None
        trial = simulate(self.machine, demand, self.now, self.effort, eager=True)
        eager = trial.kept
        if not eager:
            if not new.any():
                return None, False
            chosen, trial = admission.select(
                self.machine, demand, self.now, self.effort,
                name=self.options.admission_name, width=self.options.beam_width,
            )  # fmt: skip
            if not trial.kept:
                # The promises made so far may hold only with decodes running ahead.
                chosen = np.flatnonzero(~new)
                eager = simulate(self.machine, demand[:, chosen], self.now, self.effort, eager=True).kept
        positions = range(len(order)) if chosen is None else chosen.tolist()
        for k, i in enumerate(positions):
            if new[i]:
                row = int(order[i])
                done, deadline = float(trial.finished_at[k]), float(demand[batching.DEADLINE, i])
                verdicts.append(
                    Verdict(
                        request_id=self.ids[row],
                        promised=True,
                        slack_s=deadline - done if math.isfinite(deadline) else 0.0,
                        predicted_ttft_s=done + self.state.now_s - float(self.rows["arrival_s"][row]),
                    )
                )
        return chosen, eager

    # -- the batch --------------------------------------------------------------------------------

    def batch(
        self, order: IntArray, demand: Demand, at_risk: IntArray, crowded_out: IntArray, *, eager: bool
    ) -> BatchPlan:
        """Compose the next batch for the promised rows and fill it up."""
        machine = self.machine
        tokens, totals = np.zeros(len(order)), np.zeros(batching.NUM_TOTALS)
        batching.compose(machine, demand, machine.free_blocks, eager, self.now, tokens, totals)
        used = tokens > 0
        index, counts = order[used], tokens[used]
        preempted = NOBODY
        if len(order) < len(self.rows):
            preempted = self.make_room(order, index, counts, crowded_out)
            rest = np.ones(len(self.rows), np.bool_)
            rest[order] = False
            rest[preempted] = False
            filled, filled_counts = self.fill(np.flatnonzero(rest), index, counts, at_risk, preempted, demand, totals)
            index, counts = np.concatenate([index, filled]), np.concatenate([counts, filled_counts])
        drafts = np.where(self.left[index] > 0, 0, self.verify[index] - 1)
        predicted = batch_seconds(machine.lines, *totals[: batching.HAS_PREFILL]) if totals[batching.TOKENS] else 0.0
        return BatchPlan(
            request_ids=[self.ids[i] for i in index.tolist()],
            num_tokens=(counts - drafts).astype(np.int64),
            draft_lengths=drafts.astype(np.int64),
            preempted=[self.ids[i] for i in preempted.tolist()],
            predicted_s=float(predicted),
        )

    def fresh_blocks(self, index: IntArray, counts: FloatArray) -> float:
        """Return the free KV blocks that computing `counts` tokens for the rows takes."""
        after = np.ceil((self.context[index] + counts) / self.machine.block_size)
        starting = ~self.running[index] & (self.left[index] > 0)
        after = np.where(starting, self.start[index], after)
        return float((after - self.held[index]).clip(min=0).sum())

    def make_room(self, order: IntArray, index: IntArray, counts: FloatArray, crowded_out: IntArray) -> IntArray:
        """Return the running rows outside `order` that give up blocks or seats, newest first.

        Room is needed for `index` and for the next token of every other running request: where all wait
        for a block that another holds, nobody ends.
        """
        others = self.running.copy()
        others[order] = False
        others[crowded_out] = False
        rows = np.flatnonzero(others)
        growth = self.growth(rows)
        held = float(self.held[crowded_out].sum())
        missing = self.fresh_blocks(index, counts) + float(growth.sum()) - self.state.num_free_kv_blocks - held
        starting = int((~self.running[index]).sum())
        seats = (
            int(self.running.sum()) - len(crowded_out) + starting - self.state.limits.max_num_seqs if starting else 0
        )
        taken = crowded_out.tolist()
        for k in np.lexsort((-self.rows["seq"][rows], self.is_promised[rows])).tolist():
            if missing <= 0 and seats <= 0:
                break
            taken.append(int(rows[k]))
            missing -= float(self.held[rows[k]] + growth[k])
            seats -= 1
        return np.array(taken, np.int64)

    def fill(
        self,
        rest: IntArray,
        index: IntArray,
        counts: FloatArray,
        at_risk: IntArray,
        preempted: IntArray,
        demand: Demand,
        totals: FloatArray,
    ) -> tuple[IntArray, FloatArray]:
        """Return rows without a (keepable) promise that run in what is left, and their token counts."""
        state, machine, rows = self.state, self.machine, self.rows
        rank = np.where(self.pending[rest], 1, 2)
        rank[np.isin(rest, at_risk)] = 0
        urgency = np.where(rank == 2, rows["arrival_s"][rest], np.minimum(self.deadline, self.due)[rest])
        rest = rest[np.lexsort((rows["seq"][rest], urgency, self.left[rest] > 0, rank))]
        window = min(float(demand[batching.TPOT].min(initial=math.inf)) * self.options.fill_share, machine.max_batch_s)
        seconds = min(window, float(totals[batching.LIMIT]) - self.now)
        if totals[batching.BLOCKED] and totals[batching.TOKENS]:
            # A promised prefill waits for blocks that these decodes will release: do not slow them down.
            margin = machine.margin_prefill if totals[batching.HAS_PREFILL] else machine.margin_decode
            composed = batch_seconds(machine.lines, *totals[: batching.HAS_PREFILL])
            seconds = min(seconds, margin * composed)
        free_blocks = state.num_free_kv_blocks + float(self.held[preempted].sum()) - self.fresh_blocks(index, counts)
        starting = int((~self.running[index]).sum())
        seats = state.limits.max_num_seqs - int(self.running.sum()) + len(preempted) - starting
        tokens = np.zeros(len(rest))
        batching.fill(
            machine,
            self.demand(rest, self.held),
            seats,
            free_blocks,
            float(self.running.sum()),
            seconds,
            tokens,
            totals,
        )
        used = tokens > 0
        return rest[used], tokens[used]

    def headroom(self, demand: Demand) -> float:
        """Return the prefill rate that the promised decodes leave, in tokens per second."""
        machine = self.machine
        periods = demand[batching.TPOT] * demand[batching.GAIN]
        live = np.isfinite(periods)
        whole = machine.margin_prefill * batch_seconds(machine.lines, machine.token_budget, 1.0, 0.0, 0.0, 0.0)
        if not live.any():
            return float(machine.token_budget / whole)
        period = min(float(periods[live].min()), whole)
        share = period / periods[live]
        load = float((share * demand[batching.VERIFY][live]).sum())
        read = float((share * demand[batching.CONTEXT][live]).sum())
        steps = float(demand[batching.STEPS].max())
        seconds = period / machine.margin_prefill
        room = max_chunk_tokens(machine.lines, seconds, load, float(share.sum()), read, steps, 0.0, 0.0)
        return max(0.0, float(min(room, machine.token_budget - load))) / period
