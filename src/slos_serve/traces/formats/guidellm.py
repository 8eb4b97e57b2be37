"""guidellm's `trace_synthetic`, and other lines with times and lengths alone: seconds with a fraction, in any order.

Without block ids nothing in a line tells seconds from milliseconds but its numbers; where those leave it open, the
user is asked.
"""

from __future__ import annotations

from slos_serve.traces.lines import (
    LENGTH_FIELDS,
    TIME,
    TOO_FAST_RPS,
    TOO_SLOW_RPS,
    ask_for_unit,
    block_tokens_of,
    choose_unit,
    has_blocks,
    have_fractions,
    length_rows,
    rate_in_seconds,
    times_of,
)
from slos_serve.traces.registry import GENERAL, Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source

ELSEWHERE = (512, 16)  # block sizes whose files say the unit


def matches(source: Source) -> bool:
    """Tell whether lines have times and lengths, and no block ids that say the unit."""
    return source.is_json and source.names >= LENGTH_FIELDS and block_tokens_of(source) not in ELSEWHERE


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows; `ValueError` where the unit cannot be told."""
    times = times_of(source, TIME)
    unit = choose_unit(source, options, None)
    if unit is None and not has_blocks(source):
        too_fast = rate_in_seconds(times) * 1e3 > TOO_FAST_RPS
        too_slow = 0 < rate_in_seconds(times) < TOO_SLOW_RPS
        if (have_fractions(times) and not too_slow) or (too_fast and len(times) > 2):
            unit = "s"
            why = "as ms they would come too fast" if too_fast else "they have fractions"
            source.notes.append(f"{TIME} read as seconds: {why} (--time-unit ms if they are not)")
    if unit is None and len(set(times)) > 1:
        why = (
            "no block ids, and numbers that may be either"
            if not has_blocks(source)
            else "blocks of neither 512 nor 16 tokens"
        )
        raise ask_for_unit(source, why)
    return length_rows(source, options, unit=unit)


FORMAT = Format(name="guidellm trace", time_name=TIME, matches=matches, rows=rows, is_sorted=False, rank=GENERAL)
