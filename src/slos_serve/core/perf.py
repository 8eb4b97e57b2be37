"""How long a batch takes, and how many tokens fit in a given time.

A step computes n new tokens (prefill chunks, one per decode, drafts to verify) for q requests, reads C
context tokens for decodes, spends A chunk-times-context products on prefill attention and s drafter
steps. Its time is the higher of a few lines, the roofline of compute and memory:

    T = max over lines of (k1*n + k2*q + k3*C + k4*s + k5*A + b)

Every line is non-decreasing in every term, so the inverse (most tokens that end by t) is exact: linear,
or quadratic where A counts, because a chunk of x tokens at context c adds x*(c + x/2) to A.

`margin_prefill` and `margin_decode` multiply T for batches with and without prefill tokens: a high
quantile of measured / predicted, so that a plan made with them holds nearly always. What context costs is
multiplied behind contexts that are many times as long as those measured: `doubt` says how much more its
coefficients may be, and plans count that in (`planned`). Seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit

if TYPE_CHECKING:
    from typing import Self

FloatArray = npt.NDArray[np.float64]

TERMS = ("per_token_s", "per_request_s", "per_context_token_s", "per_draft_step_s", "per_pair_s", "fixed_s")
PER_TOKEN, PER_REQUEST, PER_CONTEXT, PER_DRAFT, PER_PAIR, FIXED = range(6)  # the columns of an array of lines


@jit
def line_seconds(
    lines: FloatArray, i: int, num_tokens: float, num_requests: float, context: float, draft_steps: float, pairs: float
) -> float:
    """Return the time of a batch by line `i` alone, in seconds."""
    seconds: float = (
        lines[i, PER_TOKEN] * num_tokens
        + lines[i, PER_REQUEST] * num_requests
        + lines[i, PER_CONTEXT] * context
        + lines[i, PER_DRAFT] * draft_steps
        + lines[i, PER_PAIR] * pairs
        + lines[i, FIXED]
    )
    return seconds


@jit
def batch_seconds(
    lines: FloatArray, num_tokens: float, num_requests: float, context: float, draft_steps: float, pairs: float
) -> float:
    """Return the time of a batch without margin, in seconds. `lines` has shape (L, 6), columns `TERMS`."""
    longest = 0.0
    for i in range(lines.shape[0]):
        longest = max(longest, line_seconds(lines, i, num_tokens, num_requests, context, draft_steps, pairs))
    return longest


def each_batch_seconds(
    lines: FloatArray,
    num_tokens: FloatArray | float,
    num_requests: FloatArray | float = 1.0,
    context: FloatArray | float = 0.0,
    draft_steps: FloatArray | float = 0.0,
    pairs: FloatArray | float = 0.0,
) -> FloatArray:
    """Return `batch_seconds` of many batches; arguments are arrays of shape (batches,), or one number for all."""
    token_s, request_s, context_s, draft_s, pair_s, fixed_s = lines.T[:, :, None]
    work = token_s * num_tokens + request_s * num_requests + context_s * context
    seconds: FloatArray = (work + draft_s * draft_steps + pair_s * pairs + fixed_s).max(axis=0)
    return seconds


@jit
def max_chunk_tokens(
    lines: FloatArray,
    seconds: float,
    num_tokens: float,
    num_requests: float,
    context: float,
    draft_steps: float,
    pairs: float,
    chunk_context: float,
) -> float:
    """Return how many tokens x of one chunk may join a batch that must end within `seconds`.

    The batch already holds the given totals (`num_requests` counts the chunk's request too); the chunk
    starts at `chunk_context` tokens. Continuous; not positive where not even the batch alone fits.
    """
    most = 1e18
    for i in range(lines.shape[0]):
        room = seconds - line_seconds(lines, i, num_tokens, num_requests, context, draft_steps, pairs)
        if room <= 0.0:
            return 0.0 if room == 0.0 else -1.0
        slope = lines[i, PER_TOKEN] + lines[i, PER_PAIR] * chunk_context
        half = 0.5 * lines[i, PER_PAIR]
        if half > 0.0:
            # half*x^2 + slope*x = room, in the form that does not cancel
            x = 2.0 * room / (slope + math.sqrt(slope * slope + 4.0 * half * room))
        elif slope > 0.0:
            x = room / slope
        else:
            x = 1e18
        most = min(most, x)
    return most


def _row(named: Mapping[str, float]) -> tuple[float, ...]:
    """Return named coefficients in the order of `TERMS`, absent ones 0; `ValueError` for an unknown name."""
    unknown = sorted(set(named) - set(TERMS))
    if unknown:
        raise ValueError(f"perf model terms {unknown}: expected names among {TERMS}")
    return tuple(float(named.get(term, 0.0)) for term in TERMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfModel:
    """A roofline of batch time; see the module's text for the terms.

    `lines`: one row of six coefficients (`TERMS`) each, all finite and >= 0. `doubt`: a row as well, what each
    coefficient may be above its value as far as the measured steps can tell; empty where nothing is in doubt.
    Raises `ValueError` for anything else: a cost that falls with size has no inverse.
    """

    lines: tuple[tuple[float, ...], ...]
    margin_prefill: float = 1.0
    margin_decode: float = 1.0
    doubt: tuple[float, ...] = ()
    _array: FloatArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("PerfModel.lines: expected at least one line")
        for line in (*self.lines, *([self.doubt] if self.doubt else [])):
            if len(line) != len(TERMS):
                raise ValueError(f"PerfModel line {line!r}: expected {len(TERMS)} coefficients {TERMS}")
            if not all(math.isfinite(value) and value >= 0 for value in line):
                raise ValueError(f"PerfModel line {line!r}: expected finite coefficients >= 0")
        if not any(sum(line) > 0 for line in self.lines):
            raise ValueError("PerfModel.lines: expected a batch to take time")
        for name in ("margin_prefill", "margin_decode"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"PerfModel.{name} = {value!r}: expected a positive finite factor")
        object.__setattr__(self, "_array", np.array(self.lines, dtype=np.float64))

    @classmethod
    def from_terms(cls, lines: Sequence[Mapping[str, float]]) -> Self:
        """Build from named coefficients, absent ones 0; `ValueError` for an unknown name."""
        return cls(lines=tuple(_row(line) for line in lines))

    def as_array(self) -> FloatArray:
        """Return the lines as an array of shape (L, 6), columns `TERMS`."""
        return self._array.copy()

    def planned(self) -> FloatArray:
        """Return the lines that plans count with, doubt included and margin left out; shape (L, 6)."""
        lines = self.as_array()
        return lines + np.array(self.doubt) if self.doubt else lines

    def times(self, factor: float) -> Self:
        """Return the model of an engine whose steps take `factor` times as long; margins stay."""
        lines = tuple(tuple(value * factor for value in line) for line in self.lines)
        return replace(self, lines=lines, doubt=tuple(value * factor for value in self.doubt))

    def seconds(
        self,
        num_tokens: float,
        num_requests: float = 1,
        *,
        context_tokens: float = 0,
        draft_steps: float = 0,
        attention_pairs: float = 0,
    ) -> float:
        """Return the expected time of a batch, margin left out, in seconds."""
        longest = 0.0  # as `batch_seconds`, which a single call reaches no faster
        for token_s, request_s, context_s, draft_s, pair_s, fixed_s in self.lines:
            seconds = (
                token_s * num_tokens
                + request_s * num_requests
                + context_s * context_tokens
                + draft_s * draft_steps
                + pair_s * attention_pairs
                + fixed_s
            )
            longest = max(longest, seconds)
        return longest

    def prefill_seconds(self, prompt_tokens: int, max_num_batched_tokens: int, done: int = 0) -> float:
        """Return the unloaded prefill time of a prompt behind its first `done` tokens, cut at the engine's budget."""
        total = 0.0
        while done < prompt_tokens:
            chunk = min(max_num_batched_tokens, prompt_tokens - done)
            total += self.seconds(chunk, attention_pairs=chunk * (done + chunk / 2))
            done += chunk
        return total

    def to_json(self) -> dict[str, Any]:
        """Return the model as named terms."""
        return {
            "lines": [dict(zip(TERMS, line, strict=True)) for line in self.lines],
            "margin_prefill": self.margin_prefill,
            "margin_decode": self.margin_decode,
            **({"doubt": dict(zip(TERMS, self.doubt, strict=True))} if self.doubt else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`; `ValueError` where values are not usable."""
        bare = cls.from_terms(data["lines"])
        doubt = data.get("doubt")
        return cls(
            lines=bare.lines,
            doubt=() if doubt is None else _row(doubt),
            margin_prefill=float(data.get("margin_prefill", 1.0)),
            margin_decode=float(data.get("margin_decode", 1.0)),
        )
