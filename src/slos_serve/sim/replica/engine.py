"""What an engine does with a plan: cut it to what can run, hand out KV blocks, start the batch.

The rules are those of vLLM's own scheduler, because the plug-in can only steer it: a request computes no
more tokens than it needs, a step no more than its budget, seats are limited, a waiting request enters
only after running ones have their blocks. Blocks go out in plan order; a running request that finds none
makes the engine preempt from the end of its order (held requests last) and admit nobody in that step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slos_serve.core.types import RequestTable, Status
from slos_serve.sim.replica import loops
from slos_serve.sim.replica.kvpool import KvPool

if TYPE_CHECKING:
    from slos_serve.core.types import BatchPlan, IntArray, Limits, Request

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class Step:
    """A batch on its way: table rows, the batch and its totals (see `loops`).

    `gone_tokens` were computed for requests that had ended meanwhile.
    """

    rows: IntArray
    batch: IntArray
    totals: list[float]
    gone_tokens: int = 0


class Engine:
    """Live requests, their KV blocks, and the rules of one step."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.table = RequestTable()
        self.pool = KvPool(limits.num_kv_blocks, limits.block_size)
        self.num_preemptions = 0
        self.num_cut_plans = 0  # plans that could not run as they were
        self._room = np.array(
            (limits.block_size, limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs, 0), np.int64
        )
        self._prefix_of: dict[str, str] = {}  # waiting request -> session whose cached prefix it counts on

    def room(self) -> IntArray:
        """Return what `loops` must know of limits: block size, longest sequence, token budget, seats, free blocks."""
        self._room[loops.FREE_BLOCKS] = self.pool.num_free
        return self._room

    def add(self, request: Request, *, cached_tokens: int, session_id: str) -> int:
        """Queue a request and return its row; a session's prefix counts as far as it is still cached."""
        index = self.table.add(request)
        if session_id and cached_tokens:
            cached_tokens = min(cached_tokens, self.pool.cached_tokens(session_id))
            self._prefix_of[request.request_id] = session_id
        self.table.rows["num_cached_tokens"][index] = min(cached_tokens, request.num_prompt_tokens - 1)
        return index

    def continue_decode(self, index: int, *, first_token_s: float, num_thinking_tokens: int) -> None:
        """Make the waiting request `index` one whose KV came from elsewhere with its first token."""
        row = self.table.rows[index]
        row["num_output_tokens"] = 1
        row["num_cached_tokens"] = row["num_prompt_tokens"]
        row["num_thinking_tokens"] = min(1, num_thinking_tokens)
        row["is_thinking"] = int(num_thinking_tokens > 1)
        row["first_token_s"] = row["last_token_s"] = first_token_s

    def withdraw(self, index: int, session_id: str = "") -> None:
        """Take back what a request holds before its row is removed; what it computed stays in its session's prefix."""
        row = self.table.rows[index]
        if row["num_computed_tokens"]:
            self.pool.give(int(row["num_kv_blocks"]), session_id, int(row["num_computed_tokens"]))
        self._prefix_of.pop(self.table.request_ids[index], None)

    def preempt(self, index: int) -> None:
        """Take a running request's blocks and make it wait; its tokens are kept."""
        row = self.table.rows[index]
        if row["status"] != Status.RUNNING:
            return
        self.pool.give(int(row["num_kv_blocks"]))
        row["num_kv_blocks"] = 0
        row["num_computed_tokens"] = 0
        row["num_cached_tokens"] = 0
        row["status"] = Status.WAITING
        self.num_preemptions += 1

    def start(self, batch: BatchPlan) -> Step | None:
        """Cut a batch to what can run, allocate, and start it; None if nothing is left of it.

        Requests that are no longer live are dropped, and their tokens counted.
        """
        table = self.table
        for request_id in batch.preempted:
            if request_id in table:
                self.preempt(table.index(request_id))
        chosen, tokens, drafts = table.find(batch.request_ids), batch.num_tokens, batch.draft_lengths
        fits, started, totals = loops.start_rows(chosen, tokens, drafts, table.rows, self.room())
        if not fits:
            return self._start_in_part(chosen, tokens, drafts)
        if not len(chosen):
            return None
        self._allocate(chosen if totals[loops.NUM_NEW] else chosen[:0], int(totals[loops.SUM_BLOCKS]))
        return Step(chosen, started, totals.tolist())

    def _start_in_part(self, chosen: IntArray, tokens: IntArray, drafts: IntArray) -> Step | None:
        """Start what can run of a batch that does not simply fit."""
        kept = np.flatnonzero(chosen >= 0)
        gone_tokens = int((tokens + drafts).sum() - (tokens + drafts)[kept].sum())
        if not len(kept):
            return None
        chosen, tokens, drafts = chosen[kept], tokens[kept], drafts[kept]
        live = self.table.rows
        rows = live[chosen]
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
            chosen, rows, start, needed = chosen[kept], rows[kept], start[kept], needed[kept]
            tokens, drafts, extra = tokens[kept], drafts[kept], extra[kept]
        self._allocate(chosen, int(extra.sum()))
        emits = tokens == needed
        live["num_kv_blocks"][chosen] = rows["num_kv_blocks"] + extra
        live["status"][chosen] = Status.RUNNING
        live["num_computed_tokens"][chosen] = start + tokens
        live["num_output_tokens"][chosen] = rows["num_output_tokens"] + emits
        started = np.stack([start, tokens, drafts, emits, needed == 1, rows["num_output_tokens"]])
        return Step(chosen, started, loops.add_up(started).tolist(), gone_tokens)

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
            seats = limits.max_num_seqs - int((self.table.rows["status"] == Status.RUNNING).sum())
            tokens = np.where(new & (np.cumsum(new) > seats), 0, tokens)
        return tokens, drafts

    def _fit_blocks(self, chosen: IntArray, rows: npt.NDArray[np.void], tokens: IntArray, extra: IntArray) -> IntArray:
        """Hand out blocks as the engine does: running first, preempting from its end, then waiting ones."""
        tokens = tokens.copy()
        live = self.table.rows
        is_running = rows["status"] == Status.RUNNING
        held = np.setdiff1d(np.flatnonzero(live["status"] == Status.RUNNING), chosen)
        held = held[np.argsort(live["seq"][held])]
        order = [(int(chosen[i]), i) for i in np.flatnonzero(is_running).tolist()]
        order += [(row, -1) for row in held.tolist()]
        free, admits, position = self.pool.num_free, True, 0
        while position < len(order):
            i = order[position][1]
            if i >= 0 and tokens[i] > 0:
                while int(extra[i]) > free and len(order) > position:
                    victim_row, victim = order.pop()
                    free += int(live["num_kv_blocks"][victim_row])
                    self.preempt(victim_row)
                    admits = False
                    if victim >= 0:
                        tokens[victim] = 0
                if len(order) > position:
                    free -= int(extra[i])
            position += 1
        for i in np.flatnonzero(~is_running & (tokens > 0)).tolist():
            admits = admits and int(extra[i]) <= free
            if admits:
                free -= int(extra[i])
            else:
                tokens[i] = 0
        return tokens

    def _allocate(self, chosen: IntArray, num_blocks: int) -> None:
        """Take blocks for a batch; prefixes in use are no longer idle."""
        if self._prefix_of:
            for index in chosen.tolist():
                session_id = self._prefix_of.pop(self.table.request_ids[index], None)
                if session_id is not None:
                    self.pool.claim(session_id)
        self.take(num_blocks)

    def take(self, num_blocks: int) -> None:
        """Take blocks of the pool; who counted on a prefix that is lost by that computes it again."""
        lost = self.pool.take(num_blocks)
        if lost:
            for request_id in [name for name, session_id in self._prefix_of.items() if session_id in lost]:
                del self._prefix_of[request_id]
                self.table.rows["num_cached_tokens"][self.table.index(request_id)] = 0
