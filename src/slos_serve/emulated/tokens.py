"""Made-up tokens: which ids a request yields, where it ends by itself, and which drafts are accepted. Pure.

A request's tokens are a function of its seed and of their position, so the same greedy prompt gets the same answer
however it was batched, preempted or drafted.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
MIX = 2654435761  # Knuth's multiplicative hash


def seed_of(prompt: Sequence[int], salt: str = "") -> int:
    """Return a request's seed from its prompt, and from `salt` where its tokens are sampled."""
    return zlib.crc32(salt.encode(), zlib.crc32(array("l", prompt).tobytes()))


def natural_length(seed: int, mean: float, least: int = 0) -> int:
    """Return after how many tokens a request ends by itself: exponential of that mean, at least `least` and 1."""
    share = (zlib.crc32(b"length", seed) + 0.5) / 2**32
    return max(1, least, round(-mean * math.log(share)))


@dataclass(slots=True)
class MadeUpOutput:
    """One request on the device. `emitted` counts output tokens; `ends_at` is the output length that ends it.

    `end_token` is None where the request does not end by itself; `num_logprobs` where none are asked for.
    """

    num_prompt_tokens: int
    seed: int
    emitted: int = 0
    ends_at: int = 0
    end_token: int | None = None
    num_logprobs: int | None = None

    def take(self, count: int, vocabulary: range) -> list[int]:
        """Return the next `count` tokens; fewer where the request ends by itself before."""
        tokens: list[int] = []
        for _ in range(count):
            self.emitted += 1
            if self.end_token is not None and self.emitted >= self.ends_at:
                return [*tokens, self.end_token]
            tokens.append(vocabulary[(self.seed + self.emitted * MIX) % len(vocabulary)])
        return tokens


def made_up_logprobs(tokens: Sequence[int], count: int) -> tuple[IntArray, FloatArray]:
    """Return ids and logprobs of each token and `count` others, all as likely; shapes (N, count + 1)."""
    ids = np.asarray(tokens, np.int64)[:, None] + np.arange(count + 1)
    return ids, np.full(ids.shape, -math.log(count + 1), np.float32)


def plain_tokens(size: int) -> range:
    """Return the ids that are used, of a vocabulary of that size: its middle half, where no special token is."""
    return range(size // 4, max(size // 4 + 1, 3 * size // 4))


def accepted(num_drafts: int, acceptance: float, random: np.random.Generator) -> int:
    """Draw how many of a request's drafts are accepted: each with that chance, up to the first that is not."""
    count = 0
    while count < num_drafts and random.random() < acceptance:
        count += 1
    return count


def allowed_token(row: np.ndarray[tuple[int], np.dtype[np.int32]], seed: int, end_token: int | None) -> int:
    """Return a token that a grammar allows: the end where it may end there, else one drawn by `seed`.

    `row`: the grammar's mask, one bit a token, lowest first.
    """
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    if end_token is not None and end_token < len(bits) and bits[end_token]:
        return end_token
    choices = np.flatnonzero(bits)
    return int(choices[seed * MIX % len(choices)]) if len(choices) else 0
