"""ServeGen's own files hold rates and distributions, no requests; says how to make a trace with it."""

from __future__ import annotations

import re

from slos_serve.traces.registry import GENERAL, Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source

_RATES = re.compile(r"\b(rate|cv|shape|scale|burst\w*)\b", re.IGNORECASE)
_DISTRIBUTIONS = frozenset({"input_tokens", "output_tokens"})


def matches(source: Source) -> bool:
    """Tell whether a table has rates in place of lengths, or an object distributions in place of requests."""
    if not source.is_json:
        names = " ".join(source.header).casefold()
        return "token" not in names and len(_RATES.findall(names)) > 1
    values = [value for entry in source.sample[:1] for value in entry.values()]
    nested = [value for value in values if isinstance(value, dict) and _DISTRIBUTIONS & value.keys()]
    first = source.sample[0] if source.sample else {}
    return bool(nested) or any(isinstance(first.get(name), (dict, str)) for name in _DISTRIBUTIONS)


def rows(source: Source, options: ReadOptions) -> Rows:  # noqa: ARG001
    """Refuse, in one line that says what to do."""
    raise ValueError(
        f"{source.path}: rates and length distributions of a workload generator, no requests: let it generate, and "
        "write a CSV with arrived_at_s (seconds), prompt_tokens, output_tokens"
    )


FORMAT = Format(name="generator's tables", time_name="timestamp", matches=matches, rows=rows, rank=GENERAL)
