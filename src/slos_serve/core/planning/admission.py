"""Which candidates are promised: sets that the programme proposes, tried on paper until one holds.

`programme` proposes sets in order of value; the first one whose executable batches keep every deadline is
taken. A set that failed also rules out every other that asks for the same before the miss. Where the best
one that held is worth much less than the best proposed, the programme is asked again with a share of the
room held back. What was left out is tried at last, by value density: blocks come back and requests end,
which the programme does not know.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit
from slos_serve.core.planning.demand import (
    CONTEXT,
    CUT_OFF,
    DEADLINE,
    DUE,
    GAP,
    KEPT,
    LEFT,
    OUTPUT_LEFT,
    REQUIRED,
    START,
    TPOT,
    Demand,
    Machine,
    WorkBudget,
)
from slos_serve.core.planning.dry_run import DryRun, run
from slos_serve.core.planning.programme import choose, greedy, reduced, token_price, trace, value_density

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
CAUTION = (1.0, 0.97, 0.9)
ENOUGH = 0.98  # of the best proposal: no further programme is asked for more
MAX_LABELS = 25_000  # of one programme
LABEL_WORK = 2
MAX_TRIES = 12
EXTEND_PART = 4


@jit
def _attempt(machine, demand, now, max_work, on, finished_at):  # type: ignore[no-untyped-def]
    """Run the masked requests; return (outcome, when the miss was due, or inf, work)."""
    index = np.flatnonzero(on)
    at = np.full(index.shape[0], np.inf)
    none = np.zeros(0)
    copy = demand[:, index]
    outcome, missed, _, work = run(
        machine, copy, False, now, -np.inf, max_work, none, -np.inf, at, np.zeros((0, 0)), none
    )
    if outcome == KEPT:
        finished_at[:] = np.inf
        finished_at[index] = at
    when = np.inf
    if missed >= 0:
        when = copy[DEADLINE, missed] if copy[LEFT, missed] > 0.0 else copy[DUE, missed]
    return outcome, when, work + 4 * index.shape[0]


@jit
def walk(machine, demand, now, max_work, labels, on, finished_at):  # type: ignore[no-untyped-def]
    """Try the labels of a programme, best first, until one keeps every deadline; return (found, work, first miss).

    Of labels of one value the one that leaves most room comes first. A label that takes all that another
    one took before it missed is not tried. `on` and `finished_at` receive what was found.
    """
    value, least, parent, taken, _ = labels
    order = np.argsort(-least, kind="mergesort")
    order = order[np.argsort(-value[order], kind="mergesort")]
    failed = np.zeros((MAX_TRIES, on.shape[0]), np.bool_)
    tries = 0
    work = 0
    first = np.inf
    for label in order:
        trace(parent, taken, label, on)
        work += on.shape[0] // 8
        hopeless = False
        for f in range(tries):
            hopeless = hopeless or not np.any(failed[f] & ~on)
        if hopeless:
            continue
        if tries == MAX_TRIES or work >= max_work:
            break
        outcome, when, cost = _attempt(machine, demand, now, max_work - work, on, finished_at)
        work += cost
        if outcome == KEPT:
            return True, work, first
        if outcome == CUT_OFF:
            break
        first = when if tries == 0 else first
        failed[tries] = on & (demand[DEADLINE] <= when)
        tries += 1
    return False, work, first


@jit
def mend(machine, demand, now, max_work, when, on, density, finished_at):  # type: ignore[no-untyped-def]
    """Let go of what is worth least by density until every deadline is kept; return (found, work).

    `when`: the set in `on` has missed something then. Of those due by then one goes first, then two, then
    four: whatever is too much comes back in `extend`.
    """
    order = np.argsort(density, kind="mergesort")
    many = 1
    work = 0
    while work < max_work:
        gone = 0
        for i in order:
            if gone < many and on[i] and demand[REQUIRED, i] == 0.0 and demand[DEADLINE, i] <= when:
                on[i] = False
                gone += 1
        if gone == 0:
            break
        outcome, when, cost = _attempt(machine, demand, now, max_work - work, on, finished_at)
        work += cost
        if outcome == KEPT:
            return True, work
        if outcome == CUT_OFF:
            break
        many *= 2
    return False, work


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
def extend(machine, demand, now, max_work, step, on, density, finished_at):  # type: ignore[no-untyped-def]
    """Add the rest by value density, `step` at a time, while a run keeps every deadline; return the work.

    One that asks for more than another that failed is not tried. After a failure half as many are added.
    """
    n = demand.shape[1]
    order = np.argsort(-density, kind="mergesort")
    failed = np.empty(n, np.int64)
    num_failed = 0
    added = np.empty(n, np.int64)
    leap = 2 if step > 1 else 1
    work = 0
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
    return work


def select(
    machine: Machine, everyone: Demand, now_s: float, work_budget: WorkBudget, *, name: str, width: int
) -> tuple[IntArray, DryRun]:
    """Return the positions in `everyone` of the best set found that keeps every deadline, and its dry run.

    `name` picks the proposal: `dp` or `greedy`. Where even the required requests alone miss a deadline,
    the set is those and the dry run says so.
    """
    everyone = np.ascontiguousarray(everyone)  # one layout, one compilation
    model = reduced(machine, everyone, now_s)
    value = np.where(model.required, 0.0, model.value)
    density = value_density(now_s, model)
    finished_at = np.full(everyone.shape[1], math.inf)
    best, best_at, reached = model.required.copy(), finished_at, -1.0
    if name == "greedy":
        on = greedy(now_s, model, density)
        outcome, _, work = _attempt(machine, everyone, now_s, work_budget.left, on, finished_at)
        work_budget.spent += int(work)
        if outcome == KEPT:
            best, best_at, reached = on, finished_at.copy(), 0.0
    else:
        price = token_price(now_s, model, density)
        beam = max(1, min(width, min(work_budget.left // 8, MAX_LABELS) // max(1, everyone.shape[1])))
        limit = work_budget.left // 3
        top: tuple[Any, float] | None = None
        for caution in CAUTION:
            labels = choose(now_s, model._replace(slope=model.slope / caution), beam, price)
            cost = LABEL_WORK * int(labels[-1])
            work_budget.spent += cost
            if not len(labels[0]) or labels[0][0] <= reached + 1e-9:
                break
            on = np.zeros(len(value), np.bool_)
            found, work, first = walk(machine, everyone, now_s, min(limit, work_budget.left), labels, on, finished_at)
            work_budget.spent += int(work)
            limit -= int(work)
            top = top or (labels, first)
            if found and value[on].sum() > reached:
                best, best_at, reached = on, finished_at.copy(), float(value[on].sum())
            if reached >= ENOUGH * top[0][0][0] or limit < cost:
                break
        if top is not None and reached < ENOUGH * top[0][0][0]:
            on = np.zeros(len(value), np.bool_)
            (_, _, parent, taken, _), first = top
            trace(parent, taken, 0, on)
            found, work = mend(machine, everyone, now_s, work_budget.left * 3 // 4, first, on, density, finished_at)
            work_budget.spent += int(work)
            if found and value[on].sum() > reached:
                best, best_at, reached = on, finished_at.copy(), float(value[on].sum())
    step = 1
    if reached < 0.0:
        outcome, _, work = _attempt(machine, everyone, now_s, work_budget.left, best, best_at)
        work_budget.spent += int(work)
        if outcome != KEPT:
            return np.flatnonzero(best), DryRun(outcome=int(outcome), finished_at=best_at[best])
        step = max(1, int((~best).sum()) // 2)
    work_budget.spent += int(
        extend(machine, everyone, now_s, work_budget.left // EXTEND_PART, step, best, density, best_at)
    )
    return np.flatnonzero(best), DryRun(outcome=KEPT, finished_at=best_at[best])
