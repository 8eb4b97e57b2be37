"""What plans are computed on: the columns of a demand, the machine that serves it, and the work allowed.

A *demand* is an array of shape (`NUM_COLUMNS`, requests), requests in order of `DEADLINE`; its rows are
named below. Times are seconds, already reduced by the guard; sizes are tokens and KV blocks. Speculative
decoding is two numbers per request: a decode verifies `VERIFY` tokens and is expected to yield `GAIN` of
them, so its period is `GAIN * TPOT`. Autoregressive decoding is `VERIFY = GAIN = 1`.

`TPOT` is how far deadlines are apart, as the client wrote it. How often the engine must serve a request is another
matter: who is ahead of schedule needs batches less often. Windows, rates and loads come from `needed_s` alone, so a
promise weighs as much as the work that is due for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
LEAD = 14  # seconds from DUE until the pace alone would owe that token; above 0 where the longest silence ends first
NUM_COLUMNS = 15

# What a batch adds up to, and when it has to end.
TOKENS, REQUESTS, READ, DRAFTS, PAIRS, HAS_PREFILL, LIMIT = range(7)
NUM_TOTALS = 7

# How a run of batches ends.
KEPT, MISSED, STUCK, CUT_OFF, FULL = range(5)

EPS_S = 1e-9


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
class WorkBudget:
    """What is left of the work limit of one plan."""

    limit: int
    spent: int = 0

    @property
    def left(self) -> int:
        """Return the work still allowed."""
        return max(0, self.limit - self.spent)

    @contextmanager
    def part(self, parts: int) -> Iterator[WorkBudget]:
        """Lend one of `parts` equal parts of what is left; what is spent of it counts here too."""
        part = WorkBudget(max(1, self.left // parts))
        yield part
        self.spent += part.spent


@jit
def needed_s(demand, i, now):  # type: ignore[no-untyped-def]
    """Return how many seconds apart the batches of request `i` may be, on average to its end; inf: none need come.

    A schedule is a line: batches that far apart are in time for the last token, and so for all before it, but for the
    first. A prompt that is to be done by its deadline decodes from then on at the latest.
    """
    gain = demand[GAIN, i]
    period = gain * demand[TPOT, i]
    ahead, tokens = 0.0, demand[OUTPUT_LEFT, i]
    if demand[LEFT, i] > 0.0:
        ahead, tokens = demand[DEADLINE, i] - now, tokens - 1.0  # the prompt's batch yields the first
    elif period < math.inf:
        ahead = demand[DUE, i] + demand[LEAD, i] - now - period
    if tokens <= 0.0:
        return math.inf
    if 0.0 < ahead < math.inf:
        period += ahead / max(1.0, math.ceil(tokens / gain - 1e-9))
    return min(period, demand[GAP, i])


@jit
def owe_next(demand, i, scheduled, latest):  # type: ignore[no-untyped-def]
    """Write when decode `i` owes its next token: when `scheduled`, or `latest`, the end of its longest silence."""
    demand[DUE, i] = min(scheduled, latest)
    demand[LEAD, i] = scheduled - latest if latest < scheduled else 0.0


@jit
def needed_each(demand, now):  # type: ignore[no-untyped-def]
    """Return `needed_s` of every request, shape (requests,)."""
    needed = np.empty(demand.shape[1])
    for i in range(demand.shape[1]):
        needed[i] = needed_s(demand, i, now)
    return needed


@jit
def prefill_rate(lines, margin, budget, period, tokens, requests, read, steps):  # type: ignore[no-untyped-def]
    """Return the most prefill tokens per second beside decodes, in batches of at most `period` seconds.

    The decodes add `tokens`, `requests` and `read` context tokens per second; a batch has `steps` drafter
    steps and at most `budget` tokens, so shorter batches follow one another where the budget binds first.
    Negative where the decodes alone are too much: by how much, so that the least bad choice still wins.
    """
    length = min(period, margin * batch_seconds(lines, budget, 1.0, 0.0, steps, 0.0))
    load = tokens * length
    count = 1.0 + requests * length
    room = max_chunk_tokens(lines, length / margin, load, count, read * length, steps, 0.0, 0.0)
    if room <= 0.0:
        room = max_chunk_tokens(lines, length / margin, 0.0, count, read * length, steps, 0.0, 0.0) - load
    return min(room, budget - load) / length


def headroom(machine: Machine, demand: Demand, now_s: float) -> float:
    """Return the prefill rate that the promised decodes leave, in tokens per second."""
    periods = needed_each(demand, now_s)
    per_s = 1.0 / periods
    rate = prefill_rate(
        machine.lines,
        machine.margin_prefill,
        machine.token_budget,
        float(periods.min(initial=math.inf)),
        float((per_s * demand[VERIFY]).sum()),
        float(per_s.sum()),
        float((per_s * demand[CONTEXT]).sum()),
        float(demand[STEPS].max(initial=0.0)),
    )
    return max(0.0, float(rate))
