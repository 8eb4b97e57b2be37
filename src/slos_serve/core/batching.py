"""Batches that an engine can execute: which decodes join, how many prefill tokens fit, when it ends.

Theory of operation. A batch is not preempted, so its end is what everything depends on. It must end by
the earliest time at which a live decode owes a token, and by the earliest prefill deadline that it could
still meet. Up to that limit a longer batch is a better one, because it pays the fixed cost of a step
once. Inside the limit

1. a decode joins when its token would be late in the *next* batch (decodes due within one shortest
   period after the limit), or when so many are due in one later batch that they would not fit there;
2. prefill chunks fill what is left, earliest deadline first;
3. the remaining decodes join where room is free, earliest due first. In `eager` mode they come before
   the prefill chunks: tokens ahead of schedule are slack that later, longer batches can spend.

`simulate` repeats this until every prefill is done and says whether a deadline is missed, so one piece
of code both judges a set of promises and makes the batch that is executed.

Speculative decoding changes two numbers per request: a decode verifies `verify` tokens and is expected
to yield `gain` of them, so its period is `gain * tpot`. Autoregressive is `verify = gain = 1`.

Everything here works on a `Demand`: parallel arrays, one entry per request, in order of prefill deadline.
Times are seconds, already reduced by the guard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds, max_chunk_tokens

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray

EPS_S = 1e-9

SMOOTHING_WINDOWS = 8


@dataclass(slots=True, kw_only=True)
class Demand:
    """What each request still needs, as arrays of one length in order of (deadline, seq).

    `left`: prompt tokens still to prefill, 0 in decode. `context`: tokens computed so far. `deadline`:
    when the prefill must be done (inf: never promised). `due`: when the next decode token is owed (inf
    while prefilling or where nothing is owed). `tpot`: seconds per token (inf: none); `gap`: longest
    silence (inf: none). `verify`, `gain`: see the module's text. `output_left`: predicted output tokens
    still to come. `held`: KV blocks held; `start`: blocks that must be free before the first chunk of a
    request that holds none. `value`: weight of a candidate. `required`: 1 where promised already.
    """

    left: FloatArray
    context: FloatArray
    deadline: FloatArray
    due: FloatArray
    tpot: FloatArray
    gap: FloatArray
    verify: FloatArray
    gain: FloatArray
    output_left: FloatArray
    held: FloatArray
    start: FloatArray
    value: FloatArray
    required: IntArray

    def __len__(self) -> int:
        return len(self.left)

    def take(self, index: IntArray) -> Demand:
        """Return a new demand with the entries at `index`, in that order."""
        return Demand(**{column.name: getattr(self, column.name)[index] for column in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one engine step may hold; `lines` as in `perf`, `max_batch_s` bounds a batch with prefill."""

    lines: FloatArray
    margin_prefill: float
    margin_decode: float
    token_budget: int
    max_seqs: int
    block_size: int
    free_blocks: float
    max_batch_s: float = math.inf
    phase_is_gain: bool = False


@jit
def _pulled_forward(due, decoding, tokens, pace, verify, limit, period, capacity):  # type: ignore[no-untyped-def]
    """Return how many tokens due in later windows must run now, because later batches could not hold them.

    Windows of one shortest `period` follow the batches after this one. A request in this batch (`tokens`
    above 0) comes back every `pace`; the others begin at `due`.
    """
    windows = np.zeros(SMOOTHING_WINDOWS)
    begin = limit + period
    for i in range(due.shape[0]):
        if decoding[i]:
            at = due[i] if tokens[i] == 0.0 else due[i] + pace[i]
            while at < begin + SMOOTHING_WINDOWS * period:
                windows[max(0, int((at - begin) / period))] += verify[i]
                at += max(pace[i], period)
    carried = 0.0
    for w in range(SMOOTHING_WINDOWS - 1, -1, -1):
        carried = max(0.0, windows[w] + carried - capacity)
    return carried


@jit
def compose(  # type: ignore[no-untyped-def]
    lines,
    margin_prefill,
    margin_decode,
    token_budget,
    max_seqs,
    free_blocks,
    max_batch_s,
    eager,
    now,
    left,
    context,
    deadline,
    due,
    tpot,
    verify,
    gain,
    output_left,
    held,
    start,
    tokens,
    totals,
):
    """Fill `tokens` (new tokens by request, 0 = not in the batch) and return when the batch ends.

    `totals` receives tokens, requests, context, draft steps, pairs, has_prefill and the limit.
    """
    n = left.shape[0]
    tokens[:] = 0.0
    earliest = math.inf
    period = math.inf
    first_deadline = math.inf
    num_started = 0
    num_decoding = 0
    decoding = np.zeros(n, np.bool_)
    any_prefill = False
    total_verify = 0.0
    for i in range(n):
        if left[i] > 0.0:
            if held[i] > 0.0:
                num_started += 1
            any_prefill = True
            if deadline[i] < first_deadline and deadline[i] > now:
                first_deadline = deadline[i]
        elif output_left[i] > 0.0:
            num_started += 1
            num_decoding += 1
            total_verify += verify[i]
            decoding[i] = True
            earliest = min(earliest, due[i])
            period = min(period, gain[i] * tpot[i])
    margin = margin_prefill if any_prefill else margin_decode
    limit = min(earliest, now + max_batch_s)
    if first_deadline < limit:
        limit = first_deadline

    # 1. decodes that would be late in the next batch
    num_tokens = 0.0
    num_requests = 0.0
    context_tokens = 0.0
    steps = 0.0
    for i in range(n):
        if decoding[i] and due[i] < limit + period and num_tokens + verify[i] <= token_budget:
            tokens[i] = verify[i]
            num_tokens += verify[i]
            num_requests += 1.0
            context_tokens += context[i]
            steps = max(steps, verify[i])
    seconds = min((limit - now) / margin, 1e9)
    waiting = num_decoding - num_requests
    order = np.empty(0, np.int64)
    sorted_due = False
    position = 0
    if waiting > 0 and math.isfinite(period) and math.isfinite(limit):
        per_batch = max_chunk_tokens(lines, period / margin, 0.0, 0.0, context_tokens, steps, 0.0, 0.0)
        per_batch = min(per_batch, token_budget)
        pull = 0.0
        if total_verify > per_batch:
            pull = _pulled_forward(due, decoding, tokens, gain * tpot, verify, limit, period, max(1.0, per_batch))
        if pull > 0.0:
            order = np.argsort(due)
            sorted_due = True
            while position < n and pull > 0.0:
                i = order[position]
                position += 1
                if decoding[i] and tokens[i] == 0.0:
                    after = batch_seconds(
                        lines,
                        num_tokens + verify[i],
                        num_requests + 1.0,
                        context_tokens + context[i],
                        max(steps, verify[i]),
                        0.0,
                    )
                    if after > seconds or num_tokens + verify[i] > token_budget:
                        break
                    tokens[i] = verify[i]
                    num_tokens += verify[i]
                    num_requests += 1.0
                    context_tokens += context[i]
                    steps = max(steps, verify[i])
                    waiting -= 1
                    pull -= verify[i]

    pairs = 0.0
    has_prefill = False
    for turn in range(2):
        if (turn == 0) == eager:
            # 3. decodes where room is free
            if waiting > 0:
                if not sorted_due:
                    order = np.argsort(due)
                    sorted_due = True
                while position < n and waiting > 0:
                    i = order[position]
                    position += 1
                    if decoding[i] and tokens[i] == 0.0:
                        after = batch_seconds(
                            lines,
                            num_tokens + verify[i],
                            num_requests + 1.0,
                            context_tokens + context[i],
                            max(steps, verify[i]),
                            pairs,
                        )
                        if after > seconds or num_tokens + verify[i] > token_budget:
                            break
                        tokens[i] = verify[i]
                        num_tokens += verify[i]
                        num_requests += 1.0
                        context_tokens += context[i]
                        steps = max(steps, verify[i])
                        waiting -= 1
        elif any_prefill:
            # 2. prefill chunks, earliest deadline first
            for i in range(n):
                if left[i] <= 0.0:
                    continue
                if num_tokens >= token_budget:
                    break
                if held[i] == 0.0 and (start[i] > free_blocks or num_started >= max_seqs):
                    continue
                room = max_chunk_tokens(
                    lines, seconds, num_tokens, num_requests + 1.0, context_tokens, steps, pairs, context[i]
                )
                chunk = math.floor(min(room + 1e-6, left[i], token_budget - num_tokens))
                if chunk < 1.0:
                    break
                tokens[i] = chunk
                num_tokens += chunk
                num_requests += 1.0
                pairs += chunk * (context[i] + 0.5 * chunk)
                has_prefill = True
                if held[i] == 0.0:
                    free_blocks -= start[i]
                    num_started += 1
    totals[0] = num_tokens
    totals[1] = num_requests
    totals[2] = context_tokens
    totals[3] = steps
    totals[4] = pairs
    totals[5] = 1.0 if has_prefill else 0.0
    totals[6] = limit
    if num_tokens == 0.0:
        return now
    margin = margin_prefill if has_prefill else margin_decode
    return now + margin * batch_seconds(lines, num_tokens, num_requests, context_tokens, steps, pairs)


# How a simulation ends.
KEPT, MISSED, STUCK, CUT_OFF, FULL = 0, 1, 2, 3, 4


@jit
def run(  # type: ignore[no-untyped-def]
    lines,
    margin_prefill,
    margin_decode,
    token_budget,
    max_seqs,
    block_size,
    free_blocks,
    max_batch_s,
    phase_is_gain,
    eager,
    now,
    until,
    max_work,
    left,
    context,
    deadline,
    due,
    tpot,
    gap,
    verify,
    gain,
    output_left,
    held,
    start,
    finished_at,
    log_tokens,
    log_end,
):
    """Run batches until every prefill is done and `until` is past, or a deadline is missed.

    Arrays from `left` on are working copies and are changed. Returns (outcome, entry that missed, end
    time, batches, work). `finished_at` receives the time each prefill ends. With room in `log_tokens`
    (batches, requests) the batches are written down.
    """
    n = left.shape[0]
    tokens = np.zeros(n)
    totals = np.zeros(7)
    work = 0
    batch = 0
    free = free_blocks
    while True:
        open_prefill = False
        for i in range(n):
            if left[i] > 0.0:
                open_prefill = True
                break
        if not open_prefill and now >= until:
            return KEPT, -1, now, batch, work
        work += n + 8
        if work > max_work:
            return CUT_OFF, -1, now, batch, work
        end = compose(
            lines,
            margin_prefill,
            margin_decode,
            token_budget,
            max_seqs,
            free,
            max_batch_s,
            eager,
            now,
            left,
            context,
            deadline,
            due,
            tpot,
            verify,
            gain,
            output_left,
            held,
            start,
            tokens,
            totals,
        )
        if end <= now:
            # Nothing fits: a prefill that no deadline limits may still run once the limit is past.
            for i in range(n):
                if left[i] > 0.0:
                    return STUCK, i, now, batch, work
            return KEPT, -1, now, batch, work
        if batch < log_tokens.shape[0]:
            log_tokens[batch, :] = tokens
            log_end[batch] = end
        for i in range(n):
            if tokens[i] == 0.0:
                if (left[i] > 0.0 and deadline[i] < end - EPS_S) or (
                    left[i] == 0.0 and output_left[i] > 0.0 and due[i] < end - EPS_S
                ):
                    return MISSED, i, end, batch, work
                continue
            if left[i] > 0.0:
                if held[i] == 0.0:
                    held[i] = start[i]
                    free -= start[i]
                left[i] -= tokens[i]
                context[i] += tokens[i]
                if left[i] <= 0.0:
                    left[i] = 0.0
                    finished_at[i] = end
                    if end > deadline[i] + EPS_S:
                        return MISSED, i, end, batch, work
                    origin = end
                    if math.isfinite(deadline[i]):
                        origin = max(deadline[i], end)
                    due[i] = origin + tpot[i] * (gain[i] if phase_is_gain else 1.0)
                    due[i] = min(due[i], end + gap[i])
                    output_left[i] -= 1.0
                elif deadline[i] < end - EPS_S:
                    return MISSED, i, end, batch, work
            else:
                if due[i] < end - EPS_S:
                    return MISSED, i, end, batch, work
                due[i] = min(due[i] + gain[i] * tpot[i], end + gap[i])
                context[i] += gain[i]
                output_left[i] -= gain[i]
                if held[i] > 0.0:
                    held[i] += gain[i] / block_size
                    free -= gain[i] / block_size
            if left[i] == 0.0 and output_left[i] <= 0.0:
                free += held[i]
                held[i] = 0.0
                due[i] = math.inf
        if free < -EPS_S:
            return FULL, -1, end, batch, work
        now = end
        batch += 1


@dataclass(slots=True)
class Effort:
    """What is left of the work limit of one plan."""

    limit: int
    spent: int = 0

    @property
    def left(self) -> int:
        """Return the work still allowed."""
        return max(0, self.limit - self.spent)


def _empty() -> FloatArray:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What simulating a set of promises showed."""

    outcome: int
    missed: int
    finished_at: FloatArray
    log_tokens: FloatArray = field(default_factory=_empty)
    log_end: FloatArray = field(default_factory=_empty)

    @property
    def kept(self) -> bool:
        """Tell whether every deadline was met."""
        return self.outcome == KEPT


def simulate(
    demand: Demand,
    capacity: Capacity,
    now_s: float,
    effort: Effort,
    *,
    eager: bool,
    margin: bool,
    log_batches: int = 0,
    until_s: float | None = None,
) -> Trial:
    """Run `demand` to the end of its prefills and past its last deadline, batch by batch."""
    finite = demand.deadline[np.isfinite(demand.deadline) & (demand.left > 0)]
    until = float(finite.max()) if finite.size else now_s
    if until_s is not None:
        until = until_s
    log_tokens, log_end = np.zeros((log_batches, len(demand))), np.zeros(log_batches)
    finished_at = np.full(len(demand), math.inf)
    outcome, missed, end, batches, work = run(
        capacity.lines,
        capacity.margin_prefill if margin else 1.0,
        capacity.margin_decode if margin else 1.0,
        capacity.token_budget,
        capacity.max_seqs,
        float(capacity.block_size),
        capacity.free_blocks,
        capacity.max_batch_s,
        capacity.phase_is_gain,
        eager,
        now_s,
        until,
        effort.left,
        demand.left.copy(),
        demand.context.copy(),
        demand.deadline,
        demand.due.copy(),
        demand.tpot,
        demand.gap,
        demand.verify,
        demand.gain,
        demand.output_left.copy(),
        demand.held.copy(),
        demand.start,
        finished_at,
        log_tokens,
        log_end,
    )
    effort.spent += work
    return Trial(
        outcome=outcome,
        missed=missed,
        finished_at=finished_at,
        log_tokens=log_tokens[:batches],
        log_end=log_end[:batches],
    )


@jit
def fill(  # type: ignore[no-untyped-def]
    lines,
    margin_prefill,
    margin_decode,
    token_budget,
    free_seqs,
    free_blocks,
    block_size,
    seconds,
    left,
    context,
    verify,
    held,
    tokens,
    totals,
):
    """Fill what a composed batch leaves with requests that hold no promise, in the order given.

    `seconds`: how long the whole batch may take. Decodes have `left` 0. `held`: KV blocks held now. Adds
    to `totals` (as in `compose`) and writes `tokens`; returns the time of the whole batch in seconds,
    margin included.
    """
    for i in range(left.shape[0]):
        tokens[i] = 0.0
        wanted = left[i] if left[i] > 0.0 else verify[i]
        if totals[0] + 1.0 > token_budget:
            break
        has_prefill = left[i] > 0.0 or totals[5] > 0.0
        limit = seconds / (margin_prefill if has_prefill else margin_decode)
        need = 0.0
        if left[i] > 0.0:
            if held[i] == 0.0 and free_seqs < 1:
                continue
            # vLLM admits a prompt only when all of it has room
            need = math.ceil((context[i] + left[i] + 1.0) / block_size) - held[i]
            if need > free_blocks:
                continue
            room = max_chunk_tokens(
                lines, limit, totals[0], totals[1] + 1.0, totals[2], totals[3], totals[4], context[i]
            )
            chunk = math.floor(min(room + 1e-6, wanted, token_budget - totals[0]))
            if chunk < 1.0:
                continue
            totals[4] += chunk * (context[i] + 0.5 * chunk)
            totals[5] = 1.0
        else:
            need = math.ceil((context[i] + wanted) / block_size) - held[i]
            after = batch_seconds(
                lines, totals[0] + wanted, totals[1] + 1.0, totals[2] + context[i], max(totals[3], wanted), totals[4]
            )
            if after > limit or totals[0] + wanted > token_budget or need > free_blocks:
                continue
            chunk = wanted
            totals[2] += context[i]
            totals[3] = max(totals[3], wanted)
        if need > 0.0:
            free_blocks -= need
        if held[i] == 0.0:
            free_seqs -= 1
        tokens[i] = chunk
        totals[0] += chunk
        totals[1] += 1.0
    margin = margin_prefill if totals[5] > 0.0 else margin_decode
    return margin * batch_seconds(lines, totals[0], totals[1], totals[2], totals[3], totals[4])
