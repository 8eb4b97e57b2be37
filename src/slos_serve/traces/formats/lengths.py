"""Length files without arrival times, such as Vidur's and Sarathi-Serve's: for `--arrivals` to say when.

`num_prefill_tokens,num_decode_tokens` or `prompt_tokens,output_tokens`, with `thinking_tokens` and the like if any.
"""

from __future__ import annotations

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import COUNTS, LABELS, ReadOptions, Rows
from slos_serve.traces.source import Source
from slos_serve.traces.tables import has_columns, table_rows

PAIRS = (("num_prefill_tokens", "num_decode_tokens"), ("prompt_tokens", "output_tokens"))
TIMES = ("arrived_at_s", "arrived_at", "TIMESTAMP", "timestamp")
NAME = "lengths without arrival times"


def matches(source: Source) -> bool:
    """Tell whether the table has both lengths and no time."""
    return any(has_columns(source, *pair) for pair in PAIRS) and not any(has_columns(source, name) for name in TIMES)


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows, all of which arrive at 0."""
    prompt, output = next(pair for pair in PAIRS if has_columns(source, *pair))
    names = {name: name for name in (*COUNTS, *LABELS)} | {"prompt_tokens": prompt, "output_tokens": output}
    return table_rows(source, options, names)


FORMAT = Format(name=NAME, time_name="arrived_at_s", matches=matches, rows=rows)
