"""Traces as JSON lines with `timestamp`, `input_length`, `output_length` and block ids, in their many dialects.

The dialects share names and differ in the unit of time and in the size of a block, which no line says. Block ids
contradict the wrong size, so the size is computed from the lengths; where the unit stays open, the user is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slos_serve.traces.blocks import block_size_of, fits
from slos_serve.traces.rows import ReadOptions, Row, Rows, TraceClock, epoch_unit, listed, whole
from slos_serve.traces.source import Source

Names = Sequence[str]

TIME, PROMPT, OUTPUT, BLOCKS = "timestamp", "input_length", "output_length", "hash_ids"
LENGTH_FIELDS = frozenset({TIME, PROMPT, OUTPUT})
TOO_FAST_RPS = 1000.0  # requests per second that no trace shows
TOO_SLOW_RPS = 0.01  # one in a hundred seconds


def block_tokens_of(source: Source) -> int | None:
    """Return the block size that the first lines agree with; None without ids or where nothing fits."""
    return block_size_of(_pairs(source))


def has_blocks(source: Source) -> bool:
    """Tell whether any of the first lines has block ids."""
    return any(count for _, count in _pairs(source))


def _pairs(source: Source) -> list[tuple[int, int]]:
    """Return prompt tokens and number of ids of the first lines; what is no number is left to the reader."""
    found = []
    for entry in source.sample:
        tokens, ids = entry.get(PROMPT, entry.get("input_tokens")), entry.get(BLOCKS)
        if isinstance(tokens, int) and isinstance(ids, list):
            found.append((tokens, len(ids)))
    return found


def choose_block_tokens(source: Source, options: ReadOptions) -> int:
    """Return the size of a block; `ValueError` where ids and lengths contradict it, or every size."""
    pairs = [pair for pair in _pairs(source) if pair[1]]
    size = options.block_tokens
    if not pairs or size == 0:
        return 0
    found = block_size_of(pairs) if size is None else size
    if found is None or not fits(pairs, found):
        odd = next(pair for pair in pairs if found is None or not fits([pair], found))
        what = "any block size" if size is None else f"--block-tokens {size}"
        raise ValueError(
            f"{source.path}: {odd[1]} {BLOCKS} for {odd[0]} tokens do not fit {what}: say --block-tokens N, "
            "or 0 to leave prefix hits out"
        )
    return found


def times_of(source: Source, name: str) -> list[float]:
    """Return the times of the first lines that have one, as numbers."""
    found = [entry.get(name) for entry in source.sample]
    return [float(time) for time in found if isinstance(time, (int, float)) and not isinstance(time, bool)]


def rate_in_seconds(times: Sequence[float]) -> float:
    """Return how many requests a second come if the times are seconds; 0 where that cannot be told."""
    span = max(times) - min(times) if times else 0.0
    return len(times) / span if span > 0 else 0.0


def have_fractions(times: Sequence[float]) -> bool:
    """Tell whether most times other than 0 are no whole numbers."""
    other = [time for time in times if time]
    return sum(time != int(time) for time in other) * 2 > len(other)


def ask_for_unit(source: Source, why: str) -> ValueError:
    """Return the error that asks the user for the unit."""
    return ValueError(f"{source.path}: JSON lines whose {TIME} has no certain unit ({why}): say --time-unit s or ms")


def choose_unit(source: Source, options: ReadOptions, usual: str | None, *, name: str = TIME) -> str | None:
    """Return the unit of the times: the user's, that of epoch times by their size, or the dialect's usual one."""
    if options.time_unit is not None:
        return options.time_unit
    times = times_of(source, name)
    return (epoch_unit(times[0]) if times else None) or usual


def require(where: str, entry: dict[str, Any], names: Names) -> object:
    """Return the first of the fields that a line has; `ValueError` names the first where there is none."""
    for name in names:
        if name in entry:
            return entry[name]
    found = listed(list(entry)) or "an empty object"
    raise ValueError(f"{where}: field {names[0]!r} is missing: found {found}")


def length_rows(
    source: Source,
    options: ReadOptions,
    *,
    unit: str | None,
    time: Names = (TIME,),
    prompt: Names = (PROMPT,),
    output: Names = (OUTPUT,),
) -> Rows:
    """Yield rows of lines with a time, two lengths, and block ids if any. Of each tuple the first name there counts."""
    source.block_tokens = choose_block_tokens(source, options)
    clock = TraceClock(unit, source.notes)
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        yield Row(
            line,
            clock.seconds(where, time[0], require(where, entry, time)),
            whole(where, prompt[0], require(where, entry, prompt)),
            whole(where, output[0], require(where, entry, output)),
            blocks=block_ids(where, entry),
        )


def block_ids(where: str, entry: dict[str, Any]) -> Sequence[Any]:
    """Return the block ids of a line, none where it has none; `ValueError` unless they are whole numbers."""
    ids = entry.get(BLOCKS)
    if ids is None:
        return ()
    if not isinstance(ids, list) or not all(type(one) in (int, str) for one in ids):
        raise ValueError(f"{where}: {BLOCKS}: expected a list of whole numbers")
    return ids
