"""Step records: one JSON line for each engine step, what a performance model is fitted from."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("vllm.slos_serve")

MAX_BUFFERED = 10_000


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch computes, in the terms of the performance model (see `core.perf`)."""

    num_tokens: int
    num_requests: int
    context_tokens: int
    draft_steps: int
    attention_pairs: float
    has_prefill: bool


class StepRecorder:
    """Append step records to a file; buffered, and silent after the first error of the disk.

    Thread-safe where one thread adds and another flushes.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.num_dropped = 0
        self._buffer: deque[dict[str, Any]] = deque()
        self._is_broken = False

    def add(  # noqa: PLR0917 - one column each
        self,
        step: int,
        time_s: float,
        shape: BatchShape,
        seconds: float,
        planned_s: float | None,
        predicted_s: float | None,
    ) -> None:
        """Keep one step; times in seconds, None where there was no plan or no model."""
        if self.path is None or self._is_broken:
            return
        if len(self._buffer) >= MAX_BUFFERED:
            self.num_dropped += 1
            return
        self._buffer.append(
            {
                "step": step,
                "t": round(time_s, 6),
                "num_tokens": shape.num_tokens,
                "num_requests": shape.num_requests,
                "context_tokens": shape.context_tokens,
                "draft_steps": shape.draft_steps,
                "attention_pairs": round(shape.attention_pairs, 1),
                "has_prefill": int(shape.has_prefill),
                "seconds": round(seconds, 7),
                "planned_s": None if planned_s is None else round(planned_s, 7),
                "predicted_s": None if predicted_s is None else round(predicted_s, 7),
            }
        )

    def flush(self) -> None:
        """Write what is buffered."""
        if not self._buffer or self.path is None or self._is_broken:
            return
        lines = [self._buffer.popleft() for _ in range(len(self._buffer))]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            self._is_broken = True
            logger.warning("slos-serve: step records stop, %s cannot be written: %s", self.path, error)
