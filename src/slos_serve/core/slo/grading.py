"""Many streams graded at once: the rule of `deadlines.StreamGrader` as compiled passes over an array of their states.

A row of `GRADE_DTYPE` is the state of one grader. It is put into the array when its stream begins
(`StreamGrader.state`), moved here with every chunk of output, and given back to a grader where the stream ends: what
decides about a promise is written twice, and a property test holds the two to the same states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.slo.deadlines import CHECK_EVERY, TOLERANCE_S, granted_s

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Rows

GRADER = [  # the fields of `StreamGrader`, in the order of its state
    ("answer_late", np.bool_),
    ("arrival_s", np.float64),
    ("e2e_late", np.bool_),
    ("e2e_s", np.float64),
    ("first", np.float64),
    ("gap_late", np.bool_),
    ("gap_s", np.float64),
    ("granted_start", np.float64),
    ("last", np.float64),
    ("next_check", np.int64),
    ("num_thinking", np.int64),
    ("paced", np.bool_),
    ("prefill_late", np.bool_),
    ("ring", np.float64, (CHECK_EVERY,)),
    ("still_thinking", np.bool_),
    ("thinking_late", np.bool_),
    ("thinking_tpot_s", np.float64),
    ("tpot_s", np.float64),
    ("ttft_s", np.float64),
    ("window_late", np.bool_),
    ("window_s", np.float64),
    ("missed", np.bool_),
    ("num_output_tokens", np.int64),
]
GRADE_DTYPE = np.dtype(GRADER)
NOBODY = -1  # the row of a chunk that nobody grades

_granted_s = jit(granted_s)


@jit
def feed_row(live: Rows, row: int, time_s: float, num_new_tokens: int, num_new_thinking_tokens: int) -> None:
    """Do to a row what `StreamGrader.feed` does."""
    t = time_s - live["arrival_s"][row]
    before = live["num_output_tokens"][row]
    after = before + num_new_tokens
    live["num_output_tokens"][row] = after
    if live["still_thinking"][row]:
        live["num_thinking"][row] += min(max(num_new_thinking_tokens, 0), num_new_tokens)
        live["still_thinking"][row] = live["num_thinking"][row] == after
    if before == 0:
        ttft_s = live["ttft_s"][row]
        live["first"][row] = t
        if t > ttft_s + TOLERANCE_S:
            live["prefill_late"][row] = live["missed"][row] = True
        live["granted_start"][row] = t if ttft_s == np.inf else max(t, ttft_s)
    elif t - live["last"][row] > live["gap_s"][row]:
        live["gap_late"][row] = True
        _mark(live, row, before + 1)
    live["last"][row] = t
    if t > live["e2e_s"][row]:
        live["e2e_late"][row] = live["missed"][row] = True
    if live["paced"][row]:
        if after >= live["next_check"][row]:
            _check(live, row, t, after)
        if not live["window_late"][row]:
            _slide(live, row, t, before, after)


@jit
def _mark(live: Rows, row: int, n: int) -> None:
    live["missed"][row] = True
    if n <= live["num_thinking"][row]:
        live["thinking_late"][row] = True
    else:
        live["answer_late"][row] = True


@jit
def _check(live: Rows, row: int, t: float, after: int) -> None:
    first, thinking = live["next_check"][row], live["num_thinking"][row]
    thinking_tpot_s, tpot_s = live["thinking_tpot_s"][row], live["tpot_s"][row]
    live["next_check"][row] = after - after % CHECK_EVERY + CHECK_EVERY
    limit = t - live["granted_start"][row] - TOLERANCE_S
    if limit > _granted_s(first, thinking, thinking_tpot_s, tpot_s):
        _mark(live, row, first)
        answer = (thinking // CHECK_EVERY + 1) * CHECK_EVERY
        if first < answer <= after and limit > _granted_s(answer, thinking, thinking_tpot_s, tpot_s):
            _mark(live, row, answer)


@jit
def _slide(live: Rows, row: int, t: float, before: int, after: int) -> None:
    ring, thinking = live["ring"], live["num_thinking"][row]
    thinking_tpot_s, tpot_s = live["thinking_tpot_s"][row], live["tpot_s"][row]
    if after == before + 1 and before - thinking >= CHECK_EVERY:
        slot = after % CHECK_EVERY
        live["window_late"][row] = t - ring[row, slot] > live["window_s"][row]
        ring[row, slot] = t
        return
    for n in range(before + 1, min(after, before + CHECK_EVERY) + 1):
        slot = n % CHECK_EVERY
        if n > CHECK_EVERY:
            fast = min(max(thinking + CHECK_EVERY + 1 - n, 0), CHECK_EVERY)
            granted = _granted_s(CHECK_EVERY + 1, fast, thinking_tpot_s, tpot_s)
            live["window_late"][row] = live["window_late"][row] or t - ring[row, slot] > granted + TOLERANCE_S
        ring[row, slot] = t


@jit
def feed_rows(grades: Rows, rows: IntArray, counts: IntArray, thinking: IntArray, time_s: float) -> IntArray:
    """Feed each of the `rows` a chunk of so many tokens, `thinking` of them, that came at `time_s`.

    Returns the positions of those about which there is news: their first token has come, or their SLO was missed now.
    """
    news, count = np.empty(len(rows), np.int64), 0
    for k in range(len(rows)):
        row = rows[k]
        if row == NOBODY or counts[k] <= 0:
            continue
        had_begun, had_missed = grades["num_output_tokens"][row] > 0, grades["missed"][row]
        feed_row(grades, row, time_s, counts[k], thinking[k])
        if not had_begun or grades["missed"][row] != had_missed:
            news[count] = k
            count += 1
    return news[:count]
