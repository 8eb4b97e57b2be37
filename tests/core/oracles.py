"""The optimum of two reduced models, by exhaustive search, and of the fluid one by mixed-integer programming.

In whole batches (`keeps_in_batches`): see `slos_serve.core.planning.programme`. As a fluid (`is_feasible`): requests in
order of prefill deadline; until a request's deadline the engine earns prefill tokens
at the budget rate

    R = max over T <= tightest live TPOT of tokens_in(T) / T, less one token per TPOT of every live decode

and at its deadline a request spends what is left of its prompt and becomes a live decode.
"""

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request of the reduced model. A running decode has `prefill` 0 and lives from the start."""

    prefill: float
    deadline_s: float
    tpot_s: float
    weight: float = 1.0
    blocks: float = 0.0
    running: bool = False

    @property
    def lives_from_s(self):
        return self.deadline_s if self.prefill > 0 else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Hardware of the reduced model: lines (seconds per token, fixed seconds), token budget, free blocks."""

    lines: tuple
    token_budget: int
    free_blocks: float = math.inf

    def seconds(self, tokens):
        return max(slope * tokens + fixed for slope, fixed in self.lines)

    def gross_rate(self, longest_s):
        """Return the most tokens per second in back-to-back batches of at most `longest_s` each.

        Every line has a fixed part, so longer batches are better, until one holds the whole budget.
        """
        period = min(longest_s, self.seconds(self.token_budget))
        tokens = min((period - fixed) / slope for slope, fixed in self.lines)
        return max(0.0, tokens) / period

    def room(self, seconds):
        """Return the tokens that batches of `seconds` in all hold, as few of them as the token budget allows."""
        count = max(1, math.ceil(seconds / self.seconds(self.token_budget) - 1e-9))
        return max(0.0, min((seconds - count * fixed) / slope for slope, fixed in self.lines))

    def rate(self, tpots):
        """Return the budget rate beside live decodes of the given TPOTs."""
        return self.gross_rate(min(tpots, default=math.inf)) - sum(1 / tpot for tpot in tpots)


def is_feasible(engine, chosen, now_s=0.0):
    """Tell whether the unspent budget never falls below zero, and decodes and blocks fit at the end."""
    items = sorted(chosen, key=lambda item: max(item.lives_from_s, now_s))
    if sum(item.blocks for item in items if not item.running) > engine.free_blocks + 1e-9:
        return False
    clock, budget, live = now_s, 0.0, []
    for item in items:
        at = max(item.lives_from_s, now_s)
        budget += engine.rate(live) * (at - clock) if at > clock else 0.0
        clock = at
        budget -= item.prefill
        live.append(item.tpot_s)
        if budget < -1e-6:
            return False
    return engine.rate(live) >= -1e-9


def keeps_in_batches(engine, chosen, now_s=0.0):
    """Tell whether every prompt finds room in batches that end when a decode owes a token, or cut short for it."""
    decodes = [item for item in chosen if item.prefill <= 0]
    prompts = sorted((item for item in chosen if item.prefill > 0), key=lambda item: item.deadline_s)
    if sum(item.blocks for item in chosen if not item.running) > engine.free_blocks + 1e-9:
        return False
    if engine.rate([item.tpot_s for item in chosen]) < -1e-9:
        return False
    pace = min((item.tpot_s for item in decodes), default=math.inf)
    clock, end, due, left, owed, load = now_s, now_s, now_s + pace, 0.0, 0, 0.0
    for item in prompts:
        at = max(item.deadline_s, now_s)
        tokens = sum(math.floor((at - now_s) / decode.tpot_s + 1e-9) for decode in decodes)
        left -= tokens - owed + load * (at - clock)
        clock, owed = at, tokens
        while due <= at + 1e-9:
            left += engine.room(due - end)
            end, due = due, due + pace
        if left < item.prefill - 1e-6:
            left += engine.room(at - end)
            end, due = at, due + pace
        left -= item.prefill
        if left < -1e-6:
            return False
        due, pace, load = min(due, at + item.tpot_s), min(pace, item.tpot_s), load + 1 / item.tpot_s
    return True


def best_set(engine, items, now_s=0.0, feasible=is_feasible):
    """Return (greatest weight, chosen positions) by trying every subset, heaviest first; (-inf, ()) if none fits."""
    must = [i for i, item in enumerate(items) if item.running]
    free = [i for i, item in enumerate(items) if not item.running]
    masks = (
        (sum(items[i].weight for k, i in enumerate(free) if mask >> k & 1), -mask) for mask in range(1 << len(free))
    )
    for weight, negative in sorted(masks, reverse=True):
        chosen = must + [i for k, i in enumerate(free) if -negative >> k & 1]
        if feasible(engine, [items[i] for i in chosen], now_s):
            return weight, tuple(sorted(chosen))
    return -math.inf, ()


def best_set_milp(engine, items, now_s=0.0):
    """Return the greatest weight by mixed-integer programming (SciPy); -inf where nothing is feasible.

    x[i]: taken. For each interval k between deadlines: e[k] <= tokens earned, bounded for each tier by that
    tier's rate unless none of it is live (big-M), less the load of the live decodes.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    order = sorted(range(len(items)), key=lambda i: max(items[i].lives_from_s, now_s))
    times = [max(items[i].lives_from_s, now_s) for i in order]
    n = len(order)
    most = engine.gross_rate(math.inf)
    matrix, upper = [], []

    def at_most(coefficients, bound):
        line = np.zeros(2 * n)
        for position, value in coefficients:
            line[position] += value
        matrix.append(line)
        upper.append(bound)

    for k in range(n):  # interval k ends at times[k]; positions before k are live in it
        span = times[k] - (times[k - 1] if k else now_s)
        load = [(i, span / items[order[i]].tpot_s) for i in range(k)]
        at_most([(n + k, 1.0), *load], most * span)
        for i in range(k):
            gross = engine.gross_rate(items[order[i]].tpot_s)
            at_most([(n + k, 1.0), (i, (most - gross) * span), *load], most * span)
        at_most([(i, items[order[i]].prefill) for i in range(k + 1)] + [(n + j, -1.0) for j in range(k + 1)], 1e-7)
    everyone = [(i, 1 / items[order[i]].tpot_s) for i in range(n)]
    for i in range(n):
        gross = engine.gross_rate(items[order[i]].tpot_s)
        at_most([(i, most - gross), *everyone], most + 1e-9)
    if math.isfinite(engine.free_blocks):
        at_most([(i, items[order[i]].blocks) for i in range(n) if not items[order[i]].running], engine.free_blocks)
    running = np.array([items[i].running for i in order], float)
    weight = np.array([0.0 if items[i].running else items[i].weight for i in order])
    result = milp(
        np.concatenate([-weight, np.zeros(n)]),
        constraints=LinearConstraint(np.array(matrix), -np.inf, np.array(upper)),
        integrality=np.concatenate([np.ones(n), np.zeros(n)]),
        bounds=Bounds(
            np.concatenate([running, np.full(n, -np.inf)]),
            np.concatenate([np.ones(n), np.full(n, np.inf)]),
        ),
        options={"mip_rel_gap": 0.0},
    )
    return -math.inf if result.x is None else float(weight @ np.round(result.x[:n]))


def loosened(item, *, ttft_s=0.0, tpot_factor=1.0):
    """Return the item with a later deadline or a slower pace."""
    return replace(item, deadline_s=item.deadline_s + ttft_s, tpot_s=item.tpot_s * tpot_factor)
