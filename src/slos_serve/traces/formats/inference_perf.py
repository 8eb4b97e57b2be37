"""inference-perf's `per_request_lifecycle_metrics.json`: an array, seconds of a clock that begins anywhere."""

from __future__ import annotations

from typing import Any

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import FAILED, ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

START = "start_time"
PROMPT = (("info", "input_tokens"), ("input_tokens",), ("request_metrics", "text", "input_tokens"))
OUTPUT = (("info", "output_tokens"), ("output_tokens",), ("response_metrics", "output_tokens"))


def matches(source: Source) -> bool:
    """Tell whether entries have a start, an end and what was sent or measured."""
    names = source.names
    return source.is_json and {START, "end_time"} <= names and bool(names & {"info", "request", "request_metrics"})


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the requests; those with an error or without lengths failed."""
    clock = TraceClock(options.time_unit or "s", source.notes)
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        at_s = clock.seconds(where, START, entry.get(START))
        prompt, output = _first(entry, PROMPT), _first(entry, OUTPUT)
        if entry.get("error") or prompt is None or not output:
            yield Row(line, at_s, 0, 0, left_out=FAILED)
        else:
            yield Row(line, at_s, whole(where, "input_tokens", prompt), whole(where, "output_tokens", output))


def _first(entry: dict[str, Any], paths: tuple[tuple[str, ...], ...]) -> object:
    """Return what the first of several places holds; newer and older versions differ in where."""
    for path in paths + tuple(("info", *path) for path in paths):
        found: Any = entry
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


FORMAT = Format(name="inference-perf result", time_name=START, matches=matches, rows=rows, is_sorted=False)
