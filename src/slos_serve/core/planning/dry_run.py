"""Can these requests keep their deadlines? Run them on paper.

Theory of operation. Until the last prefill has ended, `run` composes batch after batch, exactly as the
engine will; `decode_walk` walks what decodes then. So one piece of code judges a set of promises and makes the
batch that is executed, and what holds on paper holds in the engine as long as the model does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.perf import FloatArray
from slos_serve.core.planning.batching import compose, growth, sides
from slos_serve.core.planning.decode_walk import all_seconds, walk_decodes
from slos_serve.core.planning.demand import (
    CONTEXT,
    CUT_OFF,
    DEADLINE,
    DUE,
    EPS_S,
    FULL,
    GAIN,
    GAP,
    HELD,
    KEPT,
    LEAD,
    LEFT,
    MISSED,
    NUM_TOTALS,
    OUTPUT_LEFT,
    START,
    STUCK,
    TPOT,
    VERIFY,
    Demand,
    Machine,
    WorkBudget,
    owe_next,
)

SETTLE_S = 1.0  # paces slower than this meet nobody's phase often enough to matter
NO_BATCH: FloatArray = np.zeros(0)


def _empty() -> FloatArray:
    return np.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
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
def _is_ample(machine, demand):  # type: ignore[no-untyped-def]
    """Tell whether the free KV blocks suffice even if nobody ever gave one back."""
    more = 0.0
    for i in range(demand.shape[1]):
        tokens = demand[CONTEXT, i] + demand[LEFT, i] + demand[OUTPUT_LEFT, i] + demand[VERIFY, i]
        held = demand[HELD, i]
        more += max(0.0, max(math.ceil(tokens / machine.block_size), demand[START, i] if held == 0.0 else 0.0) - held)
    return more <= machine.free_blocks


@jit
def _settled_at(machine, demand, live, now):  # type: ignore[no-untyped-def]
    """Return until when decodes go on batch by batch after the last prefill: `now`, or once round the slowest pace.

    Where not all run in every batch, their phases may have met while prompts ran; averages do not show that.
    """
    _, easy = all_seconds(machine, demand, live, now)
    if easy:
        return now
    longest = 0.0
    for i in live:
        if demand[TPOT, i] < math.inf:
            longest = max(longest, demand[GAIN, i] * demand[TPOT, i])
    return now + min(longest, SETTLE_S)


@jit
def run(machine, demand, run_ahead, now, until, max_work, head_tokens, head_end, finished_at, log_tokens, log_end):  # type: ignore[no-untyped-def]
    """Run batches until every prefill is done (and `until` is past), then strides; stop where a deadline is missed.

    `demand` is a working copy and is changed. Returns (outcome, request that missed, batches, work);
    the request is -1 where no single one did. `finished_at` receives the time each prefill ends. With
    room in `log_tokens` (batches, requests) and `log_end` the batches are written down. The first batch
    is `head_tokens` and ends at `head_end`, where that is later than `now`.
    """
    tokens = np.zeros(demand.shape[1])
    totals = np.zeros(NUM_TOTALS)
    live, prompts = np.empty(demand.shape[1], np.int64), np.empty(demand.shape[1], np.int64)
    decodes, prefills = sides(demand)
    num_live, num_prompts = decodes.shape[0], prefills.shape[0]
    live[:num_live] = decodes
    prompts[:num_prompts] = prefills
    free = math.inf if _is_ample(machine, demand) else machine.free_blocks
    work = 3 * demand.shape[1]  # to set out
    batch = 0
    until = max(until, head_end)
    settled = False
    while True:
        if num_prompts == 0 and now >= until:
            if settled:
                break
            settled = True
            until = _settled_at(machine, demand, live[:num_live], now)
            continue
        work += num_live + num_prompts + 8
        if work > max_work:
            return CUT_OFF, -1, batch, work
        if batch == 0 and head_end > now:
            tokens[:] = head_tokens
            end = head_end
        else:
            end = compose(machine, demand, live[:num_live], prompts[:num_prompts], free, run_ahead, now, tokens, totals)
        if end <= now:
            if num_prompts > 0:
                return STUCK, prompts[0], batch, work
            break
        if batch < log_end.shape[0]:
            log_tokens[batch, :] = tokens
            log_end[batch] = end
        released = 0.0
        kept = 0
        for k in range(num_live):
            i = live[k]
            if demand[DUE, i] < end - EPS_S:
                return MISSED, i, batch, work
            if tokens[i] > 0.0:
                if free < math.inf:
                    grown = growth(machine, demand, i)
                    demand[HELD, i] += grown
                    free -= grown
                gain = demand[GAIN, i]
                owe_next(demand, i, demand[DUE, i] + demand[LEAD, i] + gain * demand[TPOT, i], end + demand[GAP, i])
                demand[CONTEXT, i] += gain
                demand[OUTPUT_LEFT, i] -= gain
                if demand[OUTPUT_LEFT, i] <= 0.0:
                    released += demand[HELD, i]
                    continue
            live[kept] = i
            kept += 1
        num_live = kept
        kept = 0
        for k in range(num_prompts):
            i = prompts[k]
            if demand[DEADLINE, i] < end - EPS_S:
                return MISSED, i, batch, work
            if tokens[i] > 0.0:
                if demand[HELD, i] == 0.0:
                    demand[HELD, i] = demand[START, i]
                    free -= demand[START, i]
                demand[LEFT, i] -= tokens[i]
                demand[CONTEXT, i] += tokens[i]
                if demand[LEFT, i] <= 0.0:
                    finished_at[i] = end
                    origin = max(demand[DEADLINE, i], end) if math.isfinite(demand[DEADLINE, i]) else end
                    burst = demand[GAIN, i] if machine.phase_is_gain else 1.0
                    owe_next(demand, i, origin + demand[TPOT, i] * burst, end + demand[GAP, i])
                    demand[OUTPUT_LEFT, i] -= 1.0
                    if demand[OUTPUT_LEFT, i] <= 0.0:
                        released += demand[HELD, i]
                    else:
                        live[num_live] = i
                        num_live += 1
                    continue
            prompts[kept] = i
            kept += 1
        num_prompts = kept
        if free < -EPS_S:
            return FULL, -1, batch, work
        free += released
        now = end
        batch += 1
    outcome, more = walk_decodes(machine, demand, live[:num_live], free, now)
    return outcome, -1, batch, work + more


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
    work_budget: WorkBudget,
    *,
    run_ahead: bool,
    log_batches: int = 0,
    until_s: float = -math.inf,
    head: tuple[FloatArray, float] | None = None,
) -> DryRun:
    """Run a copy of `demand` to its end, in batches until `until_s` at least; `head`: the first one and its end."""
    num_requests = demand.shape[1]
    finished_at = np.full(num_requests, math.inf)
    log_tokens, log_end = np.zeros((log_batches, num_requests)), np.zeros(log_batches)
    head_tokens, head_end = head or (NO_BATCH, -math.inf)
    outcome, _, batches, work = run(
        machine, demand.copy(), run_ahead, now_s, until_s, work_budget.left, head_tokens, head_end,
        finished_at, log_tokens, log_end,
    )  # fmt: skip
    work_budget.spent += int(work)
    return DryRun(
        outcome=int(outcome), finished_at=finished_at, log_tokens=log_tokens[:batches], log_end=log_end[:batches]
    )
