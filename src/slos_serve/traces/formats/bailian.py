"""Alibaba's Bailian traces: seconds from the start, 16 tokens a block, conversations by `parent_chat_id`."""

from __future__ import annotations

from slos_serve.traces.lines import (
    LENGTH_FIELDS,
    OUTPUT,
    PROMPT,
    TIME,
    block_ids,
    choose_block_tokens,
    choose_unit,
    require,
)
from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

FIELDS = LENGTH_FIELDS | {"chat_id", "parent_chat_id"}
NO_PARENT = -1


def matches(source: Source) -> bool:
    """Tell whether lines have Bailian's fields."""
    return source.is_json and source.names >= FIELDS


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows. A session is named by the first request of its chain of parents."""
    source.block_tokens = choose_block_tokens(source, options)
    clock = TraceClock(choose_unit(source, options, "s"), source.notes)
    roots: dict[object, object] = {}
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        chat, parent = entry.get("chat_id"), entry.get("parent_chat_id")
        root = roots[chat] = chat if parent in (None, NO_PARENT) else roots.get(parent, parent)
        yield Row(
            line,
            clock.seconds(where, TIME, require(where, entry, (TIME,))),
            whole(where, PROMPT, require(where, entry, (PROMPT,))),
            whole(where, OUTPUT, require(where, entry, (OUTPUT,))),
            session_id=str(root),
            turn=whole(where, "turn", entry.get("turn") or 0),
            blocks=block_ids(where, entry),
        )


FORMAT = Format(name="Bailian", time_name=TIME, matches=matches, rows=rows)
