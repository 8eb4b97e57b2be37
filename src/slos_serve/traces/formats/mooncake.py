"""Mooncake: whole milliseconds on ticks of some seconds, blocks of 512 tokens.

Requests of one tick are spread evenly until the next. AIPerf and Dynamo read and write the same lines.
"""

from __future__ import annotations

from slos_serve.traces.lines import (
    LENGTH_FIELDS,
    TIME,
    TOO_FAST_RPS,
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

BLOCK_TOKENS = 512


def matches(source: Source) -> bool:
    """Tell whether lines have Mooncake's fields, and ids for blocks of 512 tokens."""
    return source.is_json and source.names >= LENGTH_FIELDS and block_tokens_of(source) == BLOCK_TOKENS


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows; `ValueError` where the times are unlike milliseconds."""
    times = times_of(source, TIME)
    if options.time_unit is None and times and epoch_unit(times[0]) is None:
        if have_fractions(times):
            raise ask_for_unit(source, "blocks of 512 tokens come with ms, fractions with s")
        if rate_in_seconds(times) * 1e3 > TOO_FAST_RPS and len(times) > 2:
            raise ask_for_unit(source, f"as ms, {rate_in_seconds(times) * 1e3:.0f} requests would come each second")
    return length_rows(source, options, unit=choose_unit(source, options, "ms"))


FORMAT = Format(name="Mooncake", time_name=TIME, matches=matches, rows=rows, on_ticks=True, rank=GENERAL)
