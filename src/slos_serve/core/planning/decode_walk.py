"""Can decodes go on to their ends? Walk them in strides.

Theory of operation. Once the last prefill has ended, decodes may go on for thousands of steps. `decode_walk`
walks them in strides, to the predicted end of the last one. In a stride

- all of them run in every batch, if with that nobody is late and the KV blocks suffice. Tokens ahead of
  schedule are kept, context grows, and requests that end leave;
- otherwise each runs only as often as it must: at its pace, slower where it is and stays ahead of schedule.

A stride ends when about an eighth of the requests have ended. Inside it everyone counts as live, and
where that asks too much the stride is cut at the first end, where it is exact. So a set that was kept once
is kept in every later state too, until an output is longer than predicted or something else is promised.
"""

from __future__ import annotations

import math

from slos_serve.core.jit import jit
from slos_serve.core.perf import batch_seconds
from slos_serve.core.planning.demand import (
    CONTEXT,
    DUE,
    EPS_S,
    FULL,
    GAIN,
    GAP,
    HELD,
    KEPT,
    LEAD,
    MISSED,
    OUTPUT_LEFT,
    STEPS,
    TPOT,
    VERIFY,
    needed_s,
    owe_next,
)

MAX_STRIDES = 64
STRIDE = 0.25  # of the mean rest: of lengths spread evenly an eighth end in it


@jit
def _together(machine, demand, live, span, now):  # type: ignore[no-untyped-def]
    """Return when `span` batches with everyone in them end; -1 where somebody would be late.

    Nobody's time is counted short: lateness is judged as if all stayed for the whole span.
    """
    num_tokens = 0.0
    read = 0.0
    grown = 0.0
    drafts = 0.0
    mean_tokens = 0.0
    mean_requests = 0.0
    mean_read = 0.0
    for i in live:
        gain = demand[GAIN, i]
        batches = min(span, math.ceil(demand[OUTPUT_LEFT, i] / gain - 1e-9))
        num_tokens += demand[VERIFY, i]
        read += demand[CONTEXT, i]
        grown += gain
        drafts = max(drafts, demand[STEPS, i])
        share = batches / span
        mean_tokens += share * demand[VERIFY, i]
        mean_requests += share
        mean_read += share * (demand[CONTEXT, i] + 0.5 * gain * (batches - 1.0))
    if num_tokens > machine.token_budget:
        return -1.0
    count = float(live.shape[0])
    margin, lines = machine.margin_decode, machine.lines
    first = margin * batch_seconds(lines, num_tokens, count, read, drafts, 0.0)
    each = margin * batch_seconds(lines, num_tokens, count, read + 0.5 * (span - 1.0) * grown, drafts, 0.0)
    longest = margin * batch_seconds(lines, num_tokens, count, read + (span - 1.0) * grown, drafts, 0.0)
    if longest > machine.max_batch_s + EPS_S:
        return -1.0
    for i in live:
        if demand[DUE, i] < math.inf:
            gain = demand[GAIN, i]
            batches = min(span, math.ceil(demand[OUTPUT_LEFT, i] / gain - 1e-9))
            last = (
                demand[DUE, i] + demand[LEAD, i] + (batches - 1.0) * gain * demand[TPOT, i]
                if batches > 1.0
                else math.inf
            )
            if (
                demand[DUE, i] < now + first - EPS_S
                or last < now + batches * each - EPS_S
                or (batches > 1.0 and demand[GAP, i] < longest - EPS_S)
            ):
                return -1.0
    return now + span * margin * batch_seconds(lines, mean_tokens, mean_requests, mean_read, drafts, 0.0)


@jit
def all_seconds(machine, demand, live, now):  # type: ignore[no-untyped-def]
    """Return how long a batch of all takes, and whether batches of all are always in time, to the end.

    The latter is judged by the last and longest one: where that is no longer than what the most
    pressing one needs, nothing else has to be looked at.
    """
    num_tokens = 0.0
    read = 0.0
    grown = 0.0
    drafts = 0.0
    earliest = math.inf
    limit = machine.max_batch_s
    for i in live:
        num_tokens += demand[VERIFY, i]
        read += demand[CONTEXT, i]
        grown += demand[OUTPUT_LEFT, i]
        drafts = max(drafts, demand[STEPS, i])
        earliest = min(earliest, demand[DUE, i])
        limit = min(limit, needed_s(demand, i, now))
    count = float(live.shape[0])
    first = machine.margin_decode * batch_seconds(machine.lines, num_tokens, count, read, drafts, 0.0)
    last = machine.margin_decode * batch_seconds(machine.lines, num_tokens, count, read + grown, drafts, 0.0)
    return first, num_tokens <= machine.token_budget and last <= limit and now + first <= earliest


@jit
def _period(demand, i, now, all_s):  # type: ignore[no-untyped-def]
    """Return how many seconds apart the batches of decode `i` may be until it ends; inf: none need come.

    Time that it is ahead of schedule counts only where batches of all, `all_s` long, leave it that time:
    else they use it up.
    """
    needed = needed_s(demand, i, now)
    return needed if all_s <= needed else min(demand[GAIN, i] * demand[TPOT, i], demand[GAP, i])


@jit
def _by_turns(machine, demand, live, span_s, now, all_s):  # type: ignore[no-untyped-def]
    """Tell whether everyone can be served at its own period for `span_s` seconds."""
    shortest = machine.max_batch_s
    for i in live:
        shortest = min(shortest, _period(demand, i, now, all_s))
    num_tokens = 0.0
    requests = 0.0
    read = 0.0
    drafts = 0.0
    for i in live:
        period = _period(demand, i, now, all_s)
        if period == math.inf:
            continue
        alone = batch_seconds(machine.lines, demand[VERIFY, i], 1.0, demand[CONTEXT, i], demand[STEPS, i], 0.0)
        if demand[DUE, i] < now + machine.margin_decode * alone - EPS_S:
            return False
        share = shortest / period
        grown = min(span_s / period * demand[GAIN, i], demand[OUTPUT_LEFT, i])
        num_tokens += share * demand[VERIFY, i]
        requests += share
        read += share * (demand[CONTEXT, i] + grown)
        drafts = max(drafts, demand[STEPS, i])
    seconds = machine.margin_decode * batch_seconds(machine.lines, num_tokens, requests, read, drafts, 0.0)
    return num_tokens <= machine.token_budget and seconds <= shortest + EPS_S


@jit
def _grown(machine, demand, i, tokens):  # type: ignore[no-untyped-def]
    """Return the KV blocks that `tokens` more of decode `i` take, with the drafts of the last step."""
    after = demand[CONTEXT, i] + tokens + demand[VERIFY, i] - demand[GAIN, i]
    return max(0.0, math.ceil(after / machine.block_size - 1e-9) - demand[HELD, i])


@jit
def _blocks(machine, demand, live, span, span_s, now, all_s):  # type: ignore[no-untyped-def]
    """Return the KV blocks that a stride adds to what is held: `span` batches together, or `span_s` by turns."""
    more = 0.0
    for i in live:
        batches = span if span > 0.0 else span_s / _period(demand, i, now, all_s)
        more += _grown(machine, demand, i, min(batches * demand[GAIN, i], demand[OUTPUT_LEFT, i]))
    return more


@jit
def _stride(machine, demand, live, free, now, all_s):  # type: ignore[no-untyped-def]
    """Return (outcome, batches with everyone, or 0 and how long by turns, end, work) of the next stride."""
    count = live.shape[0]
    fewest = math.inf
    soonest = math.inf
    total = 0.0
    total_s = 0.0
    paced = 0
    for i in live:
        batches = math.ceil(demand[OUTPUT_LEFT, i] / demand[GAIN, i] - 1e-9)
        fewest = min(fewest, batches)
        total += batches
        period = _period(demand, i, now, all_s)
        if period < math.inf:
            life = max(1.0, demand[OUTPUT_LEFT, i] / demand[GAIN, i]) * period
            soonest = min(soonest, life)
            total_s += life
            paced += 1
    if paced == 0 and free == math.inf:
        return KEPT, math.inf, 0.0, now, count
    work = count
    outcome = MISSED
    span = max(fewest, math.ceil(STRIDE * total / count))
    while True:
        work += count
        end = _together(machine, demand, live, span, now)
        if end >= 0.0:
            if free == math.inf or _blocks(machine, demand, live, span, 0.0, now, all_s) <= free + EPS_S:
                return KEPT, span, 0.0, end, work
            outcome = FULL
        else:
            outcome = MISSED
        if span == fewest:
            break
        span = fewest
    if outcome == FULL or paced == 0:
        return outcome, 0.0, 0.0, now, work
    span_s = max(soonest, STRIDE * total_s / paced)
    while True:
        work += count
        if _by_turns(machine, demand, live, span_s, now, all_s):
            if free == math.inf or _blocks(machine, demand, live, 0.0, span_s, now, all_s) <= free + EPS_S:
                return KEPT, 0.0, span_s, now + span_s, work
            outcome = FULL
        if span_s == soonest:
            return outcome, 0.0, 0.0, now, work
        span_s = soonest


@jit
def walk_decodes(machine, demand, live, free, now):  # type: ignore[no-untyped-def]
    """Walk the decodes `live` to their predicted ends; return (outcome, work). `demand` and `live` change.

    `free`: free KV blocks, inf where memory cannot run short.
    """
    work = 0
    num_live = live.shape[0]
    for _ in range(MAX_STRIDES):
        if num_live == 0:
            return KEPT, work
        all_s, easy = all_seconds(machine, demand, live[:num_live], now)
        if easy and free == math.inf:
            return KEPT, work + num_live
        outcome, span, span_s, end, cost = _stride(machine, demand, live[:num_live], free, now, all_s)
        work += cost
        if outcome != KEPT or span == math.inf:
            return outcome, work
        kept = 0
        for k in range(num_live):
            i = live[k]
            gain = demand[GAIN, i]
            rest = demand[OUTPUT_LEFT, i] / gain
            batches = min(span, math.ceil(rest - 1e-9)) if span > 0.0 else span_s / _period(demand, i, now, all_s)
            if free < math.inf:
                more = _grown(machine, demand, i, min(batches * gain, demand[OUTPUT_LEFT, i]))
                demand[HELD, i] += more
                free -= more
            if batches >= rest - 1e-9:
                free += demand[HELD, i]
                continue
            if batches > 0.0:
                demand[CONTEXT, i] += batches * gain
                demand[OUTPUT_LEFT, i] -= batches * gain
                scheduled = demand[DUE, i] + demand[LEAD, i] + batches * gain * demand[TPOT, i]
                owe_next(demand, i, scheduled, end + demand[GAP, i])
            live[kept] = i
            kept += 1
        num_live = kept
        now = end
    return MISSED, work
