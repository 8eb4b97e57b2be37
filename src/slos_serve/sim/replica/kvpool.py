"""KV blocks of one replica, and the session prefixes that idle blocks still hold.

Blocks of a finished session round stay readable while nobody needs them, oldest out first, as in the
engine's prefix cache. They count as free. Counts are blocks unless a name says tokens.
"""

from __future__ import annotations

from collections import OrderedDict


class KvPool:
    """Hand out and take back blocks. `num_free` includes those that hold a cached prefix."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self.num_cached = 0
        self.lowest_free = num_blocks
        self._cached: OrderedDict[str, int] = OrderedDict()

    def take(self, num_blocks: int) -> list[str]:
        """Allocate; return sessions whose cached prefix was lost. `ValueError` where blocks run out."""
        if num_blocks > self.num_free:
            raise ValueError(f"{num_blocks} KV blocks asked for: {self.num_free} are free")
        self.num_free -= num_blocks
        self.lowest_free = min(self.lowest_free, self.num_free)
        lost = []
        while self.num_cached > self.num_free:
            session, blocks = self._cached.popitem(last=False)
            self.num_cached -= blocks
            lost.append(session)
        return lost

    def give(self, num_blocks: int, session_id: str = "", num_tokens: int = 0) -> None:
        """Free blocks; with a session, remember that they hold the first `num_tokens` of its history."""
        self.num_free += num_blocks
        if session_id:
            self.claim(session_id)
            kept = min(num_tokens // self.block_size, num_blocks)
            self._cached[session_id] = kept
            self.num_cached += kept

    def cached_tokens(self, session_id: str) -> int:
        """Return how many tokens of a session's history are still readable."""
        return self._cached.get(session_id, 0) * self.block_size

    def sessions(self, most: int) -> list[tuple[str, int]]:
        """Return up to `most` sessions and their readable tokens, newest last."""
        names = list(self._cached)[-most:]
        return [(name, self._cached[name] * self.block_size) for name in names]

    def claim(self, session_id: str) -> None:
        """Note that a session's cached blocks now belong to a request (which allocates them)."""
        self.num_cached -= self._cached.pop(session_id, 0)
