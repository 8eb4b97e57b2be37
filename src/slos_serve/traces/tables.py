"""Rows of a CSV file whose columns are known by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from slos_serve.traces.rows import COUNTS, FAILED, REQUIRED, ReadOptions, Row, Rows, TraceClock, listed, whole
from slos_serve.traces.source import Source

Names = Mapping[str, str]  # header of the file by our name of the column


def has_columns(source: Source, *names: str) -> bool:
    """Tell whether a table has all of these columns, whatever their case."""
    known = {name.casefold() for name in source.header}
    return all(name.casefold() in known for name in names)


def require(source: Source, names: Names) -> None:
    """Raise `ValueError` for the first required column that the table lacks."""
    for name in REQUIRED:
        if name in names and not has_columns(source, names[name]):
            found = listed(source.header) or "an empty file, no rows"
            raise ValueError(f"{source.path}: column {names[name]!r} is missing: found {found}")


def table_rows(
    source: Source,
    options: ReadOptions,
    names: Names,
    *,
    unit: str | None = None,
    empty_is_failed: bool = False,
    cells: Iterable[tuple[int, list[str]]] | None = None,
) -> Rows:
    """Yield the rows of a table. Without a time column all arrive at 0.

    `unit`: of times that are numbers, None for seconds or what an epoch time's size says; `options` come first.
    `empty_is_failed`: a request without output failed. `cells`: in place of the source's own rows.
    """
    clock = TraceClock(options.time_unit or unit, source.notes)
    place = {name.casefold(): i for i, name in enumerate(source.header)}
    where_is = {ours: place[theirs.casefold()] for ours, theirs in names.items() if theirs.casefold() in place}
    time = where_is.pop("arrived_at_s", None)
    prompt, output = where_is.pop("prompt_tokens"), where_is.pop("output_tokens")
    counts = [(name, i) for name, i in where_is.items() if name in COUNTS]
    labels = [(name, i) for name, i in where_is.items() if name not in COUNTS]
    for line, row in source.table() if cells is None else cells:
        try:
            at_s = 0.0 if time is None else clock.seconds("", names["arrived_at_s"], row[time])
            num_output = whole("", names["output_tokens"], row[output])
            more = {name: whole("", names[name], row[i]) for name, i in counts}
            num_prompt = whole("", names["prompt_tokens"], row[prompt])
        except ValueError as error:
            raise ValueError(f"{source.path}:{line}{error}") from None
        yield Row(
            line,
            at_s,
            num_prompt,
            num_output,
            left_out=FAILED if empty_is_failed and not num_output else "",
            **more,  # type: ignore[arg-type]
            **{name: row[i] for name, i in labels},  # type: ignore[arg-type]
        )
