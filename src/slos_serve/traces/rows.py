"""What every trace format yields: rows of times and lengths, and the parsing that formats share.

A format turns each request of a file into a `Row`, in the file's order and on the file's own clock, in seconds.
`reading` checks the order, counts prefix hits, takes the window and turns rows into columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

COUNTS = ("prompt_tokens", "output_tokens", "thinking_tokens", "cached_tokens", "turn")
LABELS = ("session_id", "slo_class")
REQUIRED = ("arrived_at_s", "prompt_tokens", "output_tokens")

TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}  # of them in a second
FAILED = "failed"
TOO_LONG = "longer than the context"
MAX_COUNT = 1 << 40  # more tokens than that are a damaged file

_SHOWN = 40  # characters of a bad value that a message repeats
_US_STAMPS = ("%m/%d/%Y, %I:%M:%S.%f %p", "%m/%d/%Y, %I:%M:%S %p", "%m/%d/%Y %H:%M:%S.%f", "%m/%d/%Y %H:%M:%S")


class Row(NamedTuple):
    """One request of a file. `line`: where it stands; `at_s`: seconds on the file's clock; lengths in tokens.

    `blocks`: ids of the prompt's blocks, equal where prompts share them. `left_out`: why the request is not part of
    the trace, "" where it is.
    """

    line: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    thinking_tokens: int = 0
    cached_tokens: int = 0
    turn: int = 0
    session_id: str = ""
    slo_class: str = ""
    blocks: Sequence[Any] = ()
    left_out: str = ""


Rows = Iterator[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read a file where it does not say. `None`: as its content tells.

    `time_unit`: one of `TIME_UNITS`. `block_tokens`: prompt tokens behind one block id; 0 leaves prefix hits out.
    `max_total_tokens`: the context; what is longer is left out, and its blocks are never cached.
    """

    time_unit: str | None = None
    block_tokens: int | None = None
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.time_unit not in {None, *TIME_UNITS}:
            raise ValueError(f"--time-unit {self.time_unit!r}: expected one of {', '.join(TIME_UNITS)}")
        if self.block_tokens is not None and self.block_tokens < 0:
            raise ValueError(
                f"--block-tokens {self.block_tokens}: expected a number of tokens, or 0 for no prefix hits"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a trace comes from: the format's name, how many requests were left out and why, what else to know."""

    format: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def shown(value: object) -> str:
    """Return a value as a message may repeat it: never more than some forty characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}...{text[-1]}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the first of some names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..." for name in names[:most]) + more


def whole(where: str, name: str, value: object) -> int:
    """Return a count from a cell or a JSON value; `ValueError` unless it is a whole number from 0 to `MAX_COUNT`."""
    if type(value) is int and 0 <= value < MAX_COUNT:
        return value
    if isinstance(value, (str, float, int)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if number == number // 1 and 0 <= number < MAX_COUNT and "_" not in str(value):
            return int(number)
    raise ValueError(f"{where}: {name} = {shown(value)}: expected a whole number >= 0")


class TraceClock:
    """Turn the times of one file into seconds: numbers in one unit, or calendar stamps (UTC where no zone is said).

    Without a unit the first number decides between seconds and, for epoch times, what its size says; `notes` gets a
    line where that is not seconds.
    """

    def __init__(self, unit: str | None, notes: list[str]) -> None:
        self._notes = notes
        self._per_second = None if unit is None else TIME_UNITS[unit]

    def seconds(self, where: str, name: str, value: object) -> float:
        """Return a time in seconds; `ValueError` names the value."""
        try:
            at_s = self._parse(value)
        except (ValueError, OverflowError):
            at_s = math.nan
        if not (math.isfinite(at_s) and at_s >= 0):
            raise ValueError(f"{where}: {name} = {shown(value)}: expected seconds >= 0 or a time stamp")
        return at_s

    def _parse(self, value: object) -> float:
        if isinstance(value, str) and ":" in value:
            return calendar_seconds(value.strip())
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return math.nan
        number = float(value)
        if self._per_second is None:
            unit = epoch_unit(number) or "s"
            self._per_second = TIME_UNITS[unit]
            if unit != "s":
                self._notes.append(f"times read as {unit} since 1970")
        return number / self._per_second


def epoch_unit(number: float) -> str | None:
    """Return the unit of a number that can only be a time since 1970, None for what may be anything else."""
    for unit, least, most in (("s", 8e8, 1e10), ("ms", 8e11, 1e13), ("us", 8e14, 1e16), ("ns", 8e17, 1e19)):
        if least <= number < most:
            return unit
    return None


def calendar_seconds(text: str) -> float:
    """Return seconds since 1970 of an ISO stamp or of one as `8/15/2025, 5:50:43.282000 PM`."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = _american(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _american(text: str) -> datetime:
    for form in _US_STAMPS:
        try:
            return datetime.strptime(text, form)  # noqa: DTZ007 - UTC is set by the caller
        except ValueError:
            continue
    raise ValueError(text)
