"""Results of `vllm bench serve --save-result --save-detailed`: one object with a list for each quantity."""

from __future__ import annotations

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import FAILED, ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

LISTS = ("start_times", "input_lens", "output_lens")
MARKS = frozenset({"request_throughput", "mean_ttft_ms", "total_input_tokens", "request_goodput"})


def matches(source: Source) -> bool:
    """Tell whether the object has the lists of a detailed result, or at least the sums of a result."""
    return source.is_json and ({"start_times", "input_lens"} <= source.names or len(MARKS & source.names) > 1)


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the requests of the last run in the file; those with an error or without output failed."""
    runs = list(source.objects())
    line, run = runs[-1]
    if len(runs) > 1:
        source.notes.append(f"the last of {len(runs)} runs in the file")
    where = f"{source.path}:{line}"
    for name in LISTS:
        if not isinstance(run.get(name), list):
            message = f"{where}: {name!r} is missing: run vllm bench serve with --save-result --save-detailed"
            raise ValueError(message)  # noqa: TRY004
    if len({len(run[name]) for name in LISTS}) > 1:
        raise ValueError(f"{where}: {', '.join(LISTS)}: expected lists of one length")
    errors = run.get("errors") or [""] * len(run["start_times"])
    clock = TraceClock(options.time_unit or "s", source.notes)
    for start, prompt, output, error in zip(*(run[name] for name in LISTS), errors, strict=False):
        at_s, num_output = clock.seconds(where, "start_times", start), whole(where, "output_lens", output)
        failed = FAILED if error or not num_output else ""
        yield Row(line, at_s, whole(where, "input_lens", prompt), num_output, left_out=failed)


FORMAT = Format(name="vllm bench result", time_name="start_times", matches=matches, rows=rows, is_sorted=False)
