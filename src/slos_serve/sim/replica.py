"""One engine on the virtual clock: it executes plans as the vLLM plug-in would, and no others.

Each step: the planner sees the table of live requests and answers with a batch; the batch is cut to what
the engine would really run (token budget, seats, remaining tokens, KV blocks in plan order; a running
request that finds no block makes the engine preempt from the end of its order and admit nobody); the
clock moves by the hardware model's time for that batch, times noise; tokens come out at the end.

The planner knows its own performance model, predicted lengths and measured acceptance; true lengths and
true times stay in here. Columns are updated with index arrays, and Python touches single requests only
when they start, finish, or reach a token count that the grading rule looks at.

With `async_lag` the plan for a step is made when the one before it starts, as under vLLM's asynchronous
scheduling: arrivals and accepted drafts are seen one step late, and a request that ends meanwhile is
dropped from the batch but its tokens have been computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slos_serve.core.perf import batch_seconds
from slos_serve.core.types import ReplicaState, RequestTable, Status, Tier
from slos_serve.sim.invariants import InvariantError, check_table
from slos_serve.sim.kernel import Kernel, Priority
from slos_serve.sim.kvpool import KvPool
from slos_serve.sim.records import Record, SimRequest

if TYPE_CHECKING:
    from slos_serve.core.lengths import LengthModel
    from slos_serve.core.perf import PerfModel
    from slos_serve.core.summary import GradedRequest
    from slos_serve.core.types import BatchPlan, IntArray, Limits, Plan, Planner

BoolArray = npt.NDArray[np.bool_]

POLL_S = 1e-3  # how soon the engine asks again after an empty plan
STARVED_S = 60.0  # empty plans for longer than this are a planner's fault
CHECK_EVERY_STEPS = 64
ACCEPTANCE_PRIOR = 50.0  # draft tokens behind the acceptance a run starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """How the simulated engine differs from an ideal one.

    `acceptance`: true chance that a draft token is accepted, by class ("" for the others).
    `noise_sigma`: lognormal spread of step times, mean 1. `drafter_step_s`: seconds each drafter step
    adds to what the hardware model says. `length_quantile`: of predicted output lengths.
    `known_lengths`: predictions are the truth (labelled runs only). `exact_windows`: grade the window rule
    on every token (the primary rule needs no such thing). `makes_promises`: the system gives verdicts.
    """

    acceptance: Mapping[str, float] = field(default_factory=dict)
    async_lag: bool = False
    noise_sigma: float = 0.0
    drafter_step_s: float = 0.0
    length_quantile: float = 0.9
    known_lengths: bool = False
    exact_windows: bool = True
    makes_promises: bool = False


@dataclass(slots=True)
class _Step:
    """A batch on its way: rows, tokens before it, who emits, drafts, and its shape for the step record."""

    rows: IntArray
    outputs_before: IntArray
    emits: BoolArray
    drafts: IntArray
    shape: dict[str, Any]


class Replica:
    """Serve submitted requests; read the counters when the kernel has run."""

    def __init__(
        self,
        kernel: Kernel,
        planner: Planner,
        *,
        limits: Limits,
        true_model: PerfModel,
        lengths: LengthModel,
        rng: np.random.Generator,
        on_end: Callable[[SimRequest, GradedRequest], None],
        options: ReplicaOptions | None = None,
        plan_model: PerfModel | None = None,
        plan_clock: Callable[[], float] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.kernel = kernel
        self.planner = planner
        self.limits = limits
        self.options = options or ReplicaOptions()
        self.lengths = lengths
        self.table = RequestTable()
        self.pool = KvPool(limits.num_kv_blocks, limits.block_size)
        self.plan_model = plan_model or true_model
        self.plan_s: list[float] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_cut_plans = 0  # plans that the engine could not run as they were
        self.tokens_computed = 0
        self._lines = true_model.as_array()
        self._lines[:, 3] += self.options.drafter_step_s
        self._noise_rng, self._draft_rng = rng.spawn(2)
        self._on_end = on_end
        self._on_step = on_step
        self._clock = plan_clock
        self._records: list[Record] = []
        self._truth: IntArray = np.zeros((64, 2), np.int64)  # output and thinking tokens
        self._drafted: dict[str, list[float]] = {}
        self._busy = False
        self._next_plan: Plan | None = None
        self._starved_since_s = math.inf
        self._thinks = False
        self._sessions: dict[str, str] = {}  # waiting request that counts on a cached session prefix

    # ---------------------------------------------------------------- arrival

    def submit(self, sim: SimRequest) -> None:
        """Take a request that arrives now."""
        request = sim.request
        if request.num_prompt_tokens + sim.num_output_tokens > self.limits.max_model_len:
            self._on_end(sim, Record(sim).fail())
            return
        if self.options.known_lengths:
            predicted = float(sim.num_output_tokens)
        else:
            quantile = self.options.length_quantile
            predicted = self.lengths.predict(
                request.slo_class, request.num_prompt_tokens, request.max_output_tokens, quantile=quantile
            )
        index = self.table.add(request, predicted_output_tokens=predicted)
        cached = sim.num_cached_tokens
        if sim.session_id and cached:
            cached = min(cached, self.pool.cached_tokens(sim.session_id))
            self._sessions[sim.session_id] = request.request_id
        self.table.rows["num_cached_tokens"][index] = min(cached, request.num_prompt_tokens - 1)
        if index == len(self._truth):
            self._truth = np.concatenate([self._truth, np.zeros_like(self._truth)])
        self._truth[index] = sim.num_output_tokens, sim.num_thinking_tokens
        self._records.append(Record(sim))
        self._thinks = self._thinks or request.thinks
        if not self._busy:
            self._busy = True
            self.kernel.schedule(self.kernel.now_s, Priority.PLAN, self._plan_and_run)

    # ---------------------------------------------------------------- planning

    def state(self, now_s: float) -> ReplicaState:
        """Return what the planner sees."""
        return ReplicaState(
            now_s=now_s,
            requests=self.table,
            num_free_kv_blocks=self.pool.num_free,
            limits=self.limits,
            perf_model=self.plan_model,
            acceptance=self.measured_acceptance(),
        )

    def measured_acceptance(self) -> dict[str, float]:
        """Return accepted over tested draft tokens by class, starting from the configured figure."""
        default = self.options.acceptance.get("", 0.0)
        measured = {}
        for name in self.table.classes:
            prior = self.options.acceptance.get(name, default)
            accepted, tested = self._drafted.get(name, (0.0, 0.0))
            measured[name] = (accepted + ACCEPTANCE_PRIOR * prior) / (tested + ACCEPTANCE_PRIOR)
        return measured

    def _plan(self, now_s: float) -> Plan:
        state = self.state(now_s)
        if self._clock is None:
            plan = self.planner.plan(state)
        else:
            start = self._clock()
            plan = self.planner.plan(state)
            self.plan_s.append(self._clock() - start)
        for verdict in plan.verdicts:
            index = self.table.index(verdict.request_id)
            self.table.rows["tier"][index] = Tier.PROMISED if verdict.promised else Tier.BEST_EFFORT
            record = self._records[index]
            if verdict.promised and record.promised_s == math.inf:
                record.promised_s = self.kernel.now_s
        return plan

    def _plan_and_run(self) -> None:
        now_s = self.kernel.now_s
        if not len(self.table):
            self._busy = False
            self._next_plan = None
            return
        if self.num_steps % CHECK_EVERY_STEPS == 0:
            check_table(self.table, self.pool, self.limits, now_s)
        plan, self._next_plan = self._next_plan or self._plan(now_s), None
        step = self._dispatch(plan.batch)
        if step is None:
            if now_s - min(self._starved_since_s, now_s) > STARVED_S:
                raise InvariantError(f"nothing ran for {STARVED_S} s while {len(self.table)} requests wait")
            self._starved_since_s = min(self._starved_since_s, now_s)
            self.kernel.schedule(now_s + POLL_S, Priority.PLAN, self._plan_and_run)
            return
        self._starved_since_s = math.inf
        seconds = step.shape["seconds"]
        self.kernel.schedule(now_s + seconds, Priority.STEP_END, lambda: self._complete(step))
        if self.options.async_lag:
            self._next_plan = self._plan(now_s + self._expected_s(step.shape))

    # ---------------------------------------------------------------- executing

    def _dispatch(self, batch: BatchPlan) -> _Step | None:
        """Cut the batch to what the engine can run, allocate, and start it; None if nothing is left."""
        table = self.table
        for request_id in batch.preempted:
            if request_id in table:
                self._preempt(table.index(request_id))
        ids, tokens, drafts = batch.request_ids, batch.num_tokens, batch.draft_lengths
        gone = 0
        if self.options.async_lag and not all(request_id in table for request_id in ids):
            alive = np.array([request_id in table for request_id in ids], np.bool_)
            gone = int((tokens + drafts)[~alive].sum())
            ids = [request_id for request_id, live in zip(ids, alive.tolist(), strict=True) if live]
            tokens, drafts = tokens[alive], drafts[alive]
        find = table.index
        chosen = np.array([find(request_id) for request_id in ids], np.int64)
        if not len(chosen):
            return None
        rows = table.rows[chosen]
        start = np.where(rows["num_computed_tokens"] == 0, rows["num_cached_tokens"], rows["num_computed_tokens"])
        needed = rows["num_prompt_tokens"] + rows["num_output_tokens"] - start
        tokens, drafts = self._cut_tokens(rows, needed, tokens, drafts)
        blocks = -(-(start + tokens + drafts) // self.limits.block_size)
        extra = np.where(tokens > 0, np.maximum(blocks - rows["num_kv_blocks"], 0), 0)
        if int(extra.sum()) > self.pool.num_free:
            tokens = self._fit_blocks(chosen, rows, tokens, extra)
        if not tokens.all():
            self.num_cut_plans += 1
            kept = np.flatnonzero(tokens > 0)
            if not len(kept):
                return None
            chosen, start, needed, tokens, drafts = chosen[kept], start[kept], needed[kept], tokens[kept], drafts[kept]
            extra, rows = extra[kept], rows[kept]
        self._claim_sessions(chosen, rows)
        self._lose_sessions(self.pool.take(int(extra.sum())))
        live = table.rows
        emits = tokens == needed
        live["num_kv_blocks"][chosen] = rows["num_kv_blocks"] + extra
        live["status"][chosen] = Status.RUNNING
        live["num_computed_tokens"][chosen] = start + tokens
        live["num_output_tokens"][chosen] = rows["num_output_tokens"] + emits
        shape = self._shape(start, tokens, drafts, needed, gone, batch.predicted_s)
        self.num_steps += 1
        self.tokens_computed += shape["num_tokens"]
        return _Step(chosen, rows["num_output_tokens"], emits, drafts, shape)

    def _cut_tokens(
        self, rows: npt.NDArray[np.void], needed: IntArray, tokens: IntArray, drafts: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Bound tokens by what is needed, by the engine's budget and by its seats."""
        limits = self.limits
        room = limits.max_model_len - rows["num_prompt_tokens"] - rows["num_output_tokens"] - 1
        decodes = (needed == 1) & (rows["num_output_tokens"] > 0)
        drafts = np.where(decodes, np.minimum(drafts, np.maximum(room, 0)), 0)
        tokens = np.minimum(tokens, needed)
        total = tokens + drafts
        if int(total.sum()) > limits.max_num_batched_tokens:
            before = np.cumsum(total) - total
            given = np.clip(limits.max_num_batched_tokens - before, 0, total)
            tokens = np.minimum(tokens, given)
            drafts = np.minimum(drafts, given - tokens)
            self.num_cut_plans += 1
        new = rows["status"] == Status.WAITING
        if new.any():
            running = int((self.table.rows["status"] == Status.RUNNING).sum())
            seats = limits.max_num_seqs - running
            tokens = np.where(new & (np.cumsum(new) > seats), 0, tokens)
        return tokens, drafts

    def _fit_blocks(
        self, chosen: IntArray, rows: npt.NDArray[np.void], tokens: IntArray, extra: IntArray
    ) -> IntArray:
        """Hand out blocks as the engine does: running first, preempting from its end, then waiting ones."""
        tokens = tokens.copy()
        status = self.table.rows["status"]
        running = [i for i in range(len(chosen)) if rows["status"][i] == Status.RUNNING]
        in_batch = set(chosen.tolist())
        held = [int(row) for row in np.flatnonzero(status == Status.RUNNING) if int(row) not in in_batch]
        held.sort(key=lambda row: int(self.table.rows["seq"][row]))
        order = [(int(chosen[i]), i) for i in running] + [(row, -1) for row in held]
        free = self.pool.num_free
        preempted = False
        position = 0
        while position < len(order):
            row, i = order[position]
            if i >= 0 and tokens[i] > 0:
                while int(extra[i]) > free and len(order) > position:
                    victim_row, victim = order.pop()
                    free += int(self.table.rows["num_kv_blocks"][victim_row])
                    self._preempt(victim_row)
                    preempted = True
                    if victim >= 0:
                        tokens[victim] = 0
                if len(order) > position:
                    free -= int(extra[i])
            position += 1
        for i in range(len(chosen)):
            if rows["status"][i] == Status.RUNNING or tokens[i] == 0:
                continue
            if preempted or int(extra[i]) > free:
                tokens[i] = 0
                preempted = True
            else:
                free -= int(extra[i])
        return tokens

    def _preempt(self, index: int) -> None:
        """Take a running request's blocks and make it wait; its tokens are kept."""
        row = self.table.rows[index]
        if row["status"] != Status.RUNNING:
            return
        self.pool.give(int(row["num_kv_blocks"]))
        row["num_kv_blocks"] = 0
        row["num_computed_tokens"] = 0
        row["num_cached_tokens"] = 0
        row["status"] = Status.WAITING
        self._records[index].num_preemptions += 1
        self.num_preemptions += 1

    def _shape(
        self, start: IntArray, tokens: IntArray, drafts: IntArray, needed: IntArray, gone: int, predicted_s: float
    ) -> dict[str, Any]:
        """Return the step record of a batch; `seconds` is its true time."""
        decodes = needed == 1
        num_tokens = int(tokens.sum() + drafts.sum()) + gone
        context = int((start * decodes).sum())
        pairs = float((tokens * (start + 0.5 * tokens) * ~decodes).sum())
        draft_steps = int(drafts.max())
        count = len(tokens)
        seconds = float(batch_seconds(self._lines, num_tokens, count, context, draft_steps, pairs))
        sigma = self.options.noise_sigma
        if sigma:
            seconds *= math.exp(sigma * self._noise_rng.standard_normal() - 0.5 * sigma * sigma)
        return {
            "step": self.num_steps,
            "t": self.kernel.now_s,
            "num_tokens": num_tokens,
            "num_requests": count,
            "context_tokens": context,
            "draft_steps": draft_steps,
            "attention_pairs": pairs,
            "has_prefill": int(not decodes.all()),
            "seconds": seconds,
            "planned_s": None,
            "predicted_s": predicted_s,
        }

    def _expected_s(self, shape: Mapping[str, Any]) -> float:
        """Return how long the planner's model thinks a step takes."""
        return self.plan_model.seconds(
            shape["num_tokens"],
            shape["num_requests"],
            context_tokens=shape["context_tokens"],
            draft_steps=shape["draft_steps"],
            attention_pairs=shape["attention_pairs"],
        )

    # ---------------------------------------------------------------- results

    def _complete(self, step: _Step) -> None:
        """Let the step's tokens out, grade, finish requests, and plan again."""
        now_s = self.kernel.now_s
        emitting = step.rows[step.emits]
        if len(emitting):
            before = step.outputs_before[step.emits]
            new = self._accept(emitting, step.drafts[step.emits])
            after = np.minimum(before + new, self._truth[emitting, 0])
            rows = self.table.rows
            rows["num_output_tokens"][emitting] = after
            rows["num_computed_tokens"][emitting] += after - before - 1
            rows["last_token_s"][emitting] = now_s
            first = before == 0
            if first.any():
                rows["first_token_s"][emitting[first]] = now_s
            if self._thinks:
                thinking = np.minimum(after, self._truth[emitting, 1])
                rows["num_thinking_tokens"][emitting] = thinking
                rows["is_thinking"][emitting] = after < self._truth[emitting, 1]
            self._grade(emitting, before, after, first)
        if self._on_step is not None:
            self._on_step(step.shape)
        self.kernel.schedule(now_s, Priority.PLAN, self._plan_and_run)

    def _accept(self, emitting: IntArray, drafts: IntArray) -> IntArray:
        """Return output tokens of each decode: one, and the draft tokens accepted before the first rejection."""
        new = np.ones(len(emitting), np.int64)
        if not drafts.any():
            return new
        classes = self.table.rows["class_index"][emitting]
        default = self.options.acceptance.get("", 0.0)
        chances = np.array([self.options.acceptance.get(name, default) for name in self.table.classes])[classes]
        with np.errstate(divide="ignore"):
            runs = np.log(self._draft_rng.random(len(emitting))) / np.log(chances)
        accepted = np.minimum(np.floor(np.minimum(runs, 1e9)), drafts).astype(np.int64)
        tested = np.minimum(accepted + 1, drafts)
        for class_index in np.unique(classes[drafts > 0]).tolist():
            counts = self._drafted.setdefault(self.table.classes[class_index], [0.0, 0.0])
            counts[0] += float(accepted[classes == class_index].sum())
            counts[1] += float(tested[classes == class_index].sum())
        return new + accepted

    def _grade(self, emitting: IntArray, before: IntArray, after: IntArray, first: BoolArray) -> None:
        """Feed the graders whose rule looks at one of these tokens; finish and re-predict lengths."""
        rows = self.table.rows
        now_s = self.kernel.now_s
        finished = after >= self._truth[emitting, 0]
        if self.options.exact_windows:
            feed = np.arange(len(emitting))
        else:
            looked_at = first | finished | (after // 10 > before // 10) | np.isfinite(rows["max_gap_s"][emitting])
            feed = np.flatnonzero(looked_at)
        for position, index in zip(feed.tolist(), emitting[feed].tolist(), strict=True):
            record = self._records[index]
            record.feed(now_s, int(after[position]))
            if record.grader.missed:
                rows["missed"][index] = 1
        if not self.options.known_lengths:
            longer = ~finished & (after >= rows["predicted_output_tokens"][emitting])
            for position in np.flatnonzero(longer).tolist():
                self._predict_again(int(emitting[position]), int(after[position]))
        if finished.any():
            for index in sorted(emitting[finished].tolist(), reverse=True):
                self._finish(index)

    def _predict_again(self, index: int, produced: int) -> None:
        request = self._records[index].sim.request
        self.table.rows["predicted_output_tokens"][index] = self.lengths.predict(
            request.slo_class,
            request.num_prompt_tokens,
            request.max_output_tokens,
            produced=produced,
            quantile=self.options.length_quantile,
        )

    def _finish(self, index: int) -> None:
        record = self._records[index]
        sim, request = record.sim, record.sim.request
        row = self.table.rows[index]
        self.pool.give(int(row["num_kv_blocks"]), sim.session_id, request.num_prompt_tokens + sim.num_output_tokens - 1)
        self._remove(index)
        self.lengths.observe(request.slo_class, request.num_prompt_tokens, sim.num_output_tokens)
        self._on_end(sim, record.finish(self.kernel.now_s, makes_promises=self.options.makes_promises))

    def _remove(self, index: int) -> None:
        """Forget a request; mirror how the table fills the hole."""
        last = len(self.table) - 1
        self.table.remove(self.table.request_ids[index])
        self._truth[index] = self._truth[last]
        self._records[index] = self._records[last]
        self._records.pop()

    def _claim_sessions(self, chosen: IntArray, rows: npt.NDArray[np.void]) -> None:
        if not self._sessions:
            return
        for index in chosen[rows["status"] == Status.WAITING].tolist():
            sim = self._records[index].sim
            if self._sessions.get(sim.session_id) == sim.request.request_id:
                del self._sessions[sim.session_id]
                self.pool.claim(sim.session_id)

    def _lose_sessions(self, lost: list[str]) -> None:
        for session_id in lost:
            request_id = self._sessions.pop(session_id, None)
            if request_id is not None and request_id in self.table:
                self.table.rows["num_cached_tokens"][self.table.index(request_id)] = 0

    def abandon(self) -> None:
        """Forget every live request: the run stops here."""
        while len(self.table):
            self._remove(len(self.table) - 1)
