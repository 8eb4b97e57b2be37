"""Our `requests.jsonl`, as `slos-serve bench --out` writes it: what was offered, when, and how it ended."""

from __future__ import annotations

from slos_serve.traces.lines import require
from slos_serve.traces.registry import Format
from slos_serve.traces.rows import FAILED, ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

FIELDS = frozenset({"request_id", "sent_s", "prompt_tokens", "output_tokens"})


def matches(source: Source) -> bool:
    """Tell whether lines are rows of a bench run."""
    return source.is_json and source.names >= FIELDS


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the requests with the output that was asked for; what ended in an error failed."""
    clock = TraceClock(options.time_unit or "s", source.notes)
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        output = entry.get("asked_output_tokens") or entry.get("output_tokens")
        yield Row(
            line,
            clock.seconds(where, "sent_s", require(where, entry, ("sent_s",))),
            whole(where, "prompt_tokens", require(where, entry, ("prompt_tokens",))),
            whole(where, "output_tokens", output),
            slo_class=str(entry.get("class") or ""),
            left_out=FAILED if entry.get("error") or entry.get("outcome") in {"failed", "rejected"} else "",
        )


FORMAT = Format(name="slos-serve bench", time_name="sent_s", matches=matches, rows=rows, is_sorted=False)
