"""Batches that an engine can execute: which decodes join, how many prefill tokens fit, when it ends.

Theory of operation. A batch is not interrupted, so its end is what everything depends on. It must end by
the earliest time at which a live decode owes a token, and by the earliest prefill deadline that it could
still meet. Up to that limit a longer batch is a better one, because it pays the fixed cost of a step
once. Inside the limit

1. what would be late in the *next* batch joins: decodes, then prompts. After them a decode joins where it
   would cut that batch short (decodes due within one shortest period after the limit, earliest first, while
   they fit), or when so many are due in later batches that they would not fit there;
2. prefill chunks fill what is left, earliest deadline first;
3. the remaining decodes join where room is free, earliest due first. In `run_ahead` mode they come before
   the prefill chunks: tokens ahead of schedule are slack that later, longer batches can spend.

`dry_run` repeats this to judge a set of promises, so one piece of code judges them and makes the batch that
is executed. `fill` adds requests without a promise to what was composed.
"""

from __future__ import annotations

import math

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import batch_seconds, max_chunk_tokens
from slos_serve.core.planning.demand import (
    CONTEXT,
    DEADLINE,
    DRAFTS,
    DUE,
    GAIN,
    HAS_PREFILL,
    HELD,
    LEFT,
    LIMIT,
    OUTPUT_LEFT,
    PAIRS,
    READ,
    REQUESTS,
    START,
    STEPS,
    TOKENS,
    TPOT,
    VERIFY,
    needed_s,
)

SMOOTHING_WINDOWS = 8


@jit
def batch_end(machine, totals, now):  # type: ignore[no-untyped-def]
    """Return when a batch of these totals that starts `now` ends, margin included."""
    if totals[TOKENS] <= 0.0:
        return now
    margin = machine.margin_prefill if totals[HAS_PREFILL] > 0.0 else machine.margin_decode
    return now + margin * batch_seconds(
        machine.lines, totals[TOKENS], totals[REQUESTS], totals[READ], totals[DRAFTS], totals[PAIRS]
    )


@jit
def growth(machine, demand, i):  # type: ignore[no-untyped-def]
    """Return the KV blocks that the next token of decode `i` takes."""
    return max(0.0, math.ceil((demand[CONTEXT, i] + demand[VERIFY, i]) / machine.block_size) - demand[HELD, i])


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
def _owed_early(demand, live, tokens, limit, period, capacity):  # type: ignore[no-untyped-def]
    """Return how many tokens of later windows must run now, because later batches could not hold them.

    Windows of one shortest `period` follow the batches after this one. A request in this batch comes back
    every period of its own; the others begin when they are due.
    """
    windows = np.zeros(SMOOTHING_WINDOWS)
    begin = limit + period
    until = begin + SMOOTHING_WINDOWS * period
    per_s = 1.0 / period
    for i in live:
        pace = demand[GAIN, i] * demand[TPOT, i]
        at = demand[DUE, i] if tokens[i] == 0.0 else demand[DUE, i] + pace
        pace = max(pace, period)
        while at < until:
            windows[min(SMOOTHING_WINDOWS - 1, max(0, int((at - begin) * per_s)))] += demand[VERIFY, i]
            at += pace
    carried = 0.0
    for w in range(SMOOTHING_WINDOWS - 1, -1, -1):
        carried = max(0.0, windows[w] + carried - capacity)
    return carried


@jit
def _join_by_due(machine, demand, live, until, wanted, seconds, tokens, totals):  # type: ignore[no-untyped-def]
    """Put decodes due before `until` into the batch, earliest first; return how many.

    That ends where there is no room, or with `wanted` tokens.
    """
    if wanted <= 0.0:
        return 0
    rest = np.empty(live.shape[0], np.int64)
    count = 0
    num_tokens = totals[TOKENS]
    read = totals[READ]
    drafts = totals[DRAFTS]
    for i in live:
        if tokens[i] == 0.0 and demand[DUE, i] < until:
            rest[count] = i
            count += 1
            num_tokens += demand[VERIFY, i]
            read += demand[CONTEXT, i]
            drafts = max(drafts, demand[STEPS, i])
    rest = rest[:count]
    if count > 1:
        # where all fit their order does not matter, and sorting costs more than the rest of a batch
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
def _join_decodes(  # type: ignore[no-untyped-def]
    machine, demand, live, prompts, free_blocks, num_started, run_ahead, margin, limit, now, tokens, totals
):
    """Put the decodes that must run into the batch; return how many are left out.

    Those are the ones that would be late in the next batch, and what later batches could not hold. Where
    decodes come first anyway and all fit, all join.
    """
    seconds = min((limit - now) / margin, 1e9)
    owed = 0.0
    read = 0.0
    drafts = 0.0
    period = math.inf
    for i in live:
        owed += demand[VERIFY, i]
        read += demand[CONTEXT, i]
        drafts = max(drafts, demand[STEPS, i])
        period = min(period, needed_s(demand, i, now))
    if (
        run_ahead
        and owed <= machine.token_budget
        and seconds >= batch_seconds(machine.lines, owed, live.shape[0], read, drafts, 0.0)
    ):
        for i in live:
            tokens[i] = demand[VERIFY, i]
        totals[TOKENS], totals[REQUESTS], totals[READ], totals[DRAFTS] = owed, live.shape[0], read, drafts
        return 0
    # in the next batch a token due before this time would be late whatever that batch holds
    certain = limit + margin * batch_seconds(machine.lines, 1.0, 1.0, 0.0, 0.0, 0.0)
    waiting = live.shape[0]
    for i in live:
        if demand[DUE, i] < certain and totals[TOKENS] + demand[VERIFY, i] <= machine.token_budget:
            _join(demand, i, tokens, totals)
            waiting -= 1
    _join_prefills(machine, demand, prompts, free_blocks, num_started, certain, seconds, tokens, totals)
    if waiting > 0:
        waiting -= _join_by_due(machine, demand, live, limit + period, math.inf, seconds, tokens, totals)
    if waiting > 0 and math.isfinite(period) and math.isfinite(limit):
        hold = max_chunk_tokens(machine.lines, period / margin, 0.0, 0.0, totals[READ], totals[DRAFTS], 0.0, 0.0)
        hold = max(1.0, min(hold, machine.token_budget))
        if owed > hold:
            early = _owed_early(demand, live, tokens, limit, period, hold)
            waiting -= _join_by_due(machine, demand, live, math.inf, early, seconds, tokens, totals)
    return waiting


@jit
def _join_prefills(machine, demand, prompts, free_blocks, num_started, until, seconds, tokens, totals):  # type: ignore[no-untyped-def]
    """Put chunks of prefills due before `until` into the batch, earliest first; tell whether room is left.

    What is in the batch already stays as it is. One that waits for memory or a seat does not stop those behind it.
    """
    for i in prompts:
        if totals[TOKENS] >= machine.token_budget:
            return False
        if demand[DEADLINE, i] >= until:
            break
        new = demand[HELD, i] == 0.0
        if tokens[i] > 0.0:
            if new:
                free_blocks -= demand[START, i]
                num_started += 1.0
            if tokens[i] < demand[LEFT, i]:
                return False
            continue
        if new and (demand[START, i] > free_blocks or num_started >= machine.max_seqs):
            continue
        chunk = _room(machine, demand, i, seconds, totals)
        if chunk < 1.0:
            return False
        _prefill(demand, i, chunk, tokens, totals)
        if new:
            free_blocks -= demand[START, i]
            num_started += 1.0
    return True


@jit
def compose(machine, demand, live, prompts, free_blocks, run_ahead, now, tokens, totals):  # type: ignore[no-untyped-def]
    """Fill `tokens` (new tokens by request, 0 = not in the batch) and `totals`; return when it ends.

    `live`: positions of the decodes; `prompts`: of the prefills, in order of deadline; see `sides`.
    `free_blocks`: inf where memory cannot run short.
    """
    num_started = float(live.shape[0])
    earliest = math.inf
    for i in live:
        earliest = min(earliest, demand[DUE, i])
        if free_blocks < math.inf:
            free_blocks -= growth(machine, demand, i)
    first_deadline = math.inf
    for i in prompts:
        # the first deadline that a batch could still meet: one that is lost already cuts nothing short
        alone = batch_seconds(machine.lines, 1.0, 1.0, 0.0, 0.0, demand[CONTEXT, i] + 0.5)
        if demand[DEADLINE, i] >= now + machine.margin_prefill * alone:
            first_deadline = demand[DEADLINE, i]
            break
    for i in prompts:
        if demand[HELD, i] > 0.0:
            num_started += 1.0
    margin = machine.margin_prefill if prompts.shape[0] > 0 else machine.margin_decode
    limit = min(earliest, now + machine.max_batch_s, first_deadline)
    for attempt in range(2):
        tokens[:] = 0.0
        totals[:] = 0.0
        totals[LIMIT] = limit
        seconds = min((limit - now) / margin, 1e9)
        run_ahead_now = run_ahead or prompts.shape[0] == 0
        waiting = _join_decodes(
            machine, demand, live, prompts, free_blocks, num_started, run_ahead_now, margin, limit, now, tokens, totals
        )
        if run_ahead_now and waiting > 0:
            waiting -= _join_by_due(machine, demand, live, math.inf, math.inf, seconds, tokens, totals)
        room = _join_prefills(machine, demand, prompts, free_blocks, num_started, math.inf, seconds, tokens, totals)
        if not run_ahead_now and waiting > 0 and room:
            _join_by_due(machine, demand, live, math.inf, math.inf, seconds, tokens, totals)
        if totals[TOKENS] > 0.0 or attempt == 1:
            break
        # Nothing fits before the limit: then a batch that ends after it is better than none.
        limit = now + max(machine.max_batch_s, 1.0)
    return batch_end(machine, totals, now)


@jit
def sides(demand):  # type: ignore[no-untyped-def]
    """Return the positions of the decodes and of the prefills of a demand."""
    n = demand.shape[1]
    live = np.empty(n, np.int64)
    prompts = np.empty(n, np.int64)
    num_live = 0
    num_prompts = 0
    for i in range(n):
        if demand[LEFT, i] > 0.0:
            prompts[num_prompts] = i
            num_prompts += 1
        elif demand[OUTPUT_LEFT, i] > 0.0:
            live[num_live] = i
            num_live += 1
    return live[:num_live], prompts[:num_prompts]


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
