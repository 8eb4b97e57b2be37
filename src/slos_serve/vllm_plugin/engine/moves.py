"""Which rows vLLM may have moved since the last plan, and what it did with them; the queue is never walked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.moves import move_rows
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.core.types import IntArray, RequestTable


class Moves:
    """Keep the columns that vLLM moves up to date, for the requests of `table` that run or ran.

    `left`: tokens that vLLM will still schedule, in row order, as of the last `step`.
    """

    def __init__(self, scheduler: Any, table: RequestTable, *, is_async: bool) -> None:
        self._scheduler = scheduler
        self._table = table
        self._is_async = is_async
        self._block_size = int(scheduler.block_size)
        self._begun: dict[str, Request] = {}
        self._ends: IntArray = np.zeros(64, np.int64)  # prompt and output tokens at vLLM's limit, in row order
        self._left: IntArray = np.zeros(64, np.int64)
        self._told_s = math.nan  # when what was in flight at the last step was expected to end

    @property
    def left(self) -> IntArray:
        """Tokens that vLLM will still schedule for each row, shape (rows,)."""
        return self._left[: len(self._table)]

    def add(self, request: Request, index: int) -> None:
        """Take up a request that has got row `index`, the last one."""
        if index == len(self._ends):
            self._ends, self._left = np.tile(self._ends, 2), np.tile(self._left, 2)
        self._ends[index] = request.num_prompt_tokens + request.max_tokens
        self._left[index] = request.max_tokens
        if view.has_run(request):
            self._begun[request.request_id] = request

    def remove(self, request_id: str, index: int) -> None:
        """Forget the request whose row `index` has just gone; the last row is in its place."""
        self._begun.pop(request_id, None)
        last = len(self._table)
        self._ends[index], self._left[index] = self._ends[last], self._left[last]

    def step(self, ends_s: float, last_s: float) -> IntArray:
        """Refresh the columns; return the rows whose output has reached its predicted length.

        `ends_s`: when what is in flight is expected to end. `last_s`: when the newest output came.
        """
        begun, table = self._begun, self._table
        for request in self._scheduler.running:
            if request.request_id not in begun and request.request_id in table:
                begun[request.request_id] = request
        told_s, self._told_s = self._told_s, ends_s if self._is_async else math.nan
        seen = view.seen(list(begun.values()), is_async=self._is_async)
        index, rows = table.find(list(begun)), table.rows
        return move_rows(rows, index, seen, self._ends, self._left, self._block_size, last_s, ends_s, told_s)
