"""The multi-SLO dynamic programme: which candidates could all be promised.

The reduced model. Walk the requests in order of prefill deadline. The engine runs batch after batch; a
batch of x seconds holds

    room(x) = min over lines of (x - fixed part) / seconds per token

prefill tokens, less the decodes due. The next batch must end by the time at which the tightest live decode
owes a token, and each one after it a period of that tier later: those batches cost nothing that is not
owed anyway. At its deadline a request spends its remaining prompt; where the batches that have ended do
not hold it, one is cut short there, pays a fixed part of its own, and takes the place of the one that was
due next. From then on the request is one more live decode. A set of promises is feasible when no prompt
finds too little room, the final rate is not negative and the KV blocks suffice.

A label is (value, blocks, room left, decode load, tightest tier, end of the last batch, time by which the
next must end): counts per tier are not needed and a transition costs O(1). All labels stand at the same
clock, and more of each is better. At every deadline each label may take the candidate or leave it
(requests promised earlier are always taken). The beam keeps at most `width` labels: the frontier of
value against room in time to come, then the highest values. Wide enough, it is exact.

With speculation a tier l verifies s_l tokens to gain Acc(s_l) of them, and its period is Acc(s_l) * TPOT_l.

The model is a reference, not a bound: context grows and blocks come back over time. `admission` therefore
checks what is proposed here by simulating executable batches, and repairs it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit
from slos_serve.core.perf import FIXED, PER_DRAFT, PER_REQUEST, PER_TOKEN, FloatArray, batch_seconds
from slos_serve.core.planning.demand import (
    CONTEXT,
    DEADLINE,
    DUE,
    GAIN,
    HELD,
    LEFT,
    OUTPUT_LEFT,
    REQUIRED,
    START,
    STEPS,
    TPOT,
    VALUE,
    VERIFY,
    Demand,
    Machine,
    needed_each,
    prefill_rate,
)

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
EPS_TOKENS = 1e-6
MAX_TIERS = 8
PRICE = 0.75  # what is left over in the end is seldom all used

# What a label knows beside its tightest tier: value, blocks, room left for prefill tokens, decode load, end
# of its last batch, time by which the next one must end, and the least room that it ever had left.
WORTH, BLOCKS, ROOM, LOAD, END, NEXT, LEAST = range(7)
NUM_ENTRIES = 7


class Reduced(NamedTuple):
    """The reduced model of a demand: arrays by request in deadline order, then by tier, then by line.

    `cost`: prefill tokens. `load`: prefill-token equivalents per second that its decode takes. `owed`: what
    the required decodes have taken by its deadline. `tier`: index into `periods` (ascending, the last is
    inf: nothing decodes). `rates`: prefill tokens per second while that tier is the tightest.
    `slope`, `fixed`: seconds per token and of a batch without any. `longest`: seconds of the longest batch.
    """

    deadline: FloatArray
    cost: FloatArray
    load: FloatArray
    owed: FloatArray
    tier: IntArray
    value: FloatArray
    blocks: FloatArray
    required: Mask
    periods: FloatArray
    rates: FloatArray
    slope: FloatArray
    fixed: FloatArray
    longest: float
    first_due: float
    free_blocks: float


@jit
def choose(now, model, width, price):  # type: ignore[no-untyped-def]
    """Return the best labels found, highest value first: (value, least room left, parents, taken, labels expanded).

    `trace` reads the set of a label from parents and taken. No label: the required requests alone do not
    fit. `price` of a prefill token: tells what part of a frontier too wide for the beam stays.

    The labels are kept in order of value, highest first: leaving a candidate and taking it both keep that
    order, so the two lists are merged and a beam is cut in one pass without sorting.
    """
    deadline, cost, load, tier = model.deadline, model.cost, model.load, model.tier
    blocks, value, required, owed = model.blocks, model.value, model.required, model.owed
    rates, periods, free_blocks = model.rates, model.periods, model.free_blocks
    steps = (model.slope, model.fixed, model.longest)
    n = deadline.shape[0]
    idle = rates.shape[0] - 1
    parent = np.empty((n, width), np.int32)
    taken = np.zeros((n, width), np.bool_)
    labels, following = np.zeros((2 * width, NUM_ENTRIES)), np.zeros((2 * width, NUM_ENTRIES))
    tight, next_tight = np.full(2 * width, idle, np.int64), np.zeros(2 * width, np.int64)
    rows = np.zeros(width, np.int64)  # where the labels stand
    origin = np.zeros(2 * width, np.int32)
    takes = np.zeros(2 * width, np.bool_)
    able = np.zeros(width, np.bool_)
    spent = np.zeros((width, 3))
    goals = np.zeros((3, 2 * width))
    worth = np.zeros(2 * width)
    kept = np.zeros(2 * width, np.bool_)
    labels[0, END] = now
    labels[0, NEXT] = model.first_due
    labels[0, LEAST] = np.inf
    live = 1
    clock = now
    expanded = 0
    paid = 0.0
    horizon, base = _span(now, model)
    num_goals = 2 if blocks.sum() <= free_blocks else 3  # blocks tell labels apart only where they can run short
    for i in range(n):
        at = min(max(deadline[i], clock), horizon)
        tokens, tier_i, blocks_i, load_i = cost[i], tier[i], blocks[i], load[i]
        own_period = periods[tier_i]
        due, span = owed[i] - paid, at - clock
        passed = at > clock
        if passed:
            paid = owed[i]
            clock = at
        expanded += live
        anyone = False
        for j in range(live):
            r = rows[j]
            period = periods[tight[r]]
            if passed:
                labels[r, ROOM] -= due + (labels[r, LOAD] - base) * span
                if labels[r, NEXT] <= at + 1e-9:
                    labels[r, ROOM], labels[r, END], labels[r, NEXT] = _ended(
                        steps, labels[r, ROOM], labels[r, END], labels[r, NEXT], period, at
                    )
            able[j] = (
                labels[r, BLOCKS] + blocks_i <= free_blocks + 1e-9
                and rates[min(tight[r], tier_i)] >= labels[r, LOAD] + load_i - 1e-9
            )
            if able[j] and tokens > 0.0:
                spent[j, 0], spent[j, 1], spent[j, 2] = _spent(
                    steps, labels[r, ROOM], labels[r, END], labels[r, NEXT], tokens, period, own_period, at
                )
                able[j] = spent[j, 0] >= -EPS_TOKENS
            anyone = anyone or able[j]
        if not anyone:
            if required[i]:
                live = 0
                break
            for j in range(live):
                parent[i, j] = j
            continue
        gain = 0.0 if required[i] else value[i]
        count = 0
        skip = live if required[i] else 0
        take = 0
        while skip < live or take < live:
            # merge: "taken" labels are worth `gain` more than their parents
            if take < live and not able[take]:
                take += 1
                continue
            leave = skip < live and (take >= live or labels[rows[skip], WORTH] > labels[rows[take], WORTH] + gain)
            j = skip if leave else take
            skip += leave
            take += not leave
            r = rows[j]
            for k in range(NUM_ENTRIES):  # a loop: views cost more than what they save
                following[count, k] = labels[r, k]
            next_tight[count] = tight[r]
            if not leave:
                following[count, WORTH] += gain
                following[count, BLOCKS] += blocks_i
                following[count, LOAD] += load_i
                next_tight[count] = min(tight[r], tier_i)
                if tokens > 0.0:
                    following[count, ROOM], following[count, END] = spent[j, 0], spent[j, 1]
                    following[count, NEXT] = spent[j, 2]
                    following[count, LEAST] = min(following[count, LEAST], spent[j, 0])
            takes[count] = not leave
            origin[count] = j
            count += 1
        if count > width:
            for j in range(count):
                rate = rates[next_tight[j]]
                worth[j] = following[j, WORTH]
                goals[1, j] = following[j, ROOM] + rate * (clock - following[j, END])
                goals[0, j] = goals[1, j] + (rate - following[j, LOAD]) * (horizon - clock)
                goals[2, j] = -following[j, BLOCKS]
        _cut(PRICE * price, worth, goals, num_goals, count, width, kept)
        live = 0
        for j in range(count):
            if kept[j]:
                rows[live] = j
                parent[i, live] = origin[j]
                taken[i, live] = takes[j]
                live += 1
        labels, following = following, labels
        tight, next_tight = next_tight, tight
    return labels[rows[:live], WORTH], labels[rows[:live], LEAST], parent, taken, expanded


@jit
def _span(now, model):  # type: ignore[no-untyped-def]
    """Return the last deadline, and the load of what decodes already (`owed` counts it)."""
    horizon = now
    base = 0.0
    for i in range(model.deadline.shape[0]):
        if np.isfinite(model.deadline[i]):
            horizon = max(horizon, model.deadline[i])
        if model.deadline[i] == -np.inf:
            base += model.load[i]
    return horizon, base


@jit
def _room(steps, seconds):  # type: ignore[no-untyped-def]
    """Return the tokens that batches of `seconds` in all hold, as few batches as may be."""
    if seconds <= 0.0:
        return 0.0
    slope, fixed, longest = steps
    count = math.ceil(seconds / longest - 1e-9)
    most = np.inf
    for k in range(slope.shape[0]):
        most = min(most, (seconds - count * fixed[k]) / slope[k])
    return max(most, 0.0)


@jit
def _ended(steps, room, end, following, period, now):  # type: ignore[no-untyped-def]
    """Let the batches end that must have ended by `now`, the first by `following`; return (room, end, following)."""
    more = math.floor((now - following) / period + 1e-9) if period < np.inf else 0.0
    room += _room(steps, following - end)
    if more > 0.0:
        room += more * _room(steps, period)
        following += more * period
    return room, following, following + period


@jit
def _spent(steps, room, end, following, cost, period, own_period, now):  # type: ignore[no-untyped-def]
    """Prefill `cost` tokens by `now`; return (room, end, following), room below zero where there was too little.

    `period`: of the tightest tier so far. `own_period`: of the request, a decode from now on.
    """
    if room < cost - EPS_TOKENS:
        # a batch cut short; it takes the place of the next one
        room += _room(steps, now - end)
        end = now
        following += period
    return room - cost, end, min(following, now + own_period)


@jit
def trace(parent, taken, label, on):  # type: ignore[no-untyped-def]
    """Set `on` to the requests that a label of `choose` takes."""
    for i in range(on.shape[0] - 1, -1, -1):
        on[i] = taken[i, label]
        label = parent[i, label]


@jit
def _cut(price, value, goals, num_goals, count, width, kept):  # type: ignore[no-untyped-def]
    """Mark the labels to keep, at most `width`: the frontiers, then the highest values.

    Labels come in order of value. A frontier label has more of something (the first `num_goals` of `goals`: room at
    the horizon, room now, free blocks) than every label of higher value.
    """
    kept[:count] = count <= width
    if count <= width:
        return
    chosen = 0
    front = np.empty(count, np.int64)
    for what in range(num_goals):
        goal = goals[what]
        size = 0
        best = -np.inf
        j = 0
        while j < count:
            # of equal values only the best one can be on the frontier
            top = j
            same = value[j]
            while j < count and value[j] == same:
                if goal[j] > goal[top]:
                    top = j
                j += 1
            if goal[top] > best:
                best = goal[top]
                front[size] = top
                size += 1
        first = 0
        if what == 0 and size > width:
            for k in range(size):
                if value[front[k]] + price * goal[front[k]] > value[front[first]] + price * goal[front[first]]:
                    first = k
            first = min(max(0, first - width // 2), size - width)
        # the last one leaves most: where the beam is narrow, what is required further on needs it
        for k in range(-1, size - first):
            top = front[size - 1] if k < 0 else front[first + k]
            if chosen < width and not kept[top]:
                kept[top] = True
                chosen += 1
    for j in range(count):
        if chosen < width and not kept[j]:
            kept[j] = True
            chosen += 1


@jit
def fits(now, model, on):  # type: ignore[no-untyped-def]
    """Tell whether the masked requests are feasible in the reduced model."""
    steps = (model.slope, model.fixed, model.longest)
    tight = model.periods.shape[0] - 1
    room, end, following = 0.0, now, model.first_due
    clock = now
    paid = 0.0
    used = 0.0
    load = 0.0
    horizon, base = _span(now, model)
    for i in range(on.shape[0]):
        if not on[i]:
            continue
        at = min(max(model.deadline[i], clock), horizon)
        period = model.periods[tight]
        if at > clock:
            room -= model.owed[i] - paid + (load - base) * (at - clock)
            if following <= at + 1e-9:
                room, end, following = _ended(steps, room, end, following, period, at)
            paid = model.owed[i]
            clock = at
        used += model.blocks[i]
        load += model.load[i]
        tight = min(tight, model.tier[i])
        if used > model.free_blocks + 1e-9 or model.rates[tight] < load - 1e-9:
            return False
        own_period = model.periods[model.tier[i]]
        if model.cost[i] > 0.0:
            room, end, following = _spent(steps, room, end, following, model.cost[i], period, own_period, clock)
            if room < -EPS_TOKENS:
                return False
    return True


@jit
def greedy(now, model, density):  # type: ignore[no-untyped-def]
    """Return the mask that taking candidates by value density gives: the yardstick of the programme."""
    on = model.required.copy()
    for i in np.argsort(-density, kind="mergesort"):
        if not on[i]:
            on[i] = True
            on[i] = fits(now, model, on)
    return on


@jit
def token_price(now, model, density):  # type: ignore[no-untyped-def]
    """Return the value density at which the room until the last deadline is used up; 0 where all fit."""
    horizon, _ = _span(now, model)
    tight = model.periods.shape[0] - 1
    for i in range(model.required.shape[0]):
        if model.required[i]:
            tight = min(tight, model.tier[i])
    room = model.rates[tight] * (horizon - now)
    for i in np.argsort(np.where(model.required, -np.inf, -density), kind="mergesort"):
        begin = min(max(model.deadline[i], now), horizon)
        room -= model.cost[i] + (horizon - begin) * model.load[i]
        if room < 0.0 and not model.required[i]:
            return density[i]
    return 0.0


@jit
def value_density(now, model):  # type: ignore[no-untyped-def]
    """Return value per prefill token that each request takes until the last deadline."""
    horizon, _ = _span(now, model)
    density = np.zeros(model.value.shape[0])
    for i in range(density.shape[0]):
        begin = min(max(model.deadline[i], now), horizon)
        density[i] = model.value[i] / max(model.cost[i] + 0.5 * (horizon - begin) * model.load[i], 1e-9)
    return density


@jit
def _owed(demand, per_decode, now):  # type: ignore[no-untyped-def]
    """Return when the required decodes first owe a token, and the token equivalents they owe by each deadline."""
    n = demand.shape[1]
    owed = np.zeros(n)
    first = np.inf
    decodes = 0
    while decodes < n and demand[DEADLINE, decodes] == -np.inf:
        first = min(first, demand[DUE, decodes])
        decodes += 1
    for i in range(decodes, n):
        at = demand[DEADLINE, i]
        if at <= now or (i > decodes and at == demand[DEADLINE, i - 1]) or at == np.inf:
            owed[i] = owed[i - 1] if i > decodes else 0.0
            continue
        total = 0.0
        for r in range(decodes):
            due = demand[DUE, r]
            if due <= at + 1e-9:
                batches = 1.0 + math.floor((at - due) / (demand[GAIN, r] * demand[TPOT, r]) + 1e-9)
                total += per_decode[r] * min(batches, math.ceil(demand[OUTPUT_LEFT, r] / demand[GAIN, r]))
        owed[i] = total
    return max(first, now), owed


def reduced(machine: Machine, everyone: Demand, now_s: float) -> Reduced:
    """Return the reduced model of a demand: costs, loads, tiers, rates and blocks."""
    lines = machine.lines
    periods = needed_each(everyone, now_s)
    finite = np.isfinite(periods)
    tiers, tier = tiers_of(periods)
    token_s, request_s, read_s, _, pair_s, _ = np.maximum(lines.max(axis=0), 1e-12)
    per_decode = everyone[VERIFY] + (request_s + read_s * everyone[CONTEXT]) / token_s
    pairs = everyone[LEFT] * (everyone[CONTEXT] + 0.5 * everyone[LEFT])
    steps = float(everyone[STEPS].max(initial=0.0))
    margin = machine.margin_prefill
    rates = np.array(
        [
            max(0.0, prefill_rate(lines, margin, machine.token_budget, period, 0.0, 0.0, 0.0, steps))
            for period in tiers.tolist()
        ]
    )
    required = everyone[REQUIRED] > 0
    first_due, owed = _owed(everyone, per_decode, now_s)
    return Reduced(
        deadline=everyone[DEADLINE],
        cost=everyone[LEFT] + pair_s * pairs / token_s,
        load=np.where(finite, per_decode / np.where(finite, periods, 1.0), 0.0),
        owed=owed,
        tier=tier,
        value=everyone[VALUE],
        blocks=np.where(required | (everyone[HELD] > 0), 0.0, everyone[START]),
        required=required,
        periods=tiers,
        rates=rates,
        slope=np.maximum(margin * lines[:, PER_TOKEN], 1e-12),
        fixed=margin * (lines[:, PER_REQUEST] + lines[:, PER_DRAFT] * steps + lines[:, FIXED]),
        longest=min(machine.max_batch_s, margin * batch_seconds(lines, machine.token_budget, 1.0, 0.0, steps, 0.0)),
        first_due=first_due,
        free_blocks=machine.free_blocks,
    )


def tiers_of(periods: FloatArray) -> tuple[FloatArray, IntArray]:
    """Return at most `MAX_TIERS` tiers of periods, ascending, and `inf`; and which one each period belongs to.

    Close ones are merged into the tighter.
    """
    tiers = np.unique(periods[np.isfinite(periods)])
    step = 1.01
    while len(tiers) > MAX_TIERS:
        merged = [tiers[0]]
        for tpot in tiers[1:].tolist():
            if tpot > merged[-1] * step:
                merged.append(tpot)
        tiers = np.array(merged)
        step *= 1.05
    tiers = np.append(tiers, math.inf)
    index: IntArray = np.searchsorted(tiers, periods, side="right") - 1
    return tiers, index
