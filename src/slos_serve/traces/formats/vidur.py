"""Vidur and Frontier: `arrived_at` in seconds, `num_prefill_tokens`, `num_decode_tokens`; sessions and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from slos_serve.traces.blocks import block_size_of
from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Rows, whole
from slos_serve.traces.source import SAMPLE_OBJECTS, Source
from slos_serve.traces.tables import has_columns, table_rows

REQUIRED = {"arrived_at_s": "arrived_at", "prompt_tokens": "num_prefill_tokens", "output_tokens": "num_decode_tokens"}
NAMES = {**REQUIRED, "session_id": "session_id"}
BLOCKS = "block_hash_ids"


def matches(source: Source) -> bool:
    """Tell whether the table has Vidur's columns, arrivals among them."""
    return has_columns(source, *REQUIRED.values())


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows; block ids are separated by `|`."""
    if BLOCKS not in source.header:
        yield from table_rows(source, options, NAMES, unit="s")
        return
    ids, prompt = source.header.index(BLOCKS), source.header.index(NAMES["prompt_tokens"])
    table = source.table()
    sample = list(islice(table, SAMPLE_OBJECTS))
    source.block_tokens = _block_tokens(source, options, [(cells[prompt], _ids(cells[ids])) for _, cells in sample])
    kept: list[list[str]] = []  # the blocks of the row that `table_rows` is at

    def watched() -> Iterator[tuple[int, list[str]]]:
        for line, cells in chain(sample, table):
            kept[:] = [_ids(cells[ids])]
            yield line, cells

    for row in table_rows(source, options, NAMES, unit="s", cells=watched()):
        yield row._replace(blocks=kept[0])


def _ids(text: str) -> list[str]:
    return [part for part in text.split("|") if part.strip()]


def _block_tokens(source: Source, options: ReadOptions, sample: list[tuple[str, list[str]]]) -> int:
    if options.block_tokens is not None:
        return options.block_tokens
    pairs = [(whole(source.path, NAMES["prompt_tokens"], text), len(ids)) for text, ids in sample]
    size = block_size_of(pairs)
    if size is None and any(count for _, count in pairs):
        source.notes.append(f"{BLOCKS} fit the lengths at no block size: no prefix hits (--block-tokens N counts them)")
    return size or 0


FORMAT = Format(name="Vidur", time_name="arrived_at", matches=matches, rows=rows)
