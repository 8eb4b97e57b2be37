"""WEKA's agent traces: lists of turns (`t`, `in`, `out`), a conversation a line. Says how to make a trace of one."""

from __future__ import annotations

from typing import Any

from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source

TURN = frozenset({"t", "in", "out"})


def matches(source: Source) -> bool:
    """Tell whether the first objects hold lists of turns, under whatever name."""
    return source.is_json and any(_are_turns(value) for entry in source.sample for value in entry.values())


def _are_turns(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(one, dict) and one.keys() >= TURN for one in turns)


def rows(source: Source, options: ReadOptions) -> Rows:  # noqa: ARG001
    """Refuse, in one line that says what to do."""
    raise ValueError(
        f"{source.path}: conversations of agents with lists of turns: write a row for each turn, as CSV with "
        "arrived_at_s (seconds), prompt_tokens, output_tokens, session_id, turn"
    )


FORMAT = Format(name="agent conversations", time_name="t", matches=matches, rows=rows)
