"""Azure's LLM inference traces of 2023 and 2024: `TIMESTAMP,ContextTokens,GeneratedTokens`, stamps in UTC."""

from __future__ import annotations

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source
from slos_serve.traces.tables import has_columns, table_rows

NAMES = {"arrived_at_s": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}


def matches(source: Source) -> bool:
    """Tell whether the table has Azure's columns."""
    return has_columns(source, *NAMES.values())


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows; those of equal stamps keep their order."""
    return table_rows(source, options, NAMES)


FORMAT = Format(name="Azure LLM inference trace", time_name="TIMESTAMP", matches=matches, rows=rows)
