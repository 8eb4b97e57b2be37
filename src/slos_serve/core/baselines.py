"""Other people's schedulers behind the `Planner` protocol: what we are compared with.

Each is a short rule over the same table the planner reads, and each makes no promises. What they share:
a request needs `num_prompt_tokens + num_output_tokens - num_computed_tokens` more tokens before its next
output token (less its prefix-cache hit where it has not started); a step has a token budget and at most
`max_num_seqs` requests; KV blocks are handed out in order, and when a running request finds none, the
last running request in that order loses its own (recompute). A waiting request enters only if its whole
sequence fits the free blocks, and nobody behind it enters before it.

`VllmPlanner` is today's vLLM (V1): running requests first, then waiting ones, first come first served,
prompts cut into chunks. `PriorityPlanner` orders both by class priority. `WholePromptPlanner` is the
older vLLM (V0): whole prompts first, decodes wait. `SarathiPlanner` sets the budget to the most tokens
whose step fits the tightest TPOT. `EdfPlanner` gives prefill to the earliest deadline first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slos_serve.core.perf import max_chunk_tokens
from slos_serve.core.types import BatchPlan, Plan, Status

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, ReplicaState, Rows

BoolArray = npt.NDArray[np.bool_]
_NONE: IntArray = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Batch:
    """A batch in the making: table rows, their tokens and drafts, and who lost their blocks."""

    rows: IntArray
    tokens: IntArray
    drafts: IntArray
    preempted: IntArray
    free_blocks: int
    budget: int


def tokens_needed(rows: Rows) -> IntArray:
    """Return tokens each request must compute before its next output token, cache hits taken off."""
    hit = np.where(rows["num_computed_tokens"] == 0, rows["num_cached_tokens"], 0)
    needed: IntArray = rows["num_prompt_tokens"] + rows["num_output_tokens"] - rows["num_computed_tokens"] - hit
    return needed


def blocks_after(rows: Rows, num_tokens: IntArray, block_size: int) -> IntArray:
    """Return KV blocks each request holds once it has computed `num_tokens` more."""
    hit = np.where(rows["num_computed_tokens"] == 0, rows["num_cached_tokens"], 0)
    blocks: IntArray = -(-(rows["num_computed_tokens"] + hit + num_tokens) // block_size)
    return blocks


def take_in_order(wanted: IntArray, budget: int) -> IntArray:
    """Hand out `budget` tokens in order, each at most what it wants; the last one may get a part."""
    before = np.cumsum(wanted) - wanted
    taken: IntArray = np.clip(budget - before, 0, wanted)
    return taken


def _schedule_running(state: ReplicaState, order: IntArray, wanted: IntArray, drafts: IntArray, budget: int) -> _Batch:
    """Give running requests (in `order`) their tokens, preempting from the end where blocks run out.

    `wanted` and `drafts` belong to `order`. Drafts count against the budget and need blocks.
    """
    rows = state.requests.rows[order]
    tokens = take_in_order(wanted + drafts, budget)
    free = state.num_free_kv_blocks
    extra = np.where(tokens > 0, blocks_after(rows, tokens, state.limits.block_size) - rows["num_kv_blocks"], 0)
    alive = len(order)
    if int(extra.sum()) > free:
        alive, free = _preempt_from_end(extra, rows["num_kv_blocks"], free)
        tokens[alive:] = 0
        extra[alive:] = 0
    free -= int(extra[:alive].sum())
    chosen = np.flatnonzero(tokens[:alive] > 0)
    given = tokens[chosen]
    kept_drafts = np.minimum(drafts[chosen], given - 1)
    return _Batch(order[chosen], given - kept_drafts, kept_drafts, order[alive:], free, budget - int(given.sum()))


def _preempt_from_end(extra: IntArray, held: IntArray, free: int) -> tuple[int, int]:
    """Return how many requests (from the front) keep running, and the free blocks before they allocate."""
    alive, needed = len(extra), 0
    i = 0
    while i < alive:
        needed += int(extra[i])
        while needed > free and alive > i:
            alive -= 1
            free += int(held[alive])
            if alive == i:
                needed -= int(extra[i])
        i += 1
    return alive, free


def _admit_waiting(
    state: ReplicaState, batch: _Batch, order: IntArray, num_running: int, *, chunk_limit: int, whole: bool = False
) -> None:
    """Add waiting requests in `order` while tokens, blocks and seats last; stop at the first that does not fit.

    `whole`: a prompt must fit the budget that is left, chunks are not cut.
    """
    limits = state.limits
    rows = state.requests.rows[order[: max(0, limits.max_num_seqs - num_running)]]
    if not len(rows) or batch.budget <= 0:
        return
    needed = tokens_needed(rows)
    full_blocks = blocks_after(rows, needed, limits.block_size)
    fits_blocks = np.cumsum(full_blocks) <= batch.free_blocks if whole else full_blocks <= batch.free_blocks
    wanted = needed if whole else np.minimum(needed, chunk_limit)
    first_blocks = blocks_after(rows, wanted, limits.block_size)
    taken_tokens, taken_blocks, admitted = 0, 0, []
    for i in range(len(rows)):
        left = batch.budget - taken_tokens
        tokens = int(wanted[i])
        if left <= 0 or not fits_blocks[i] or int(full_blocks[i]) > batch.free_blocks - taken_blocks:
            break
        if tokens > left:
            if whole:
                break
            tokens = left
        admitted.append(tokens)
        taken_tokens += tokens
        taken_blocks += int(first_blocks[i])
    count = len(admitted)
    batch.rows = np.concatenate([batch.rows, order[:count]])
    batch.tokens = np.concatenate([batch.tokens, np.array(admitted, np.int64)])
    batch.drafts = np.concatenate([batch.drafts, np.zeros(count, np.int64)])
    batch.free_blocks -= taken_blocks
    batch.budget -= taken_tokens


def _to_plan(state: ReplicaState, batch: _Batch, *, repeats: bool = False) -> Plan:
    """Name the rows of a finished batch."""
    ids = state.requests.request_ids
    return Plan(
        batch=BatchPlan(
            request_ids=[ids[i] for i in batch.rows.tolist()],
            num_tokens=batch.tokens,
            draft_lengths=batch.drafts,
            preempted=[ids[i] for i in batch.preempted.tolist()],
        ),
        work=len(ids),
        repeats=repeats,
    )


def _split(rows: Rows, *keys: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray]:
    """Return rows of running and of waiting requests, each sorted by `keys` (first one counts most), then arrival."""
    order = np.lexsort((rows["seq"], *reversed(keys))) if keys else np.argsort(rows["seq"], kind="stable")
    running = rows["status"][order] == Status.RUNNING
    return order[running], order[~running]


def _drafts(rows: Rows, needed: IntArray, draft_length: int) -> IntArray:
    """Return the draft length of each request: fixed in decode, never past its last allowed token."""
    left = rows["max_output_tokens"] - rows["num_output_tokens"] - 1
    lengths: IntArray = np.where(needed == 1, np.clip(draft_length, 0, np.maximum(left, 0)), 0)
    return lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPlanner:
    """Today's vLLM: decodes and started prompts first, then waiting ones, first come first served.

    `chunk_limit` caps one request's prefill tokens in a step (long-prefill threshold), `draft_length` is
    fixed, `max_num_seqs` may be set below the engine's own. Token counts.
    """

    token_budget: int = 2048
    draft_length: int = 0
    chunk_limit: int | None = None
    max_num_seqs: int | None = None

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; no verdicts."""
        running, waiting = self.order(state)
        budget = min(self.token_budget, state.limits.max_num_batched_tokens)
        limit = budget if self.chunk_limit is None else self.chunk_limit
        rows = state.requests.rows[running]
        needed = tokens_needed(rows)
        drafts = _drafts(rows, needed, self.draft_length)
        batch = _schedule_running(state, running, np.minimum(needed, limit), drafts, budget)
        seats_taken = len(running)
        if self.max_num_seqs is not None:
            seats_taken += max(0, state.limits.max_num_seqs - self.max_num_seqs)
        if not len(batch.preempted) and len(waiting):
            _admit_waiting(state, batch, waiting, seats_taken, chunk_limit=limit)
        # Who waits goes on waiting: seats and budget stay taken, and free blocks only get fewer.
        repeats = len(running) == len(batch.rows) > 0 and not drafts.any() and bool((needed == 1).all())
        return _to_plan(state, batch, repeats=repeats and not len(batch.preempted))

    def order(self, state: ReplicaState) -> tuple[IntArray, IntArray]:
        """Return the rows of running and waiting requests in service order."""
        return _split(state.requests.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityPlanner(VllmPlanner):
    """vLLM's priority policy: smaller number sooner, victims from the other end.

    `priorities` maps class names; a class without one ranks after those, by its TPOT (tight first).
    """

    priorities: Mapping[str, int] = field(default_factory=dict)

    def order(self, state: ReplicaState) -> tuple[IntArray, IntArray]:
        """Return the rows of running and waiting requests by class priority, then arrival."""
        rows = state.requests.rows
        last = max(self.priorities.values(), default=0) + 1
        by_class = np.array([self.priorities.get(name, last) for name in state.requests.classes], np.int64)
        rank = by_class[rows["class_index"]] if len(rows) else _NONE
        return _split(rows, rank, np.where(rank == last, rows["tpot_s"], 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class WholePromptPlanner:
    """The older vLLM: while a whole prompt fits, run prompts alone; decode only otherwise.

    `token_budget` bounds the prompts of one step, and is never less than the longest allowed sequence.
    """

    token_budget: int = 2048
    draft_length: int = 0

    def plan(self, state: ReplicaState) -> Plan:
        """Return a batch of prompts, or one of decodes; no verdicts."""
        running, waiting = _split(state.requests.rows)
        budget = max(self.token_budget, state.limits.max_model_len)
        prompts = _Batch(_NONE, _NONE, _NONE, _NONE, state.num_free_kv_blocks, budget)
        if len(waiting):
            _admit_waiting(state, prompts, waiting, len(running), chunk_limit=budget, whole=True)
        if len(prompts.rows):
            return _to_plan(state, prompts)
        rows = state.requests.rows[running]
        needed = tokens_needed(rows)
        drafts = _drafts(rows, needed, self.draft_length)
        return _to_plan(state, _schedule_running(state, running, needed, drafts, budget))


@dataclass(frozen=True, slots=True, kw_only=True)
class SarathiPlanner(VllmPlanner):
    """Stall-free batching: the step holds the most tokens that fit the tightest TPOT of live requests.

    Decodes come first and are never cut; prompts fill the rest, first come first served. `token_budget`
    is the upper limit, `tpot_s` (seconds) replaces the tightest live TPOT where given.
    """

    token_budget: int = 8192
    tpot_s: float | None = None

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; no verdicts."""
        rows = state.requests.rows
        tightest = float(np.minimum(rows["tpot_s"], rows["thinking_tpot_s"]).min()) if len(rows) else np.inf
        budget = self._budget(state, tightest if self.tpot_s is None else self.tpot_s)
        limited = VllmPlanner(
            token_budget=budget,
            draft_length=self.draft_length,
            chunk_limit=self.chunk_limit,
            max_num_seqs=self.max_num_seqs,
        )
        plan = limited.plan(state)
        # Where prompts wait, the budget, which falls with context, says whether they start.
        repeats = plan.repeats and bool((rows["status"] == Status.RUNNING).all())
        return plan if repeats == plan.repeats else replace(plan, repeats=repeats)

    def _budget(self, state: ReplicaState, tpot_s: float) -> int:
        rows = state.requests.rows
        running = rows[rows["status"] == Status.RUNNING]
        decodes = running[tokens_needed(running) == 1]
        drafts = _drafts(decodes, np.ones(len(decodes), np.int64), self.draft_length)
        base = len(decodes) + int(drafts.sum())
        if not np.isfinite(tpot_s):
            return self.token_budget
        room = max_chunk_tokens(
            state.perf_model.as_array(),
            tpot_s,
            float(base),
            float(len(decodes) + 1),
            float(decodes["num_computed_tokens"].sum()),
            float(drafts.max(initial=0)),
            0.0,
            0.0,
        )
        return int(min(self.token_budget, base + max(room, 0.0 if len(decodes) else 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EdfPlanner(VllmPlanner):
    """Earliest deadline first: decodes, then prompts by first-token deadline, late ones last."""

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; a started prompt may be held for one that is due sooner; no verdicts."""
        rows = state.requests.rows
        needed = tokens_needed(rows)
        due = np.where(rows["num_output_tokens"] > 0, -np.inf, rows["ttft_deadline_s"])
        late = (rows["missed"] > 0) | (due < state.now_s) & np.isfinite(due)
        running, waiting = _split(rows, late, due)
        budget = min(self.token_budget, state.limits.max_num_batched_tokens)
        limit = budget if self.chunk_limit is None else self.chunk_limit
        wanted = np.minimum(needed[running], limit)
        is_decode = needed[running] == 1
        if len(waiting):
            key = np.where(late, np.inf, due)
            sooner = int(np.minimum(needed[waiting], limit)[0]) if key[waiting[0]] < np.inf else 0
            held = ~is_decode & (key[running] > key[waiting[0]])
            room = max(0, budget - int(wanted[~held].sum()) - sooner)
            wanted[held] = take_in_order(wanted[held], room)
        drafts = np.where(is_decode, _drafts(rows[running], needed[running], self.draft_length), 0)
        batch = _schedule_running(state, running, wanted, drafts, budget)
        if not len(batch.preempted) and len(waiting):
            _admit_waiting(state, batch, waiting, len(running), chunk_limit=limit)
        repeats = len(running) == len(rows) == len(batch.rows) and bool(is_decode.all()) and not drafts.any()
        return _to_plan(state, batch, repeats=repeats and not len(batch.preempted))
