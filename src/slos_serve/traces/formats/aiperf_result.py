"""AIPerf's `profile_export.jsonl`: a record for each request, epoch nanoseconds, lengths as metrics."""

from __future__ import annotations

from typing import Any

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import FAILED, ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

START, PROMPT, OUTPUT = "request_start_ns", "input_sequence_length", "output_sequence_length"
WARM_UP = "of the warm-up"


def matches(source: Source) -> bool:
    """Tell whether lines have AIPerf's two groups, with a start among the first."""
    return source.is_json and any(START in _group(entry, "metadata") for entry in source.sample)


def _group(entry: dict[str, Any], name: str) -> dict[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, dict) else {}


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the requests; those that failed, were cancelled or belong to the warm-up are left out."""
    clock = TraceClock(options.time_unit or "ns", source.notes)
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        about = _group(entry, "metadata")
        at_s = clock.seconds(where, START, about.get(START))
        prompt, output = _value(entry, PROMPT), _value(entry, OUTPUT)
        left_out = WARM_UP if about.get("benchmark_phase") == "warmup" else ""
        if entry.get("error") or about.get("was_cancelled") or prompt is None or not output:
            left_out = left_out or FAILED
        if left_out:
            yield Row(line, at_s, 0, 0, left_out=left_out)
            continue
        yield Row(
            line,
            at_s,
            whole(where, PROMPT, prompt),
            whole(where, OUTPUT, output),
            turn=whole(where, "turn_index", about.get("turn_index") or 0),
            session_id=str(about.get("conversation_id") or ""),
        )


def _value(entry: dict[str, Any], name: str) -> object:
    metric = _group(entry, "metrics").get(name)
    return metric.get("value") if isinstance(metric, dict) else metric


FORMAT = Format(name="AIPerf result", time_name=START, matches=matches, rows=rows, is_sorted=False)
