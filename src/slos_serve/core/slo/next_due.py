"""When the next token of each live request is due, over the rows of a `RequestTable`: the deadlines a planner reads.

They are those of `deadlines`, for the token that comes next. Any token may turn out to be the last, so each is
due at due(n). An `e2e` promise becomes a deadline through the predicted output length P: token n is due at

    e2e_deadline - (P - n) * pace,    pace = min(tpot, 0.5 * (e2e_deadline - arrival) / P)

so that the tokens behind it still fit; without a TPOT, half of the span is left for queue and prefill. Time gained is
kept: only the last token has a deadline of its own.

`min_token_s`: the least time that an output token takes on this replica; it only moves the first token of a
request with an `e2e` promise forward, so that the others can follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.slo.deadlines import granted_s
from slos_serve.core.types import Tier

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.types import Rows

PROMISED = int(Tier.PROMISED)


@jit
def _thinking_tpot(rows: Rows, i: int) -> float:
    """Return the TPOT of thinking tokens: that of the answer where it has none of its own."""
    own: float = rows["thinking_tpot_s"][i]
    return own if math.isfinite(own) else float(rows["tpot_s"][i])


@jit
def _e2e_pace(rows: Rows, i: int, min_token_s: float) -> float:
    """Return the seconds per token that the `e2e` promise of row `i` leaves."""
    promised = float(rows["tpot_s"][i])
    if rows["is_thinking"][i] != 0:
        promised = max(_thinking_tpot(rows, i), promised)
    total = max(rows["predicted_output_tokens"][i], rows["num_output_tokens"][i] + 1.0)
    share: float = 0.5 * (rows["e2e_deadline_s"][i] - rows["arrival_s"][i]) / total
    return max(min(promised, share), min_token_s)


@jit
def row_pace(rows: Rows, i: int, min_token_s: float) -> float:
    """Return `pace_s` of one row."""
    pace = _thinking_tpot(rows, i) if rows["is_thinking"][i] != 0 else float(rows["tpot_s"][i])
    if math.isfinite(rows["e2e_deadline_s"][i]):
        pace = min(pace, _e2e_pace(rows, i, min_token_s))
    return pace


@jit
def row_due(rows: Rows, i: int, min_token_s: float) -> float:
    """Return `next_due_s` of one row."""
    return min(row_scheduled(rows, i, min_token_s), row_silence_ends(rows, i))


@jit
def row_silence_ends(rows: Rows, i: int) -> float:
    """Return when the longest silence that row `i` bears is over; `inf` before its first token."""
    return float(rows["last_token_s"][i] + rows["max_gap_s"][i]) if rows["num_output_tokens"][i] > 0 else math.inf


@jit
def row_scheduled(rows: Rows, i: int, min_token_s: float) -> float:
    """Return when the next token of row `i` is due by its paces alone."""
    produced, thinking = rows["num_output_tokens"][i], rows["num_thinking_tokens"][i]
    deadline = float(rows["ttft_deadline_s"][i])
    due = deadline
    if produced > 0:
        first = float(rows["first_token_s"][i])
        due = max(deadline, first) if math.isfinite(deadline) else first
        due += granted_s(produced + 1, thinking, _thinking_tpot(rows, i), float(rows["tpot_s"][i]))
    e2e = float(rows["e2e_deadline_s"][i])
    if math.isfinite(e2e):
        after_next = max(rows["predicted_output_tokens"][i] - produced - 1.0, 0.0)
        due = min(due, e2e - after_next * _e2e_pace(rows, i, min_token_s))
    return due


@jit
def pace_s(rows: Rows, min_token_s: float = 0.0) -> FloatArray:
    """Return the seconds per output token that each row must hold from now on; `inf` where it need not.

    The TPOT of the span it is in, or the pace that its `e2e` promise asks for, if that is faster:
    deadlines of `next_due_s` with the same `min_token_s` are as far apart. Shape (len(rows),).
    """
    paces = np.empty(len(rows))
    for i in range(len(rows)):
        paces[i] = row_pace(rows, i, min_token_s)
    return paces


@jit
def next_due_s(rows: Rows, min_token_s: float = 0.0) -> FloatArray:
    """Return when the next output token of each row is due; `inf` where nothing is promised about it.

    A row that has already `missed` gets its deadlines all the same. Shape (len(rows),).
    """
    dues = np.empty(len(rows))
    for i in range(len(rows)):
        dues[i] = row_due(rows, i, min_token_s)
    return dues


@jit
def is_late(rows: Rows, i: int, now_s: float) -> bool:
    """Tell whether the SLO of row `i` can no longer be met: a token was late, or the promised first one is."""
    if rows["missed"][i] != 0:
        return True
    # No token has told the grader yet. What has no promise is told "deadline-passed" instead.
    waits = rows["tier"][i] == PROMISED and rows["num_output_tokens"][i] == 0
    return bool(waits and rows["ttft_deadline_s"][i] < now_s)
