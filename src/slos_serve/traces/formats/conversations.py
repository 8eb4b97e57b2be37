"""Texts of conversations (ShareGPT, LMSYS, WildChat), without lengths: no trace. Says how to make one."""

from __future__ import annotations

import re

from slos_serve.traces.registry import FIRST, Format
from slos_serve.traces.rows import ReadOptions, Rows
from slos_serve.traces.source import Source

_TEXTS = re.compile(r'"(conversations?|conversation_[ab]|conversation_hash)"\s*:')
_BEFORE = 4096  # characters in which an entry shows what it is


def matches(source: Source) -> bool:
    """Tell whether the file begins with conversations; long ones are not read for that."""
    return source.is_json and _TEXTS.search(source.text[:_BEFORE]) is not None


def rows(source: Source, options: ReadOptions) -> Rows:  # noqa: ARG001
    """Refuse, in one line that says what to do."""
    raise ValueError(
        f"{source.path}: texts of conversations, without lengths: count tokens with your model's tokenizer, write a "
        "CSV with prompt_tokens,output_tokens, and say --arrivals poisson --rate R"
    )


FORMAT = Format(name="conversations", time_name="timestamp", matches=matches, rows=rows, rank=FIRST)
