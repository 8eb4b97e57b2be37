"""Many streams graded at once: the one grader of `deadlines` over an array of their states, in a compiled pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.jit import jit
from slos_serve.core.slo.deadlines import GRADER, feed_stream

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Rows

GRADE_DTYPE = np.dtype((np.record, list(GRADER)))  # a row's fields are attributes, as the grader's are
NOBODY = -1  # the row of a chunk that nobody grades


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
        feed_stream(grades[row], time_s, counts[k], thinking[k])
        if not had_begun or grades["missed"][row] != had_missed:
            news[count] = k
            count += 1
    return news[:count]
