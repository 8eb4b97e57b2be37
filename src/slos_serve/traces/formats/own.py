"""Our columns as CSV: `arrived_at_s` (seconds or a time stamp), `prompt_tokens`, `output_tokens`, and optional ones.

Optional: `thinking_tokens`, `cached_tokens`, `turn`, `session_id`, `slo_class`. The reader of last resort for tables:
it says which column is missing.
"""

from __future__ import annotations

from slos_serve.traces.registry import FALLBACK, Format
from slos_serve.traces.rows import COUNTS, LABELS, REQUIRED, ReadOptions, Rows
from slos_serve.traces.source import Source
from slos_serve.traces.tables import require, table_rows

NAMES = {name: name for name in (*REQUIRED, *COUNTS, *LABELS)}


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows of a table in our columns."""
    require(source, NAMES)
    return table_rows(source, options, NAMES)


FORMAT = Format(
    name="slos-serve CSV", time_name="arrived_at_s", matches=lambda source: not source.is_json, rows=rows, rank=FALLBACK
)
