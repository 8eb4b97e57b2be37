"""Trace formats, found by what a file holds and never by its name.

Every module of `formats` defines `FORMAT`, a `Format`; a new format is a new module there. Of the formats that
recognise a file the one of the lowest `rank` reads it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from slos_serve.traces import formats
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source

FIRST, USUAL, GENERAL, FALLBACK = range(4)  # told by the first bytes; by its own fields; by common ones; by none


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One kind of file: how it is recognised, and how its rows are read.

    `time_name` is its column of arrival times, for messages. `is_sorted`: rows that go back in time are an error;
    else they are put in order. `on_ticks`: arrivals were rounded to a coarse clock and are spread inside its ticks.
    """

    name: str
    time_name: str
    matches: Callable[[Source], bool]
    rows: Callable[[Source, ReadOptions], Rows]
    is_sorted: bool = True
    on_ticks: bool = False
    rank: int = USUAL


@cache
def all_formats() -> tuple[Format, ...]:
    """Return every format, those that are asked first in front."""
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    found = [importlib.import_module(f"{formats.__name__}.{name}").FORMAT for name in names]
    return tuple(sorted(found, key=lambda one: one.rank))


def find_format(source: Source) -> Format:
    """Return the format of a file; the fallbacks say what is missing."""
    return next(one for one in all_formats() if one.matches(source))
