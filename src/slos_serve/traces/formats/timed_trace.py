"""vLLM's `timed_trace`: the same fields as Mooncake's, by default in seconds with blocks of 16 tokens."""

from __future__ import annotations

from slos_serve.traces.lines import (
    LENGTH_FIELDS,
    TIME,
    TOO_SLOW_RPS,
    ask_for_unit,
    block_tokens_of,
    choose_unit,
    have_fractions,
    length_rows,
    rate_in_seconds,
    times_of,
)
from slos_serve.traces.registry import GENERAL, Format
from slos_serve.traces.rows import ReadOptions, Rows, epoch_unit
from slos_serve.traces.source import Source

BLOCK_TOKENS = 16


def matches(source: Source) -> bool:
    """Tell whether lines have the fields, and ids for blocks of 16 tokens."""
    fields = source.names
    return fields >= LENGTH_FIELDS and "chat_id" not in fields and block_tokens_of(source) == BLOCK_TOKENS


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows; `ValueError` where the times look like milliseconds."""
    times = times_of(source, TIME)
    rate = rate_in_seconds(times)
    known = options.time_unit is not None or not times or epoch_unit(times[0]) is not None
    if not known and not have_fractions(times) and 0 < rate < TOO_SLOW_RPS:
        raise ask_for_unit(source, f"as seconds, one request would come each {1 / rate:.0f} s")
    return length_rows(source, options, unit=choose_unit(source, options, "s"))


FORMAT = Format(name="vLLM timed_trace", time_name=TIME, matches=matches, rows=rows, is_sorted=False, rank=GENERAL)
