"""Batches that an engine can execute: which decodes join, how many prefill tokens fit, when it ends.

Theory of operation. A batch is not interrupted, so its end is what everything depends on. It must end by
the earliest time at which a live decode owes a token, and by the earliest prefill deadline that it could
still meet. Up to that limit a longer batch is a better one, because it pays the fixed cost of a step
once. Inside the limit

1. a decode joins when its token would be late in the *next* batch (decodes due within one shortest
   period after the limit), or when so many are due in later batches that they would not fit there;
2. prefill chunks fill what is left, earliest deadline first;
3. the remaining decodes join where room is free, earliest due first. In `eager` mode they come before
   the prefill chunks: tokens ahead of schedule are slack that later, longer batches can spend.

`run` repeats this until every prefill is done and says whether a deadline is missed, so one piece of code
both judges a set of promises and makes the batch that is executed.

Speculative decoding changes two numbers per request: a decode verifies `VERIFY` tokens and is expected to
yield `GAIN` of them, so its period is `GAIN * TPOT`. Autoregressive decoding is `VERIFY = GAIN = 1`.

A *demand* is an array of shape (`NUM_COLUMNS`, requests), requests in order of `DEADLINE`; its rows
are named below. Times are seconds, already reduced by the guard; sizes are tokens and KV blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray, batch_seconds, max_chunk_tokens

Demand = FloatArray

LEFT = 0  # prompt tokens still to prefill; 0 in decode
CONTEXT = 1  # tokens computed so far
DEADLINE = 2  # when the prefill must be done; inf: no promise about it; -inf in decode
DUE = 3  # when the next decode token is owed; inf while prefilling or where nothing is owed
TPOT = 4  # seconds per output token; inf: none
GAP = 5  # longest silence; inf: none
VERIFY = 6  # tokens computed by one decode
GAIN = 7  # output tokens expected of it
STEPS = 8  # drafter steps of it
OUTPUT_LEFT = 9  # predicted output tokens still to come
HELD = 10  # KV blocks held or granted
START = 11  # KV blocks that must be free before the first chunk of a request that holds none
VALUE = 12  # weight of a candidate
REQUIRED = 13  # 1 where promised already
NUM_COLUMNS = 14

# What a batch adds up to.
TOKENS, REQUESTS, READ, DRAFTS, PAIRS, HAS_PREFILL, LIMIT, BLOCKED = range(8)  # BLOCKED: a prefill waits for memory
NUM_TOTALS = 8

# How a run of batches ends.
KEPT, MISSED, STUCK, CUT_OFF, FULL = range(5)

EPS_S = 1e-9
SMOOTHING_WINDOWS = 8


class Machine(NamedTuple):
    """What one engine step may hold, and how long it takes.

    `lines` as in `perf`; `max_batch_s` bounds a batch; `phase_is_gain`: a burst of accepted tokens is owed
    as a whole (the rate counts) rather than from its first token on.
    """

    lines: FloatArray
    margin_prefill: float
    margin_decode: float
    token_budget: float
    max_seqs: float
    block_size: float
    free_blocks: float
    max_batch_s: float
    phase_is_gain: bool = False


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
    """What running a demand to its end showed; see `run`."""

    outcome: int
    finished_at: FloatArray
    log_tokens: FloatArray = field(default_factory=_empty)
    log_end: FloatArray = field(default_factory=_empty)

    @property
    def kept(self) -> bool:
        """Tell whether every deadline was met."""
        return self.outcome == KEPT


@jit
def _seconds(machine, totals):  # type: ignore[no-untyped-def]
    """Return the time of a batch, margin included."""
    margin = machine.margin_prefill if totals[HAS_PREFILL] > 0.0 else machine.margin_decode
    return margin * batch_seconds(
        machine.lines, totals[TOKENS], totals[REQUESTS], totals[READ], totals[DRAFTS], totals[PAIRS]
    )


@jit
def _join(demand, i, tokens, totals):  # type: ignore[no-untyped-def]
    """Put decode `i` into the batch."""
    tokens[i] = demand[VERIFY, i]
    totals[TOKENS] += demand[VERIFY, i]
    totals[REQUESTS] += 1.0
    totals[READ] += demand[CONTEXT, i]
    totals[DRAFTS] = max(totals[DRAFTS], demand[STEPS, i])


@jit
def _has_room(machine, demand, i, seconds, totals):  # type: ignore[no-untyped-def]
    """Tell whether decode `i` fits into a batch of at most `seconds` (margin left out)."""
    num_tokens = totals[TOKENS] + demand[VERIFY, i]
    return num_tokens <= machine.token_budget and seconds >= batch_seconds(
        machine.lines,
        num_tokens,
        totals[REQUESTS] + 1.0,
        totals[READ] + demand[CONTEXT, i],
        max(totals[DRAFTS], demand[STEPS, i]),
        totals[PAIRS],
    )


@jit
def _room(machine, demand, i, seconds, totals):  # type: ignore[no-untyped-def]
    """Return the prefill tokens of request `i` that fit into a batch of at most `seconds`."""
    room = max_chunk_tokens(
        machine.lines,
        seconds,
        totals[TOKENS],
        totals[REQUESTS] + 1.0,
        totals[READ],
        totals[DRAFTS],
        totals[PAIRS],
        demand[CONTEXT, i],
    )
    return math.floor(min(room + 1e-6, demand[LEFT, i], machine.token_budget - totals[TOKENS]))


@jit
def _prefill(demand, i, chunk, tokens, totals):  # type: ignore[no-untyped-def]
    """Put a chunk of request `i` into the batch."""
    tokens[i] = chunk
    totals[TOKENS] += chunk
    totals[REQUESTS] += 1.0
    totals[PAIRS] += chunk * (demand[CONTEXT, i] + 0.5 * chunk)
    totals[HAS_PREFILL] = 1.0


@jit
def _growth(machine, demand, i):  # type: ignore[no-untyped-def]
    """Return the KV blocks that the next token of decode `i` takes."""
    return max(0.0, math.ceil((demand[CONTEXT, i] + demand[VERIFY, i]) / machine.block_size) - demand[HELD, i])


@jit
def _owed_early(demand, decoding, tokens, limit, period, capacity):  # type: ignore[no-untyped-def]
    """Return how many tokens of later windows must run now, because later batches could not hold them.

    Windows of one shortest `period` follow the batches after this one. A request in this batch comes back
    every period of its own; the others begin when they are due.
    """
    windows = np.zeros(SMOOTHING_WINDOWS)
    begin = limit + period
    for i in range(tokens.shape[0]):
        if decoding[i]:
            pace = demand[GAIN, i] * demand[TPOT, i]
            at = demand[DUE, i] if tokens[i] == 0.0 else demand[DUE, i] + pace
            while at < begin + SMOOTHING_WINDOWS * period:
                windows[max(0, int((at - begin) / period))] += demand[VERIFY, i]
                at += max(pace, period)
    carried = 0.0
    for w in range(SMOOTHING_WINDOWS - 1, -1, -1):
        carried = max(0.0, windows[w] + carried - capacity)
    return carried


@jit
def _join_by_due(machine, demand, decoding, wanted, seconds, tokens, totals):  # type: ignore[no-untyped-def]
    """Put decodes into the batch, earliest due first, until `wanted` tokens or no room; return how many."""
    if wanted <= 0.0:
        return 0
    n = tokens.shape[0]
    rest = np.empty(n, np.int64)
    count = 0
    for i in range(n):
        if decoding[i] and tokens[i] == 0.0:
            rest[count] = i
            count += 1
    rest = rest[:count]
    if count > 1:
        # where all fit their order does not matter, and sorting costs more than the rest of a batch
        num_tokens = totals[TOKENS]
        read = totals[READ]
        drafts = totals[DRAFTS]
        for i in rest:
            num_tokens += demand[VERIFY, i]
            read += demand[CONTEXT, i]
            drafts = max(drafts, demand[STEPS, i])
        all_fit = num_tokens <= machine.token_budget and seconds >= batch_seconds(
            machine.lines, num_tokens, totals[REQUESTS] + count, read, drafts, totals[PAIRS]
        )
        if not all_fit or wanted < math.inf:
            rest = rest[np.argsort(demand[DUE][rest], kind="mergesort")]
    joined = 0
    for i in rest:
        if wanted <= 0.0 or not _has_room(machine, demand, i, seconds, totals):
            break
        _join(demand, i, tokens, totals)
        wanted -= demand[VERIFY, i]
        joined += 1
    return joined


@jit
def compose(machine, demand, free_blocks, eager, now, tokens, totals):  # type: ignore[no-untyped-def]
    """Fill `tokens` (new tokens by request, 0 = not in the batch) and `totals`; return when it ends."""
    n = demand.shape[1]
    tokens[:] = 0.0
    totals[:] = 0.0
    decoding = np.zeros(n, np.bool_)
    earliest = math.inf
    period = math.inf
    first_deadline = math.inf
    num_started = 0.0
    owed_tokens = 0.0
    waiting = 0
    any_prefill = False
    soonest = now + machine.margin_prefill * batch_seconds(machine.lines, 1.0, 1.0, 0.0, 0.0, 0.0)
    for i in range(n):
        if demand[LEFT, i] > 0.0:
            any_prefill = True
            if demand[HELD, i] > 0.0:
                num_started += 1.0
            if demand[DEADLINE, i] >= soonest:
                first_deadline = min(first_deadline, demand[DEADLINE, i])
        elif demand[OUTPUT_LEFT, i] > 0.0:
            decoding[i] = True
            waiting += 1
            num_started += 1.0
            owed_tokens += demand[VERIFY, i]
            free_blocks -= _growth(machine, demand, i)
            earliest = min(earliest, demand[DUE, i])
            period = min(period, demand[GAIN, i] * demand[TPOT, i])
    margin = machine.margin_prefill if any_prefill else machine.margin_decode
    limit = min(earliest, now + machine.max_batch_s, first_deadline)
    seconds = min((limit - now) / margin, 1e9)
    totals[LIMIT] = limit

    # 1. decodes that would be late in the next batch, and those that later batches could not hold
    for i in range(n):
        if (
            decoding[i]
            and demand[DUE, i] < limit + period
            and totals[TOKENS] + demand[VERIFY, i] <= machine.token_budget
        ):
            _join(demand, i, tokens, totals)
            waiting -= 1
    if waiting > 0 and owed_tokens > 0.0 and math.isfinite(period) and math.isfinite(limit):
        hold = max_chunk_tokens(machine.lines, period / margin, 0.0, 0.0, totals[READ], totals[DRAFTS], 0.0, 0.0)
        hold = max(1.0, min(hold, machine.token_budget))
        if owed_tokens > hold:
            early = _owed_early(demand, decoding, tokens, limit, period, hold)
            waiting -= _join_by_due(machine, demand, decoding, early, seconds, tokens, totals)

    room_left = True
    for turn in range(2):
        if (turn == 0) == eager:
            # 3. decodes where room is free
            if waiting > 0 and room_left:
                waiting -= _join_by_due(machine, demand, decoding, math.inf, seconds, tokens, totals)
        elif any_prefill:
            # 2. prefill chunks, earliest deadline first
            for i in range(n):
                if demand[LEFT, i] <= 0.0:
                    continue
                if totals[TOKENS] >= machine.token_budget:
                    room_left = False
                    break
                new = demand[HELD, i] == 0.0
                if new and (demand[START, i] > free_blocks or num_started >= machine.max_seqs):
                    totals[BLOCKED] = 1.0
                    continue
                chunk = _room(machine, demand, i, seconds, totals)
                if chunk < 1.0:
                    room_left = False
                    break
                _prefill(demand, i, chunk, tokens, totals)
                if new:
                    free_blocks -= demand[START, i]
                    num_started += 1.0
    return now + _seconds(machine, totals) if totals[TOKENS] > 0.0 else now


@jit
def sustainable(machine, demand, now):  # type: ignore[no-untyped-def]
    """Tell whether the live decodes can all keep their pace from `now` on, nothing else running.

    A request that is ahead of schedule may go slower: it needs its predicted rest by the time that the
    last token of it is due.
    """
    period = math.inf
    for i in range(demand.shape[1]):
        if demand[LEFT, i] == 0.0 and demand[OUTPUT_LEFT, i] > 0.0:
            period = min(period, demand[GAIN, i] * demand[TPOT, i])
    if not math.isfinite(period):
        return True
    num_tokens = 0.0
    requests = 0.0
    read = 0.0
    drafts = 0.0
    for i in range(demand.shape[1]):
        if demand[LEFT, i] == 0.0 and demand[OUTPUT_LEFT, i] > 0.0 and math.isfinite(demand[TPOT, i]):
            rest = max(1.0, demand[OUTPUT_LEFT, i])
            ahead = max(0.0, demand[DUE, i] - now - demand[TPOT, i])
            share = period / (demand[GAIN, i] * (demand[TPOT, i] + ahead / rest))
            num_tokens += share * demand[VERIFY, i]
            requests += share
            read += share * demand[CONTEXT, i]
            drafts = max(drafts, demand[STEPS, i])
    seconds = batch_seconds(machine.lines, num_tokens, requests, read, drafts, 0.0)
    return num_tokens <= machine.token_budget and machine.margin_decode * seconds <= period + EPS_S


@jit
def run(machine, demand, eager, now, until, max_work, finished_at, log_tokens, log_end):  # type: ignore[no-untyped-def]
    """Run batches until every prefill is done and `until` is past, or a deadline is missed.

    What decodes then must be sustainable. `demand` is a working copy and is changed. Returns (outcome,
    request that missed, batches, work). `finished_at` receives the time each prefill ends. With room in
    `log_tokens` (batches, requests) and `log_end` the batches are written down.
    """
    n = demand.shape[1]
    tokens = np.zeros(n)
    totals = np.zeros(NUM_TOTALS)
    work = 0
    batch = 0
    free = machine.free_blocks
    open_prefills = 0
    for i in range(n):
        if demand[LEFT, i] > 0.0:
            open_prefills += 1
    while open_prefills > 0 or now < until:
        work += n + 8
        if work > max_work:
            return CUT_OFF, -1, batch, work
        end = compose(machine, demand, free, eager, now, tokens, totals)
        if end <= now:
            for i in range(n):
                if demand[LEFT, i] > 0.0:
                    return STUCK, i, batch, work
            break
        if batch < log_end.shape[0]:
            log_tokens[batch, :] = tokens
            log_end[batch] = end
        for i in range(n):
            if demand[LEFT, i] > 0.0:
                if tokens[i] > 0.0:
                    if demand[HELD, i] == 0.0:
                        demand[HELD, i] = demand[START, i]
                        free -= demand[START, i]
                    demand[LEFT, i] -= tokens[i]
                    demand[CONTEXT, i] += tokens[i]
                if demand[DEADLINE, i] < end - EPS_S:
                    return MISSED, i, batch, work
                if demand[LEFT, i] > 0.0:
                    continue
                open_prefills -= 1
                finished_at[i] = end
                origin = max(demand[DEADLINE, i], end) if math.isfinite(demand[DEADLINE, i]) else end
                burst = demand[GAIN, i] if machine.phase_is_gain else 1.0
                demand[DUE, i] = min(origin + demand[TPOT, i] * burst, end + demand[GAP, i])
                demand[OUTPUT_LEFT, i] -= 1.0
            elif demand[OUTPUT_LEFT, i] > 0.0:
                if demand[DUE, i] < end - EPS_S:
                    return MISSED, i, batch, work
                if tokens[i] == 0.0:
                    continue
                grown = _growth(machine, demand, i)
                demand[HELD, i] += grown
                free -= grown
                gain = demand[GAIN, i]
                demand[DUE, i] = min(demand[DUE, i] + gain * demand[TPOT, i], end + demand[GAP, i])
                demand[CONTEXT, i] += gain
                demand[OUTPUT_LEFT, i] -= gain
            else:
                continue
            if demand[OUTPUT_LEFT, i] <= 0.0:
                free += demand[HELD, i]
                demand[HELD, i] = 0.0
                demand[DUE, i] = math.inf
        if free < -EPS_S:
            return FULL, -1, batch, work
        now = end
        batch += 1
    if not sustainable(machine, demand, now):
        return MISSED, -1, batch, work
    return KEPT, -1, batch, work


@jit
def last_deadline(demand, now):  # type: ignore[no-untyped-def]
    """Return the last finite prefill deadline, or `now`."""
    last = now
    for i in range(demand.shape[1]):
        if demand[LEFT, i] > 0.0 and math.isfinite(demand[DEADLINE, i]):
            last = max(last, demand[DEADLINE, i])
    return last


def simulate(
    machine: Machine,
    demand: Demand,
    now_s: float,
    effort: Effort,
    *,
    eager: bool,
    log_batches: int = 0,
    until_s: float | None = None,
) -> Trial:
    """Run a copy of `demand` to the end of its prefills and to `until_s` (its last deadline by default)."""
    until = float(last_deadline(demand, now_s)) if until_s is None else until_s
    num_requests = demand.shape[1]
    finished_at = np.full(num_requests, math.inf)
    log_tokens, log_end = np.zeros((log_batches, num_requests)), np.zeros(log_batches)
    outcome, _, batches, work = run(
        machine, demand.copy(), eager, now_s, until, effort.left, finished_at, log_tokens, log_end
    )
    effort.spent += int(work)
    return Trial(
        outcome=int(outcome), finished_at=finished_at, log_tokens=log_tokens[:batches], log_end=log_end[:batches]
    )


@jit
def fill(machine, demand, free_seqs, free_blocks, reserve, seconds, tokens, totals):  # type: ignore[no-untyped-def]
    """Fill what a composed batch leaves with requests that hold no promise, in the order given.

    `seconds`: how long the whole batch may take, margin included. Here `HELD` is exactly what is held,
    and `free_blocks` and `free_seqs` are free now; a new prompt starts only where `reserve` blocks remain
    for those that run. Adds to `totals` and writes `tokens`.
    """
    for i in range(demand.shape[1]):
        tokens[i] = 0.0
        if totals[TOKENS] >= machine.token_budget:
            continue
        prefill = demand[LEFT, i] > 0.0
        with_prefill = prefill or totals[HAS_PREFILL] > 0.0
        limit = seconds / (machine.margin_prefill if with_prefill else machine.margin_decode)
        new = prefill and demand[HELD, i] == 0.0
        # vLLM starts a prompt only where all of it has room
        after = demand[CONTEXT, i] + (demand[LEFT, i] + 1.0 if prefill else demand[VERIFY, i])
        need = max(0.0, math.ceil(after / machine.block_size) - demand[HELD, i])
        if need > free_blocks or (new and (free_seqs < 1 or need + reserve > free_blocks)):
            continue
        if prefill:
            chunk = _room(machine, demand, i, limit, totals)
            if chunk < 1.0:
                continue
            _prefill(demand, i, chunk, tokens, totals)
        elif _has_room(machine, demand, i, limit, totals):
            _join(demand, i, tokens, totals)
        else:
            continue
        free_blocks -= need
        if new:
            free_seqs -= 1
