"""From a file to checked columns: order, window, prefix hits, and what is left out.

A window reads the file up to its end and keeps only what is in it. Times count from the file's first request.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slos_serve.traces.blocks import PrefixCache
from slos_serve.traces.registry import Format, find_format
from slos_serve.traces.rows import COUNTS, LABELS, TOO_LONG, Origin, ReadOptions, Row
from slos_serve.traces.source import Source, opened

Window = tuple[float, float]  # start and duration in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The rows of a file in order of arrival, as columns by name.

    `arrived_at_s` is on the file's clock, which shows `first_s` at its first request. `reasons`: by row, why it is
    not part of the trace, "" where it is; such rows still say when somebody came.
    """

    path: str
    format: Format
    first_s: float
    columns: dict[str, Any]
    reasons: npt.NDArray[np.str_]
    notes: tuple[str, ...]

    def origin(self, rows: npt.NDArray[np.bool_] | slice) -> Origin:
        """Return where the trace of some of the rows comes from."""
        reasons = self.reasons[rows]
        empty = int(((self.columns["output_tokens"][rows] == 0) & (reasons == "")).sum())
        said = (f"{empty} with no output, served as one token each",) if empty else ()
        left_out = Counter(reason for reason in reasons.tolist() if reason)
        return Origin(format=self.format.name, left_out=dict(left_out), notes=(*self.notes, *said))


def load(path: Path, options: ReadOptions, window: Window | None = None, num_requests: int | None = None) -> Loaded:
    """Read a file; with a window at least what is in it, with a number at least so many requests and the next.

    `ValueError` names file, line, field and value.
    """
    with opened(path) as source:
        kind = find_format(source)
        table = _Table(source, kind, options.max_total_tokens)
        reads_all = not kind.is_sorted
        enough = None if reads_all or kind.on_ticks else num_requests  # a tick is spread until the next one
        table.take(kind.rows(source, options), None if reads_all else window, enough)
        return table.done()


class _Table:
    """Rows as they come, packed into columns."""

    def __init__(self, source: Source, kind: Format, longest: int | None) -> None:
        self._source, self._kind, self._longest = source, kind, longest
        self._cache: PrefixCache | None = None
        self._first_s, self._num_kept = 0.0, 0
        self._clear()

    def _clear(self) -> None:
        self._times = array("d")
        self._counts = [array("q") for _ in COUNTS]
        self._labels: list[tuple[str, str, str]] = []  # session, class, reason

    def take(self, rows: Iterable[Row], window: Window | None, enough: int | None) -> None:
        """Add rows. With a window: only until one that comes after it, and of those before it the last tick.

        `enough`: only until one more is kept than that, in the window if there is one.
        """
        before_s = -1.0
        for row in rows:
            if self._cache is None:
                self._cache, self._first_s = PrefixCache(self._source.block_tokens), row.at_s
            elif self._kind.is_sorted and row.at_s < before_s:
                raise ValueError(
                    f"{self._source.path}:{row.line}: {self._kind.time_name} = {row.at_s:.12g} s: expected not before "
                    f"the row above ({before_s:.12g} s): sort the file by it"
                )
            if window is not None and before_s < row.at_s <= self._first_s + window[0]:
                self._clear()
            before_s = row.at_s
            self._add(row)
            start_s, end_s = (0.0, math.inf) if window is None else (window[0], sum(window))
            offset_s = row.at_s - self._first_s
            self._num_kept += offset_s >= start_s and not self._labels[-1][-1]
            if offset_s >= end_s or (enough is not None and self._num_kept > enough):
                break

    def _add(self, row: Row) -> None:
        reason, cached = row.left_out, row.cached_tokens
        if not reason and self._longest is not None and row.prompt_tokens + row.output_tokens > self._longest:
            reason = TOO_LONG
        if row.blocks and not reason and self._cache is not None:  # what is not served fills no cache
            cached = self._cache.hit_tokens(row.prompt_tokens, row.blocks)
        self._times.append(row.at_s)
        counts = (row.prompt_tokens, row.output_tokens, row.thinking_tokens, cached, row.turn)
        for column, value in zip(self._counts, counts, strict=True):
            column.append(value)
        self._labels.append((row.session_id, row.slo_class, reason))

    def done(self) -> Loaded:
        """Return the columns, in order of arrival; rows of one instant stay as they are."""
        if self._cache is None:
            raise ValueError(f"{self._source.path}: no rows: expected at least one request")
        times = np.array(self._times)
        order = np.argsort(times, kind="stable")
        labels = np.array(self._labels, np.str_).reshape(-1, len(LABELS) + 1)[order]
        columns: dict[str, Any] = {"arrived_at_s": times[order]}
        columns.update({name: np.array(c)[order] for name, c in zip(COUNTS, self._counts, strict=True)})
        columns.update({name: labels[:, i] for i, name in enumerate(LABELS)})
        return Loaded(
            path=self._source.path,
            format=self._kind,
            first_s=self._first_s if self._kind.is_sorted else float(times.min()),
            columns=columns,
            reasons=labels[:, -1],
            notes=tuple(self._source.notes),
        )
