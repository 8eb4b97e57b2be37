"""BurstGPT: `Timestamp` in seconds from midnight of the first day, `Request tokens`, `Response tokens`.

A failed request has no response tokens. Later files may add `Session ID`.
"""

from __future__ import annotations

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source
from slos_serve.traces.tables import has_columns, table_rows

REQUIRED = {"arrived_at_s": "Timestamp", "prompt_tokens": "Request tokens", "output_tokens": "Response tokens"}
NAMES = {**REQUIRED, "session_id": "Session ID"}


def matches(source: Source) -> bool:
    """Tell whether the table has BurstGPT's columns."""
    return has_columns(source, *REQUIRED.values())


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows, those without a response as failed."""
    return table_rows(source, options, NAMES, unit="s", empty_is_failed=True)


FORMAT = Format(name="BurstGPT", time_name="Timestamp", matches=matches, rows=rows)
