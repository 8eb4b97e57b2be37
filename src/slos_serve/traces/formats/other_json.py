"""JSON that no other format recognises: says which field is missing. The reader of last resort for JSON."""

from __future__ import annotations

from slos_serve.traces.lines import OUTPUT, PROMPT, TIME, require
from slos_serve.traces.registry import FALLBACK, Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source


def rows(source: Source, options: ReadOptions) -> Rows:  # noqa: ARG001
    """Refuse, in one line that names the first field that is missing."""
    for line, entry in source.objects():
        for name in (TIME, PROMPT, OUTPUT):
            require(f"{source.path}:{line}", entry, (name,))
    return iter(())


FORMAT = Format(name="JSON", time_name=TIME, matches=lambda source: source.is_json, rows=rows, rank=FALLBACK)
