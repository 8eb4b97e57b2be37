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

import numpy as np

from slos_serve.core.jit import jit

EPS_TOKENS = 1e-6


@jit
def choose(  # type: ignore[no-untyped-def]
    now, deadline, cost, load, tier, value, blocks, required, rates, loads_by_tier, free_blocks, width
):
    """Return (feasible, best value, chosen mask, labels expanded).

    Arrays by request in deadline order: `cost` prefill tokens, `tier` index of its TPOT (0 is tightest),
    `load` factor on its decode demand (1 = the tier's own). `rates[t]`: prefill tokens/s while t is the
    tightest live tier (last entry: nothing decodes). `loads_by_tier[t, l]`: prefill-token equivalents
    per second that one decode of tier l costs while t is the tightest. `feasible` is false when the
    required requests alone do not fit.
    """
    n = deadline.shape[0]
    num_tiers = loads_by_tier.shape[0]
    parent = np.empty((n, width), np.int64)
    taken = np.zeros((n, width), np.bool_)
    chosen = np.zeros(n, np.bool_)
    room = 2 * width
    val = np.zeros(room)
    mem = np.zeros(room)
    left = np.zeros(room)
    tight = np.full(room, num_tiers, np.int64)
    counts = np.zeros((room, num_tiers))
    n_val = np.zeros(room)
    n_mem = np.zeros(room)
    n_left = np.zeros(room)
    n_tight = np.zeros(room, np.int64)
    n_counts = np.zeros((room, num_tiers))
    n_parent = np.zeros(room, np.int64)
    n_taken = np.zeros(room, np.bool_)
    rate = np.zeros(room)
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
        count = 0
        for j in range(live):
            expanded += 1
            t = tight[j]
            pace = rates[t]
            if t < num_tiers:
                for l in range(num_tiers):
                    pace -= loads_by_tier[t, l] * counts[j, l]
            budget = left[j] + pace * step
            if not required[i]:
                n_val[count] = val[j]
                n_mem[count] = mem[j]
                n_left[count] = budget
                n_tight[count] = t
                n_counts[count, :] = counts[j, :]
                n_parent[count] = j
                n_taken[count] = False
                count += 1
            after = budget - cost[i]
            used = mem[j] + blocks[i]
            tt = min(t, tier[i])
            if after < -EPS_TOKENS or used > free_blocks + 1e-9:
                continue
            n_counts[count, :] = counts[j, :]
            if tier[i] < num_tiers:
                n_counts[count, tier[i]] += load[i]
            pace = rates[tt]
            if tt < num_tiers:
                for l in range(num_tiers):
                    pace -= loads_by_tier[tt, l] * n_counts[count, l]
            if pace < -1e-9:
                continue
            n_val[count] = val[j] + (0.0 if required[i] else value[i])
            n_mem[count] = used
            n_left[count] = after
            n_tight[count] = tt
            n_parent[count] = j
            n_taken[count] = True
            count += 1
        if count == 0:
            return False, 0.0, chosen, expanded
        # keep at most `width`
        if count > width:
            ahead = min(0.5, horizon - clock)
            for j in range(count):
                pace = rates[n_tight[j]]
                if n_tight[j] < num_tiers:
                    for l in range(num_tiers):
                        pace -= loads_by_tier[n_tight[j], l] * n_counts[j, l]
                rate[j] = n_left[j] + pace * ahead
            keep = _beam(n_val[:count], rate[:count], n_mem[:count], width)
        else:
            keep = np.arange(count)
        live = keep.shape[0]
        for k in range(live):
            j = keep[k]
            val[k] = n_val[j]
            mem[k] = n_mem[j]
            left[k] = n_left[j]
            tight[k] = n_tight[j]
            counts[k, :] = n_counts[j, :]
            parent[i, k] = n_parent[j]
            taken[i, k] = n_taken[j]
    best = 0
    for k in range(1, live):
        if val[k] > val[best] or (val[k] == val[best] and left[k] > left[best]):
            best = k
    total = val[best]
    k = best
    for i in range(n - 1, -1, -1):
        chosen[i] = taken[i, k]
        k = parent[i, k]
    return True, total, chosen, expanded


@jit
def _beam(value, budget, blocks, width):  # type: ignore[no-untyped-def]
    """Return the indices of the labels to keep: frontiers first, then the highest values."""
    n = value.shape[0]
    by_budget = np.argsort(-budget, kind="mergesort")
    order = by_budget[np.argsort(-value[by_budget], kind="mergesort")]
    keep = np.empty(width, np.int64)
    chosen = np.zeros(n, np.bool_)
    frontier = 0
    best = -np.inf
    for j in order:
        if budget[j] > best:
            best = budget[j]
            chosen[j] = True
            frontier += 1
    lightest = np.inf
    for j in order:
        if blocks[j] < lightest:
            lightest = blocks[j]
            if not chosen[j]:
                chosen[j] = True
                frontier += 1
    if frontier > width:
        # too many: spread evenly over the frontier, ends included
        members = np.empty(frontier, np.int64)
        m = 0
        for j in order:
            if chosen[j]:
                members[m] = j
                m += 1
        for k in range(width):
            keep[k] = members[(k * (frontier - 1)) // max(1, width - 1)]
        return keep
    k = 0
    for j in order:
        if chosen[j]:
            keep[k] = j
            k += 1
    for j in order:
        if k == width:
            break
        if not chosen[j]:
            keep[k] = j
            k += 1
    return keep


@jit
def fits(now, deadline, cost, load, tier, blocks, on, rates, loads_by_tier, free_blocks):  # type: ignore[no-untyped-def]
    """Tell whether the masked requests are feasible in the reduced model."""
    num_tiers = loads_by_tier.shape[0]
    counts = np.zeros(num_tiers)
    tight = num_tiers
    clock = now
    left = 0.0
    used = 0.0
    pace = rates[num_tiers]
    for i in range(deadline.shape[0]):
        if not on[i]:
            continue
        if np.isfinite(deadline[i]) and deadline[i] > clock:
            left += pace * (deadline[i] - clock)
            clock = deadline[i]
        if np.isfinite(deadline[i]):
            left -= cost[i]
        used += blocks[i]
        if left < -EPS_TOKENS or used > free_blocks + 1e-9:
            return False
        if tier[i] < num_tiers:
            counts[tier[i]] += load[i]
            tight = min(tight, tier[i])
        pace = rates[tight]
        if tight < num_tiers:
            for l in range(num_tiers):
                pace -= loads_by_tier[tight, l] * counts[l]
        if pace < -1e-9:
            return False
    return True


@jit
def greedy(now, deadline, cost, load, tier, value, blocks, required, rates, loads_by_tier, free_blocks):  # type: ignore[no-untyped-def]
    """Return the mask that taking candidates by value density gives: the yardstick of the programme."""
    n = deadline.shape[0]
    horizon = now
    for i in range(n):
        if np.isfinite(deadline[i]) and deadline[i] > horizon:
            horizon = deadline[i]
    density = np.zeros(n)
    num_tiers = loads_by_tier.shape[0]
    for i in range(n):
        work = cost[i]
        if tier[i] < num_tiers:
            work += 0.5 * max(0.0, horizon - deadline[i]) * loads_by_tier[tier[i], tier[i]] * load[i]
        density[i] = value[i] / max(work, 1e-9)
    on = required.copy()
    for i in np.argsort(-density, kind="mergesort"):
        if on[i]:
            continue
        on[i] = True
        if not fits(now, deadline, cost, load, tier, blocks, on, rates, loads_by_tier, free_blocks):
            on[i] = False
    return on
