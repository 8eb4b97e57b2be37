"""Tokens that leave the engine: graded all at once, in one compiled pass over the states of their graders.

Python touches a request when its first token comes, while it thinks, when its SLO is missed, and when it ends. A
request that asked for nothing is looked at until its first token has come, and counted when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.slo.grading import GRADE_DTYPE, NOBODY, feed_rows

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, RequestTable, Rows
    from slos_serve.vllm_plugin.engine.live import Live

NO_SPANS: Mapping[str, int] = {}
_id_of, _tokens_of = attrgetter("request_id"), attrgetter("new_token_ids")


class Outputs:
    """Grade the output of live requests. `last_s`: when the last output came, in seconds on the engine's clock."""

    def __init__(self, table: RequestTable, now_s: float) -> None:
        self.grades: Rows = np.zeros(64, GRADE_DTYPE)
        self.thinking_end: frozenset[int] = frozenset()
        self.last_s = now_s
        self._table = table
        self._free = list(range(len(self.grades)))
        self._rows: dict[str, int] = {}
        self._graded: dict[str, Live] = {}
        self._silent: dict[str, Live] = {}  # who asked for nothing and has no token yet
        self._thinking: dict[str, Live] = {}
        # of the last output, which most are like
        self._ids: list[str] = []
        self._lengths: list[int] = []
        self._index: IntArray = np.zeros(0, np.int64)
        self._counts: IntArray = np.zeros(0, np.int64)
        self._none: IntArray = np.zeros(0, np.int64)

    def watch(self, live: Live) -> None:
        """Take up a request, or one that has only now got its promises; nothing of it is out yet."""
        request_id = live.request_id
        if live.is_thinking:
            self._thinking[request_id] = live
        if live.grader is None:
            self._silent[request_id] = live
            return
        self._silent.pop(request_id, None)
        row = self._rows[request_id] = self._free_row()
        self.grades[row] = live.grader.state
        self._graded[request_id] = live
        self._ids = []

    def _free_row(self) -> int:
        if not self._free:
            count = len(self.grades)
            self._free = list(range(count, 2 * count))
            self.grades = np.concatenate([self.grades, np.zeros(count, GRADE_DTYPE)])
        return self._free.pop()

    def leave(self, live: Live) -> None:
        """Forget a request, and write down how it did."""
        request_id = live.request_id
        self._silent.pop(request_id, None)
        self._thinking.pop(request_id, None)
        row = self._rows.pop(request_id, None)
        if row is not None and live.grader is not None:
            del self._graded[request_id]
            self._ids = []
            self._free.append(row)
            live.grader.state = self.grades[row].item()
            live.num_output_tokens, live.last_token_s = live.grader.num_output_tokens, live.grader.last_token_s
        elif live.has_begun:
            live.num_output_tokens, live.last_token_s = len(live.request.output_token_ids), self.last_s

    def delay(self, live: Live, seconds: float) -> None:
        """Move all that a request was promised so far back."""
        row = self._rows.get(live.request_id)
        if row is not None:
            self.grades["arrival_s"][row] += seconds

    def take(self, outputs: Sequence[Any], now_s: float) -> None:
        """Grade the chunks of output (vLLM's per-request outputs) that leave the engine now."""
        self.last_s = now_s
        spans = self._take_spans(outputs) if self._thinking else NO_SPANS
        if self._silent:
            self._take_silent(outputs, now_s)
        if not self._rows:
            return
        ids = list(map(_id_of, outputs))
        lengths = list(map(len, map(_tokens_of, outputs)))
        if ids != self._ids or lengths != self._lengths:
            self._lay_out(ids, lengths)
        thinking = np.array([spans.get(one, 0) for one in ids], np.int64) if spans else self._none
        for position in feed_rows(self.grades, self._index, self._counts, thinking, now_s).tolist():
            self._note(ids[position], now_s)

    def _lay_out(self, ids: list[str], lengths: list[int]) -> None:
        """Keep whom an output is for, and how much of it, as columns."""
        self._ids, self._lengths = ids, lengths
        self._index = np.fromiter(map(self._rows.get, ids, repeat(NOBODY)), np.int64, len(ids))
        self._counts = np.array(lengths, np.int64)
        self._none = np.zeros(len(ids), np.int64)

    def _note(self, request_id: str, now_s: float) -> None:
        """Take the news of a graded request: it has begun, or it has missed its SLO."""
        live, row = self._graded[request_id], self._rows[request_id]
        if not live.has_begun:
            self._begin(live, now_s)
        if self.grades["missed"][row] and not live.missed:
            live.missed, live.missed_at = True, int(self.grades["num_output_tokens"][row])
            if live.has_row:
                self._table.rows["missed"][self._table.index(request_id)] = 1

    def _begin(self, live: Live, now_s: float) -> None:
        live.first_token_s = now_s
        if live.has_row:
            self._table.rows["first_token_s"][self._table.index(live.request_id)] = now_s

    def _take_silent(self, outputs: Sequence[Any], now_s: float) -> None:
        """Note the first tokens of those who asked for nothing."""
        silent = self._silent
        for output in outputs:
            if output.request_id in silent and output.new_token_ids:
                self._begin(silent.pop(output.request_id), now_s)

    def _take_spans(self, outputs: Sequence[Any]) -> dict[str, int]:
        """Return how many tokens of each chunk were thought, where any were."""
        chunks = {output.request_id: output.new_token_ids for output in outputs if output.request_id in self._thinking}
        return {request_id: self._think(request_id, tokens) for request_id, tokens in chunks.items() if tokens}

    def _think(self, request_id: str, token_ids: list[int]) -> int:
        """Count the thinking tokens of a chunk, the end mark included."""
        live, thinking = self._thinking[request_id], len(token_ids)
        for position, token in enumerate(token_ids, 1):
            if token in self.thinking_end:
                thinking, live.is_thinking = position, False
                del self._thinking[request_id]
                break
        live.num_thinking_tokens += thinking
        if live.has_row:
            rows, index = self._table.rows, self._table.index(request_id)
            rows["num_thinking_tokens"][index] = live.num_thinking_tokens
            rows["is_thinking"][index] = int(live.is_thinking)
        return thinking
