"""Prompt blocks: how many tokens stand behind one id, and how much of a prompt an earlier one had too.

Files name the blocks of a prompt by ids and leave out how long a block is. A prompt of L tokens in blocks of B has
ceil(L / B) ids, or floor(L / B) where unfinished blocks are not named, which contradicts most sizes at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

BLOCK_SIZES = (512, 16, 32, 64, 128, 256, 1024, 2048)
ENOUGH = 0.99  # of the rows must fit; published files hold a few that are cut off


def block_size_of(rows: Iterable[tuple[int, int]]) -> int | None:
    """Return the block size that (prompt tokens, number of ids) agree with; None for none, or without ids."""
    known = [(tokens, count) for tokens, count in rows if count and tokens]
    sizes = [size for size in BLOCK_SIZES if known and fits(known, size)]
    exact = [size for size in sizes if all(count == -(-tokens // size) for tokens, count in known)]
    return next(iter([*exact, *sizes]), None)


def fits(rows: Sequence[tuple[int, int]], size: int) -> bool:
    """Tell whether nearly all prompts have as many ids as blocks of `size` tokens would give them."""
    right = sum(count in (tokens // size, -(-tokens // size)) for tokens, count in rows)
    return right >= ENOUGH * len(rows)


class PrefixCache:
    """Blocks of the prompts so far, never evicted. `block_tokens` 0: nothing is counted."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._seen: set[Any] = set()

    def hit_tokens(self, prompt_tokens: int, blocks: Sequence[Any]) -> int:
        """Return how many leading tokens an earlier prompt had too, and remember this prompt."""
        if not blocks or not self._block_tokens:
            return 0
        hits = next((i for i, block in enumerate(blocks) if block not in self._seen), len(blocks))
        self._seen.update(blocks)
        return min(hits * self._block_tokens, prompt_tokens)
