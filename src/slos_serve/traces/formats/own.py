"""Our columns as CSV: `arrived_at_s` (seconds or a time stamp), `prompt_tokens`, `output_tokens`, and optional ones.

Optional: `thinking_tokens`, `cached_tokens`, `turn`, `session_id`, `slo_class`. The reader of last resort for tables:
it says which column is missing.
"""

from __future__ import annotations

from slos_serve.traces.registry import FALLBACK, Format
from slos_serve.traces.rows import COUNTS, LABELS, REQUIRED, ReadOptions, Rows
from slos_serve.traces.source import Source
from slos_serve.traces.tables import has_columns, require, table_rows

ELSEWHERE = {  # what others call the lengths, where only the time column is ours
    "prompt_tokens": ("num_prefill_tokens", "ContextTokens", "input_tokens"),
    "output_tokens": ("num_decode_tokens", "GeneratedTokens"),
}


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows of a table in our columns."""
    names = {name: _called(source, name) for name in (*REQUIRED, *COUNTS, *LABELS)}
    require(source, names)
    return table_rows(source, options, names)


def _called(source: Source, name: str) -> str:
    return next((one for one in (name, *ELSEWHERE.get(name, ())) if has_columns(source, one)), name)


FORMAT = Format(
    name="slos-serve CSV", time_name="arrived_at_s", matches=lambda source: not source.is_json, rows=rows, rank=FALLBACK
)
