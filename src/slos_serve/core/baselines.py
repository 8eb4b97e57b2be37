"""Other people's schedulers behind the `Planner` protocol: what we are compared with.

Each is a short rule over the same table the planner reads, and each makes no promises. What they share:
a request needs `num_prompt_tokens + num_output_tokens - num_computed_tokens` more tokens before its next
output token (less its prefix-cache hit where it has not started); a step has a token budget and at most
`max_num_seqs` requests; KV blocks are handed out in order, and when a running request finds none, the
last running request in that order loses its own (recompute). A waiting request enters only if its whole
sequence fits the free blocks, and nobody behind it enters before it.

`VllmPlanner` is today's vLLM (V1): running requests first, then waiting ones, first come first served,
prompts cut into chunks, with what 0.31 to 0.33 added to hold prompts back. `PriorityPlanner` orders both by
class priority. `WholePromptPlanner` is the older vLLM (V0): whole prompts first, decodes wait.
`SarathiPlanner` sets the budget to the most tokens whose step fits the tightest TPOT. `EdfPlanner` gives
prefill to the earliest deadline first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit
from slos_serve.core.perf import max_chunk_tokens
from slos_serve.core.types import BatchPlan, Plan, Status

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, ReplicaState, Rows

RUNNING = int(Status.RUNNING)
_NONE: IntArray = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Batch:
    """A batch: table rows, their tokens and drafts, who lost their blocks, and whether all of it is one decode each."""

    rows: IntArray
    tokens: IntArray
    drafts: IntArray
    preempted: IntArray
    is_steady: bool


def tokens_needed(rows: Rows) -> IntArray:
    """Return tokens each request must compute before its next output token, cache hits taken off."""
    hit = np.where(rows["num_computed_tokens"] == 0, rows["num_cached_tokens"], 0)
    needed: IntArray = rows["num_prompt_tokens"] + rows["num_output_tokens"] - rows["num_computed_tokens"] - hit
    return needed


def take_in_order(wanted: IntArray, budget: int) -> IntArray:
    """Hand out `budget` tokens in order, each at most what it wants; the last one may get a part."""
    before = np.cumsum(wanted) - wanted
    taken: IntArray = np.clip(budget - before, 0, wanted)
    return taken


@jit
def _start(rows: Rows, row: int) -> int:
    """Return the tokens that a request has computed, or will find in the cache."""
    computed: int = rows["num_computed_tokens"][row]
    return computed or int(rows["num_cached_tokens"][row])


@jit
def _needed(rows: Rows, row: int) -> int:
    """Return `tokens_needed` of one request."""
    return int(rows["num_prompt_tokens"][row] + rows["num_output_tokens"][row]) - _start(rows, row)


@jit
def _drafts(rows: Rows, row: int, draft_length: int) -> int:
    """Return the draft length of a request: fixed in decode, never past its last allowed token."""
    left = rows["max_output_tokens"][row] - rows["num_output_tokens"][row] - 1
    return min(draft_length, max(left, 0)) if _needed(rows, row) == 1 else 0


@jit
def by_arrival(rows: Rows) -> tuple[IntArray, IntArray]:
    """Return the rows of running and of waiting requests, each in order of arrival."""
    order = np.argsort(rows["seq"])
    running = rows["status"][order] == RUNNING
    return order[running], order[~running]


@jit
def wants(rows: Rows, order: IntArray, chunk_limit: int, draft_length: int) -> tuple[IntArray, IntArray]:
    """Return the tokens and the drafts that each request in `order` asks for."""
    answer = np.empty((2, len(order)), np.int64)
    for i in range(len(order)):
        answer[0, i] = min(_needed(rows, order[i]), chunk_limit)
        answer[1, i] = _drafts(rows, order[i], draft_length)
    return answer[0], answer[1]


@jit
def fill(
    rows: Rows,
    running: IntArray,
    wanted: IntArray,
    drafts: IntArray,
    waiting: IntArray,
    seats: int,
    budget: int,
    free: int,
    block_size: int,
    chunk_limit: int,
    whole: bool,
) -> tuple[IntArray, int, bool]:
    """Make a batch of the running and then, where none of them lost its blocks, of the waiting.

    `wanted` and `drafts` belong to `running`. Drafts count against the budget and need blocks. At most
    `seats` of the waiting start, each with at most `chunk_limit` tokens, or `whole`: with its prompt or not at
    all; the first that does not fit ends it. Returns the batch, shape (3, n): rows, tokens and drafts; how many
    of the running kept their blocks; and whether all that run decode one token and nobody starts.
    """
    count = len(running)
    batch = np.empty((3, count + len(waiting)), np.int64)
    given, extra = np.zeros(count, np.int64), np.zeros(count, np.int64)
    left, needed = budget, 0
    for i in range(count):
        given[i] = min(max(left, 0), wanted[i] + drafts[i])
        left -= given[i]
        if given[i] > 0:
            row = running[i]
            extra[i] = -(-(_start(rows, row) + given[i]) // block_size) - rows["num_kv_blocks"][row]
        needed += extra[i]
    alive = count
    if needed > free:
        alive, free = _preempt_from_end(rows, running, extra, free)
        left, needed = budget - given[:alive].sum(), extra[:alive].sum()
    free -= needed
    used, is_steady = 0, alive == count > 0
    for i in range(alive):
        if given[i] > 0:
            kept = min(drafts[i], given[i] - 1)
            batch[0, used], batch[1, used], batch[2, used] = running[i], given[i] - kept, kept
            used += 1
        is_steady = is_steady and given[i] == 1 and _needed(rows, running[i]) == 1
    if alive < count or left <= 0:
        return batch[:, :used], alive, is_steady
    for i in range(min(len(waiting), max(seats, 0))):
        row = waiting[i]
        start, tokens = _start(rows, row), _needed(rows, row)
        full = -(-(start + tokens) // block_size)
        if left <= 0 or full > free or (whole and tokens > left):
            break
        if not whole:
            tokens = min(tokens, chunk_limit, left)
        batch[0, used], batch[1, used], batch[2, used] = row, tokens, 0
        free -= -(-(start + tokens) // block_size)
        left -= tokens
        used += 1
        is_steady = False
    return batch[:, :used], alive, is_steady


@jit
def _preempt_from_end(rows: Rows, running: IntArray, extra: IntArray, free: int) -> tuple[int, int]:
    """Return how many requests (from the front) keep running, and the free blocks before they allocate."""
    alive, needed = len(extra), 0
    i = 0
    while i < alive:
        needed += extra[i]
        while needed > free and alive > i:
            alive -= 1
            free += rows["num_kv_blocks"][running[alive]]
            if alive == i:
                needed -= extra[i]
        i += 1
    return alive, free


def _make(
    state: ReplicaState,
    running: IntArray,
    wanted: IntArray,
    drafts: IntArray,
    waiting: IntArray,
    *,
    seats: int,
    budget: int,
    chunk_limit: int,
    whole: bool = False,
) -> _Batch:
    """Return the batch that `fill` makes."""
    rows, free, block_size = state.requests.rows, state.num_free_kv_blocks, state.limits.block_size
    batch, alive, is_steady = fill(
        rows, running, wanted, drafts, waiting, seats, budget, free, block_size, chunk_limit, whole
    )
    return _Batch(batch[0], batch[1], batch[2], running[alive:], is_steady)


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
    order = np.lexsort((rows["seq"], *reversed(keys)))
    running = rows["status"][order] == RUNNING
    return order[running], order[~running]


CHUNK_RULES = ("always", "shared", "adaptive")


@dataclass(slots=True)
class _Cadence:
    """What vLLM's prefill interval counts: steps, the last one with prompts, whether it left requests waiting.

    `chunked`: whose last share did not reach the end of the prompt, which a share of one token does not tell.
    """

    steps: int = 0
    last_prefill: int | None = None
    is_bound: bool = False
    chunked: set[str] = field(default_factory=set)

    def holds(self, interval: int) -> bool:
        """Tell whether prompts are held in the next step, where requests decode."""
        return not self.is_bound and self.last_prefill is not None and self.steps + 1 - self.last_prefill < interval

    def note(self, state: ReplicaState, batch: _Batch, needed: IntArray, *, held: bool, num_waiting: int) -> None:
        """Count a step; `num_waiting` requests waited before it."""
        ids, new = state.requests.request_ids, state.requests.rows["status"][batch.rows] != RUNNING
        self.steps += bool(len(batch.rows))
        if any(ids[i] in self.chunked for i in batch.rows[~new].tolist()) or (needed[batch.rows[new]] > 1).any():
            self.last_prefill = self.steps
        for i, tokens in zip(batch.rows.tolist(), batch.tokens.tolist(), strict=True):
            (self.chunked.add if tokens < needed[i] else self.chunked.discard)(ids[i])
        if not held and not len(batch.preempted):
            self.is_bound = num_waiting > int(new.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPlanner:
    """Today's vLLM: decodes and started prompts first, then waiting ones, first come first served.

    `chunk_limit` caps one request's prefill tokens in a step (long-prefill threshold). `chunk_rule` says when: `always`
    (0.29, 0.30), `shared` (from 0.31: not where a request is alone), `adaptive` (its flag: nor below an equal share of
    the budget). After a step with prompts the next comes `prefill_interval` steps later, while requests decode and
    none was left waiting (0.33). `max_num_seqs` may be set below the engine's own (0.31: active seats); `draft_length`
    is fixed. Requests are turned away from `max_num_queued_reqs` live ones, or `max_num_queued_tokens` tokens of
    prompts without a first token, on. Token counts; `ValueError` for an unknown rule or an interval below 1.
    """

    ignores_times: ClassVar[bool] = True

    token_budget: int = 2048
    draft_length: int = 0
    chunk_limit: int | None = None
    chunk_rule: str = "always"
    prefill_interval: int = 1
    max_num_seqs: int | None = None
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    _cadence: _Cadence = field(default_factory=_Cadence, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.chunk_rule not in CHUNK_RULES:
            raise ValueError(f"chunk_rule = {self.chunk_rule!r}: expected one of {', '.join(CHUNK_RULES)}")
        if self.prefill_interval < 1:
            raise ValueError(f"prefill_interval = {self.prefill_interval}: expected 1 or more steps")

    def for_replica(self) -> VllmPlanner:
        """Return a planner that counts the steps of one more replica."""
        return replace(self)

    def turns_away(self, rows: Rows) -> bool:
        """Tell whether a request that arrives now is refused, as vLLM's API server refuses: by what is live."""
        if self.max_num_queued_reqs is not None and len(rows) >= self.max_num_queued_reqs:
            return True
        if self.max_num_queued_tokens is None:
            return False
        return int(rows["num_prompt_tokens"][rows["num_output_tokens"] == 0].sum()) >= self.max_num_queued_tokens

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; no verdicts."""
        batch = self.batch(state, self.token_budget)
        # Who waits goes on waiting: seats and budget stay taken, and free blocks only get fewer.
        return _to_plan(state, batch, repeats=batch.is_steady)

    def batch(self, state: ReplicaState, token_budget: int) -> _Batch:
        """Return the next batch within a token budget."""
        limits, rows = state.limits, state.requests.rows
        running, waiting = self.order(state)
        budget = min(token_budget, limits.max_num_batched_tokens)
        chunk_limit = self._chunk_limit(budget, len(rows))
        wanted, drafts = wants(rows, running, chunk_limit, self.draft_length)
        most = limits.max_num_seqs if self.max_num_seqs is None else min(self.max_num_seqs, limits.max_num_seqs)
        seats = most - len(running)
        held, offered = False, waiting
        if self.prefill_interval > 1:
            is_chunk = np.array([state.requests.request_ids[i] in self._cadence.chunked for i in running], np.bool_)
            held = self._cadence.holds(self.prefill_interval) and not is_chunk.all()
            if held:
                wanted[is_chunk] = 0
                offered = waiting[: np.argmax(np.append(tokens_needed(rows)[waiting], 2) > 1)]
        batch = _make(state, running, wanted, drafts, offered, seats=seats, budget=budget, chunk_limit=chunk_limit)
        if self.prefill_interval > 1:
            self._cadence.note(state, batch, tokens_needed(rows), held=held, num_waiting=len(waiting))
            batch.is_steady = False  # each step counts
        return batch

    def _chunk_limit(self, budget: int, num_requests: int) -> int:
        """Return the most prefill tokens of one request in a step with so many live ones."""
        if self.chunk_limit is None or (self.chunk_rule != "always" and num_requests <= 1):
            return budget
        return max(self.chunk_limit, budget // num_requests) if self.chunk_rule == "adaptive" else self.chunk_limit

    def order(self, state: ReplicaState) -> tuple[IntArray, IntArray]:
        """Return the rows of running and waiting requests in service order."""
        return by_arrival(state.requests.rows)


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

    ignores_times: ClassVar[bool] = True

    token_budget: int = 2048
    draft_length: int = 0

    def plan(self, state: ReplicaState) -> Plan:
        """Return a batch of prompts, or one of decodes; no verdicts."""
        rows = state.requests.rows
        running, waiting = by_arrival(rows)
        budget = max(self.token_budget, state.limits.max_model_len)
        seats = state.limits.max_num_seqs - len(running)
        prompts = _make(state, _NONE, _NONE, _NONE, waiting, seats=seats, budget=budget, chunk_limit=budget, whole=True)
        if len(prompts.rows):
            return _to_plan(state, prompts)
        wanted, drafts = wants(rows, running, state.limits.max_model_len, self.draft_length)
        batch = _make(state, running, wanted, drafts, _NONE, seats=0, budget=budget, chunk_limit=budget)
        # A prompt that does not start now does not start while blocks get fewer.
        return _to_plan(state, batch, repeats=batch.is_steady)


@dataclass(frozen=True, slots=True, kw_only=True)
class SarathiPlanner(VllmPlanner):
    """Stall-free batching: the step holds the most tokens that fit the tightest TPOT of live requests.

    Decodes come first and are never cut; prompts fill the rest, first come first served. `token_budget`
    is the upper limit, `tpot_s` (seconds) replaces the tightest live TPOT where given.
    """

    ignores_times: ClassVar[bool] = False

    token_budget: int = 8192
    tpot_s: float | None = None

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; no verdicts."""
        rows = state.requests.rows
        tightest = float(np.minimum(rows["tpot_s"], rows["thinking_tpot_s"]).min()) if len(rows) else np.inf
        batch = self.batch(state, self._budget(state, tightest if self.tpot_s is None else self.tpot_s))
        # Where prompts wait, the budget, which falls with context, says whether they start.
        return _to_plan(state, batch, repeats=batch.is_steady and len(batch.rows) == len(rows))

    def _budget(self, state: ReplicaState, tpot_s: float) -> int:
        if not np.isfinite(tpot_s):
            return self.token_budget
        count, num_drafts, longest, context = decode_load(state.requests.rows, self.draft_length)
        base = count + num_drafts
        room = max_chunk_tokens(
            state.perf_model.as_array(),
            tpot_s,
            float(base),
            float(count + 1),
            float(context),
            float(longest),
            0.0,
            0.0,
        )
        return int(min(self.token_budget, base + max(room, 0.0 if count else 1.0)))


@jit
def decode_load(rows: Rows, draft_length: int) -> tuple[int, int, int, int]:
    """Return how many requests decode, their drafts in all and at most, and the tokens that they read."""
    count = num_drafts = longest = context = 0
    for row in range(len(rows)):
        if rows["status"][row] == RUNNING and _needed(rows, row) == 1:
            drafts = _drafts(rows, row, draft_length)
            count += 1
            num_drafts += drafts
            longest = max(longest, drafts)
            context += rows["num_computed_tokens"][row]
    return count, num_drafts, longest, context


@dataclass(frozen=True, slots=True, kw_only=True)
class EdfPlanner(VllmPlanner):
    """Earliest deadline first: decodes, then prompts by first-token deadline, late ones last.

    It has vLLM's budget, drafts and chunk limit, and none of its other settings: `ValueError`.
    """

    def __post_init__(self) -> None:
        if self.chunk_rule != "always" or self.prefill_interval != 1 or self.max_num_seqs is not None:
            raise ValueError("edf: expected no chunk_rule, prefill_interval or max_num_seqs, which are vLLM's")

    def plan(self, state: ReplicaState) -> Plan:
        """Return the next batch; a started prompt may be held for one that is due sooner; no verdicts."""
        rows = state.requests.rows
        due = np.where(rows["num_output_tokens"] > 0, -np.inf, rows["ttft_deadline_s"])
        late = (rows["missed"] > 0) | (due < state.now_s) & np.isfinite(due)
        running, waiting = _split(rows, late, due)
        budget = min(self.token_budget, state.limits.max_num_batched_tokens)
        limit = budget if self.chunk_limit is None else self.chunk_limit
        wanted, drafts = wants(rows, running, limit, self.draft_length)
        if len(waiting):
            needed = tokens_needed(rows)
            key = np.where(late, np.inf, due)
            sooner = int(np.minimum(needed[waiting], limit)[0]) if key[waiting[0]] < np.inf else 0
            held = (needed[running] != 1) & (key[running] > key[waiting[0]])
            room = max(0, budget - int(wanted[~held].sum()) - sooner)
            wanted[held] = take_in_order(wanted[held], room)
        seats = state.limits.max_num_seqs - len(running)
        batch = _make(state, running, wanted, drafts, waiting, seats=seats, budget=budget, chunk_limit=limit)
        return _to_plan(state, batch, repeats=batch.is_steady and not len(waiting))
