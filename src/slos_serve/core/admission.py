"""Which candidates can all be promised: the multi-SLO dynamic programme.

The reduced model. Walk the requests in order of prefill deadline. Between two deadlines the engine earns
prefill budget at the rate

    R(tightest live TPOT) - sum over live decodes of (tokens per second it needs, in prefill tokens)

where R(t) = tokens_in(t) / t is what back-to-back batches of length t supply. At its deadline a request
spends its remaining prompt; from then on it is one more live decode. A set of promises is feasible when
the unspent budget never falls below zero, the final rate is not negative and the KV blocks suffice.

A label is (value, blocks, unspent budget, decode load, tightest TPOT): the budget is linear in the
decode load, so counts per tier are not needed and a transition costs O(1). All labels stand at the same
clock, and more unspent budget is better. At every deadline each label may take the candidate or leave it
(requests promised earlier are always taken). The beam keeps at most `width` labels: the frontier of
value against budget that will remain at the end, then the highest values. Wide enough, it is exact.

With speculation a tier l verifies s_l tokens to gain Acc(s_l) of them, and a batch lasts at most
Acc(s_l) * TPOT_l for every live tier; R and the loads are given per tightest tier by `rates`.

The model is a reference, not a bound: batches are quantised, context grows and blocks come back over
time. `planner` therefore checks what is chosen here by simulating executable batches, and repairs it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from slos_serve.core.demand import (
    CONTEXT,
    CUT_OFF,
    DEADLINE,
    GAIN,
    GAP,
    HELD,
    KEPT,
    LEFT,
    OUTPUT_LEFT,
    REQUIRED,
    START,
    STEPS,
    TPOT,
    VALUE,
    VERIFY,
    Demand,
    Effort,
    Machine,
    prefill_rate,
)
from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray
from slos_serve.core.trial import Trial, run

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
EPS_TOKENS = 1e-6
MAX_TIERS = 8
CAUTION = (1.0, 0.95, 0.9, 0.8)
MAX_LABELS = 25_000  # of one programme
LABEL_WORK = 2


@jit
def choose(now, deadline, cost, load, tier, value, blocks, required, rates, free_blocks, width):  # type: ignore[no-untyped-def]
    """Return (feasible, best value, chosen mask, labels expanded).

    Arrays by request in deadline order: `cost` prefill tokens; `load` prefill-token equivalents per second
    that its decode takes; `tier` index of its period (0 is tightest). `rates[t]`: prefill tokens/s while t
    is the tightest live tier (last entry: nothing decodes). `feasible` is false when the required requests
    alone do not fit.

    The labels are kept in order of value, highest first: leaving a candidate and taking it both keep that
    order, so the two lists are merged and a beam is cut in one pass without sorting.
    """
    n = deadline.shape[0]
    idle = rates.shape[0] - 1
    parent = np.empty((n, width), np.int32)
    taken = np.zeros((n, width), np.bool_)
    chosen = np.zeros(n, np.bool_)
    val = np.zeros(width)
    mem = np.zeros(width)
    left = np.zeros(width)
    use = np.zeros(width)
    tight = np.full(width, idle, np.int64)
    room = 2 * width
    n_val = np.zeros(room)
    n_mem = np.zeros(room)
    n_left = np.zeros(room)
    n_use = np.zeros(room)
    n_tight = np.zeros(room, np.int64)
    n_ahead = np.zeros(room)
    n_parent = np.zeros(room, np.int32)
    n_taken = np.zeros(room, np.bool_)
    kept = np.zeros(room, np.bool_)
    live = 1
    clock = now
    expanded = 0
    horizon = now
    for i in range(n):
        if np.isfinite(deadline[i]) and deadline[i] > horizon:
            horizon = deadline[i]
    for i in range(n):
        at = min(max(deadline[i], clock), horizon)
        step = at - clock
        clock = at
        expanded += live
        ahead = min(0.5, horizon - clock)
        for j in range(live):
            left[j] += (rates[tight[j]] - use[j]) * step
        gain = 0.0 if required[i] else value[i]
        count = 0
        skip = live if required[i] else 0
        take = 0
        while skip < live or take < live:
            # merge: "taken" labels are worth `gain` more than their parents
            if skip < live and (take >= live or val[skip] > val[take] + gain):
                j = skip
                skip += 1
                n_val[count] = val[j]
                n_mem[count] = mem[j]
                n_left[count] = left[j]
                n_use[count] = use[j]
                n_tight[count] = tight[j]
                n_taken[count] = False
            else:
                j = take
                take += 1
                after = left[j] - cost[i]
                used = mem[j] + blocks[i]
                if after < -EPS_TOKENS or used > free_blocks + 1e-9:
                    continue
                tt = min(tight[j], tier[i])
                if rates[tt] - use[j] - load[i] < -1e-9:
                    continue
                n_val[count] = val[j] + gain
                n_mem[count] = used
                n_left[count] = after
                n_use[count] = use[j] + load[i]
                n_tight[count] = tt
                n_taken[count] = True
            n_parent[count] = j
            n_ahead[count] = n_left[count] + (rates[n_tight[count]] - n_use[count]) * ahead
            count += 1
        if count == 0:
            return False, 0.0, chosen, expanded
        _cut(n_val, n_ahead, n_left, n_mem, count, width, kept)
        live = 0
        for j in range(count):
            if kept[j]:
                val[live] = n_val[j]
                mem[live] = n_mem[j]
                left[live] = n_left[j]
                use[live] = n_use[j]
                tight[live] = n_tight[j]
                parent[i, live] = n_parent[j]
                taken[i, live] = n_taken[j]
                live += 1
    k = 0
    total = val[0]
    for i in range(n - 1, -1, -1):
        chosen[i] = taken[i, k]
        k = parent[i, k]
    return True, total, chosen, expanded


@jit
def _cut(value, ahead, left, blocks, count, width, kept):  # type: ignore[no-untyped-def]
    """Mark the labels to keep, at most `width`: the frontiers, then the highest values.

    Labels come in order of value. A frontier label has more of something (budget at the horizon, budget
    now, free blocks) than every label of higher value.
    """
    if count <= width:
        kept[:count] = True
        return
    kept[:count] = False
    frontier = 0
    for what in range(3):
        if frontier >= width:
            break
        best = -np.inf
        j = 0
        while j < count and frontier < width:
            # of equal values only the best one can be on the frontier
            top = j
            end = j
            while end < count and value[end] == value[j]:
                here = ahead[end] if what == 0 else (left[end] if what == 1 else -blocks[end])
                there = ahead[top] if what == 0 else (left[top] if what == 1 else -blocks[top])
                if here > there:
                    top = end
                end += 1
            here = ahead[top] if what == 0 else (left[top] if what == 1 else -blocks[top])
            if here > best:
                best = here
                if not kept[top]:
                    kept[top] = True
                    frontier += 1
            j = end
    for j in range(count):
        if frontier >= width:
            break
        if not kept[j]:
            kept[j] = True
            frontier += 1


@jit
def fits(now, deadline, cost, load, tier, blocks, on, rates, free_blocks):  # type: ignore[no-untyped-def]
    """Tell whether the masked requests are feasible in the reduced model."""
    tight = rates.shape[0] - 1
    clock = now
    left = 0.0
    used = 0.0
    use = 0.0
    for i in range(deadline.shape[0]):
        if not on[i]:
            continue
        if np.isfinite(deadline[i]):
            if deadline[i] > clock:
                left += (rates[tight] - use) * (deadline[i] - clock)
                clock = deadline[i]
            left -= cost[i]
        used += blocks[i]
        use += load[i]
        tight = min(tight, tier[i])
        if left < -EPS_TOKENS or used > free_blocks + 1e-9 or rates[tight] - use < -1e-9:
            return False
    return True


@jit
def greedy(now, deadline, cost, load, tier, value, blocks, required, rates, free_blocks):  # type: ignore[no-untyped-def]
    """Return the mask that taking candidates by value density gives: the yardstick of the programme."""
    on = required.copy()
    for i in np.argsort(-value_density(now, deadline, cost, load, value), kind="mergesort"):
        if not on[i]:
            on[i] = True
            on[i] = fits(now, deadline, cost, load, tier, blocks, on, rates, free_blocks)
    return on


@jit
def value_density(now, deadline, cost, load, value):  # type: ignore[no-untyped-def]
    """Return value per prefill token that each request takes until the last deadline."""
    n = deadline.shape[0]
    horizon = now
    for i in range(n):
        if np.isfinite(deadline[i]):
            horizon = max(horizon, deadline[i])
    density = np.zeros(n)
    for i in range(n):
        begin = min(max(deadline[i], now), horizon)
        density[i] = value[i] / max(cost[i] + 0.5 * (horizon - begin) * load[i], 1e-9)
    return density


@jit
def _attempt(machine, demand, now, max_work, on, finished_at):  # type: ignore[no-untyped-def]
    """Run the masked requests; return (outcome, position of the one that missed or -1, work)."""
    index = np.flatnonzero(on)
    at = np.full(index.shape[0], np.inf)
    none = np.zeros(0)
    outcome, missed, _, work = run(
        machine, demand[:, index], False, now, -np.inf, max_work, none, -np.inf, at, np.zeros((0, 0)), none
    )
    if outcome == KEPT:
        finished_at[:] = np.inf
        finished_at[index] = at
    return outcome, index[missed] if missed >= 0 else -1, work + 4 * index.shape[0]


@jit
def _cheapest(demand, on, density, missed):  # type: ignore[no-untyped-def]
    """Return the candidate of least value density among those that may have delayed `missed`, or -1."""
    worst = -1
    for turn in range(2):
        for i in range(on.shape[0]):
            if not on[i] or demand[REQUIRED, i] > 0.0:
                continue
            if turn == 0 and missed >= 0 and demand[DEADLINE, i] > demand[DEADLINE, missed] and i != missed:
                continue
            if worst < 0 or density[i] < density[worst]:
                worst = i
        if worst >= 0:
            break
    return worst


@jit
def _asks_more(demand, i, other):  # type: ignore[no-untyped-def]
    """Tell whether candidate `i` asks for at least what candidate `other` does, in every way."""
    return (
        demand[DEADLINE, i] <= demand[DEADLINE, other]
        and demand[LEFT, i] >= demand[LEFT, other]
        and demand[CONTEXT, i] >= demand[CONTEXT, other]
        and demand[TPOT, i] <= demand[TPOT, other]
        and demand[GAP, i] <= demand[GAP, other]
        and demand[OUTPUT_LEFT, i] >= demand[OUTPUT_LEFT, other]
        and demand[START, i] >= demand[START, other]
    )


@jit
def search(machine, demand, now, max_work, on, density, finished_at):  # type: ignore[no-untyped-def]
    """Mend `on` until a run keeps every deadline, then extend it while work is left; return (outcome, work).

    Mend: let go of the candidate with the least value density among those that delayed the one that
    missed. Where half of the work does not suffice for that, begin again with the required requests and
    add many at a time: whatever was kept last is a valid answer at any moment. Extend: try the rest by
    value density, except those that ask for more than one that failed. `finished_at` receives the
    prefill ends of the final set. `outcome` is KEPT, or why the required requests alone cannot be kept.
    """
    n = demand.shape[1]
    proposed = on.copy()
    work = 0
    while True:
        outcome, missed, cost = _attempt(machine, demand, now, max_work // 2 - work, on, finished_at)
        work += cost
        if outcome == KEPT:
            break
        if outcome == CUT_OFF or work >= max_work // 2:
            break
        worst = _cheapest(demand, on, density, missed)
        if worst < 0:
            return outcome, work
        on[worst] = False
    rank = -density
    step = 1
    leap = 1
    if outcome != KEPT:
        on[:] = demand[REQUIRED] > 0.0
        outcome, _, cost = _attempt(machine, demand, now, max_work - work, on, finished_at)
        work += cost
        if outcome != KEPT:
            return outcome, work
        rank = np.where(proposed, rank - density.max() - 1.0, rank)
        step = max(1, np.sum(proposed & ~on) // 2)
        leap = 2
    order = np.argsort(rank, kind="mergesort")
    failed = np.empty(n, np.int64)
    num_failed = 0
    added = np.empty(n, np.int64)
    k = 0
    while k < n and work < max_work:
        following = k
        count = 0
        while following < n and count < step:
            i = order[following]
            following += 1
            hopeless = on[i]
            for f in range(num_failed):
                hopeless = hopeless or _asks_more(demand, i, failed[f])
            if not hopeless:
                added[count] = i
                count += 1
                on[i] = True
        if count == 0:
            break
        outcome, _, cost = _attempt(machine, demand, now, max_work - work, on, finished_at)
        work += cost
        if outcome == KEPT:
            k = following
            step *= leap
            continue
        on[added[:count]] = False
        if count == 1:
            failed[num_failed] = added[0]
            num_failed += 1
            k = following
        step = max(1, count // 2)
    return KEPT, work


def select(
    machine: Machine, everyone: Demand, now_s: float, effort: Effort, *, name: str, width: int
) -> tuple[IntArray, Trial]:
    """Return the positions in `everyone` of the best set found that keeps every deadline, and its trial.

    `name` picks the proposal: `dp` or `greedy`. Where even the required requests alone miss a deadline,
    the set is those and the trial says so.
    """
    model = reduced(machine, everyone)
    required = everyone[REQUIRED] > 0
    density = value_density(now_s, model.deadline, model.cost, model.load, model.value)
    finished_at = np.empty(everyone.shape[1])
    best: tuple[float, Mask, Trial] | None = None
    for caution in (1.0,) if name == "greedy" else CAUTION:
        careful = model._replace(rates=model.rates * caution)
        if name == "greedy":
            on, value = greedy(now_s, *careful), math.inf
        else:
            beam = max(1, min(width, min(effort.left // 8, MAX_LABELS) // max(1, everyone.shape[1])))
            feasible, value, on, expanded = choose(now_s, *careful, beam)
            effort.spent += LABEL_WORK * int(expanded)
            on = on if feasible else required.copy()
        if best is not None and value <= best[0] + 1e-9:
            break
        outcome, work = search(machine, everyone, now_s, effort.left, on, density, finished_at)
        effort.spent += int(work)
        reached = float(everyone[VALUE][on & ~required].sum())
        if best is None or reached > best[0]:
            best = reached, on, Trial(outcome=int(outcome), finished_at=finished_at[on])
        if outcome != KEPT or reached >= value or effort.left == 0:
            break
    assert best is not None
    return np.flatnonzero(best[1]), best[2]


class Reduced(NamedTuple):
    """The arguments of the reduced model; see `choose`."""

    deadline: FloatArray
    cost: FloatArray
    load: FloatArray
    tier: IntArray
    value: FloatArray
    blocks: FloatArray
    required: Mask
    rates: FloatArray
    free_blocks: float


def reduced(machine: Machine, everyone: Demand) -> Reduced:
    """Return the reduced model of a demand: costs, loads, tiers, rates and blocks."""
    lines = machine.lines
    periods = everyone[TPOT] * everyone[GAIN]
    finite = np.isfinite(periods)
    tiers = merge_tiers(periods[finite])
    token_s, request_s, read_s, _, pair_s, _ = np.maximum(lines.max(axis=0), 1e-12)
    per_decode = everyone[VERIFY] + (request_s + read_s * everyone[CONTEXT]) / token_s
    pairs = everyone[LEFT] * (everyone[CONTEXT] + 0.5 * everyone[LEFT])
    steps = float(everyone[STEPS].max(initial=0.0))
    rates = np.array(
        [
            max(0.0, prefill_rate(lines, machine.margin_prefill, machine.token_budget, period, 0.0, 0.0, 0.0, steps))
            for period in [*tiers.tolist(), math.inf]
        ]
    )
    required = everyone[REQUIRED] > 0
    return Reduced(
        deadline=everyone[DEADLINE],
        cost=everyone[LEFT] + pair_s * pairs / token_s,
        load=np.where(finite, per_decode / np.where(finite, periods, 1.0), 0.0),
        tier=np.where(finite, np.searchsorted(tiers, periods, side="right") - 1, len(tiers)),
        value=everyone[VALUE],
        blocks=np.where(required | (everyone[HELD] > 0), 0.0, everyone[START]),
        required=required,
        rates=rates,
        free_blocks=machine.free_blocks,
    )


def merge_tiers(tpots: FloatArray) -> FloatArray:
    """Return at most `MAX_TIERS` TPOT tiers, ascending; close ones are merged into the tighter."""
    tiers = np.unique(tpots)
    step = 1.01
    while len(tiers) > MAX_TIERS:
        merged = [tiers[0]]
        for tpot in tiers[1:].tolist():
            if tpot > merged[-1] * step:
                merged.append(tpot)
        tiers = np.array(merged)
        step *= 1.05
    return tiers
