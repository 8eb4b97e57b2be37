"""AIPerf's dialect of Mooncake's lines: milliseconds, sessions whose later turns have a `delay` and no `timestamp`.

A turn comes `delay` ms after the one before it: how long that was answered is not in the file. Lines with a text in
place of a length are left out: only a tokenizer could count them. Dynamo's other names are known here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slos_serve.traces.lines import OUTPUT, PROMPT, TIME, block_ids, choose_block_tokens, choose_unit, require
from slos_serve.traces.registry import Format
from slos_serve.traces.rows import ReadOptions, Row, Rows, TraceClock, whole
from slos_serve.traces.source import Source

TIMES, DELAYS = (TIME, "created_time"), ("delay", "delay_ms")
PROMPTS, OUTPUTS = (PROMPT, "input_tokens"), (OUTPUT, "output_tokens")
TEXTS = ("text_input", "messages")
MARKS = frozenset({"session_id", "created_time", *DELAYS, *TEXTS, *PROMPTS[1:], *OUTPUTS[1:]})
NO_LENGTH = "without a length"


def matches(source: Source) -> bool:
    """Tell whether lines have some time, an output length, and a field that plain Mooncake lines have not."""
    names = source.names
    has_time = any(name in names for name in (*TIMES, *DELAYS))
    has_output = any(name in names for name in OUTPUTS)
    has_prompt = any(name in names for name in (*PROMPTS, *TEXTS))
    return source.is_json and has_time and has_output and has_prompt and bool(names & MARKS) and "chat_id" not in names


def rows(source: Source, options: ReadOptions) -> Rows:
    """Yield the rows, later turns at the earliest time at which they can come."""
    source.block_tokens = choose_block_tokens(source, options)
    time = next((name for name in TIMES if name in source.names), TIME)
    clock, delays = (
        TraceClock(choose_unit(source, options, "ms", name=time), source.notes),
        TraceClock("ms", source.notes),
    )
    ends: dict[str, tuple[float, int]] = {}  # of each session: when its last turn came, how many there were
    waited = 0
    for line, entry in source.objects():
        where = f"{source.path}:{line}"
        session = str(entry.get("session_id") or "")
        delay = next((entry[name] for name in DELAYS if entry.get(name) is not None), None)
        before_s, turn = ends.get(session, (0.0, 0)) if session else (0.0, 0)
        if any(name in entry for name in TIMES) or delay is None or not session or not turn:
            at_s = clock.seconds(where, time, require(where, entry, TIMES))
        else:
            at_s = before_s + delays.seconds(where, "delay", delay)
            waited += 1
            if waited == 1:
                source.notes.append("turns with a delay come that long after the arrival of the turn before them")
        ends[session] = at_s, turn + 1
        prompt, output = _length(where, entry, PROMPTS), _length(where, entry, OUTPUTS)
        if prompt is None or output is None:
            yield Row(line, at_s, 0, 0, left_out=NO_LENGTH)
        else:
            yield Row(line, at_s, prompt, output, session_id=session, turn=turn, blocks=block_ids(where, entry))


def _length(where: str, entry: dict[str, Any], names: Sequence[str]) -> int | None:
    """Return the first of several lengths that a line has, None without one."""
    name = next((name for name in names if entry.get(name) is not None), None)
    return None if name is None else whole(where, name, entry[name])


FORMAT = Format(name="AIPerf or Dynamo dataset", time_name=TIME, matches=matches, rows=rows, is_sorted=False)
