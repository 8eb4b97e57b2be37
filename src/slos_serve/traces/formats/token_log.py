"""Logs of calls with token counts, as Azure OpenAI exports them: `timestamp [UTC],input_tokens,output_tokens`.

Also written `timestamp,input_tokens,output_tokens`, by workload generators too. Rows may be newest first; a call
without output failed. Numbers that are no epoch times have no unit of their own: the user must say it.
"""

from __future__ import annotations

from itertools import chain

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Rows, epoch_unit
from slos_serve.traces.source import Source
from slos_serve.traces.tables import has_columns, table_rows

TIMES = ("timestamp [UTC]", "timestamp")


def matches(source: Source) -> bool:
    """Tell whether the table has a time stamp and the two counts."""
    return has_columns(source, "input_tokens", "output_tokens") and any(has_columns(source, name) for name in TIMES)


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows as they stand; `ValueError` where the unit of the times cannot be told."""
    time = next(name for name in TIMES if has_columns(source, name))
    names = {"arrived_at_s": time, "prompt_tokens": "input_tokens", "output_tokens": "output_tokens"}
    place = [name.casefold() for name in source.header].index(time.casefold())
    table = source.table()
    first = next(table, None)
    if first is None:
        return iter(())
    if options.time_unit is None and ":" not in first[1][place] and not _is_epoch(first[1][place]):
        raise ValueError(
            f"{source.path}: the unit of {time!r} cannot be told: say --time-unit s, ms, us or ns, "
            "or rename the columns to arrived_at_s (in seconds), prompt_tokens, output_tokens"
        )
    return table_rows(source, options, names, empty_is_failed=True, cells=chain([first], table))


def _is_epoch(text: str) -> bool:
    try:
        return epoch_unit(float(text)) is not None
    except ValueError:
        return True  # no number at all: reading it names the value


FORMAT = Format(name="log of calls", time_name="timestamp", matches=matches, rows=rows, is_sorted=False)
