"""What `slos-serve serve --record FILE` wrote: its lines of kind `request`, of the last run in the file."""

from __future__ import annotations

from slos_serve.traces.lines import require
from slos_serve.traces.registry import Format
from slos_serve.traces.rows import FAILED, ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

STEP_FIELDS = frozenset({"num_tokens", "num_requests", "seconds"})
NO_SLO = "best-effort"


def matches(source: Source) -> bool:
    """Tell whether lines are steps or facts of a record."""
    return source.is_json and (source.names >= STEP_FIELDS or any(e.get("kind") == "engine" for e in source.sample))


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the requests; what failed or gave no output is left out. `ValueError` for a record of steps alone."""
    clock = TraceClock(options.time_unit or "s", source.notes)
    found: list[Row] = []
    runs = 0
    for line, entry in source.objects():
        kind = entry.get("kind")
        if kind == "engine":
            runs, found = runs + 1, []
        if kind != "request":
            continue
        where = f"{source.path}:{line}"
        output = whole(where, "num_output_tokens", require(where, entry, ("num_output_tokens",)))
        slo_class = str(entry.get("slo_class") or "")
        found.append(
            Row(
                line,
                clock.seconds(where, "arrival_s", require(where, entry, ("arrival_s",))),
                whole(where, "num_prompt_tokens", require(where, entry, ("num_prompt_tokens",))),
                output,
                min(output, whole(where, "num_thinking_tokens", entry.get("num_thinking_tokens") or 0)),
                whole(where, "num_cached_tokens", entry.get("num_cached_tokens") or 0),
                slo_class="" if slo_class == NO_SLO else slo_class,
                left_out=FAILED if not output or entry.get("outcome") in {"failed", "rejected"} else "",
            )
        )
    if not found:
        raise ValueError(f"{source.path}: a record of steps without requests: record a server with serve --record")
    if runs > 1:
        source.notes.append(f"the last of {runs} runs in the record")
    yield from found


FORMAT = Format(name="slos-serve record", time_name="arrival_s", matches=matches, rows=rows, is_sorted=False)
