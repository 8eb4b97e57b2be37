"""How long outputs are likely to be: quantiles per class and prompt length, learnt online.

Theory of operation. Finished requests are counted in histograms over the output length, one per class
and one per class and prompt-length bucket (powers of four). Bins are single tokens up to 32 and then a
sixteenth of an octave, so a quantile is within 1/16 of its place. Each new observation fades the old
ones of its histograms by 1/`WINDOW`, so memory is constant and the model follows a drifting workload.

A prediction shrinks from the narrow to the broad: the bucket's counts, plus the class's distribution
weighted as `CLASS_WEIGHT` observations, which itself is the class's counts plus a prior weighted as
`PRIOR_WEIGHT` observations. The prior of a class with a hint is log-normal with the hint as its median and
`PRIOR_SIGMA` (its 0.9 quantile is 2.5 times the hint). Without a hint it says "runs to its limit": a
point mass at the request's own max_output_tokens.

A running request that has produced c tokens is longer than c, so its quantile is the conditional one,
F^-1(1 - (1 - q) * (1 - F(c))), which cannot fall as c grows. Where the data end, an outlier would jump
to its limit at once; it is held to `MAX_GROWTH` times the larger of c and the unconditional quantile.

What is said about one request is a high quantile. What many take together, in memory and in steps, is far less than
the sum of those: each also draws a length, the quantile of its `turn`. Turns are spread evenly, so the lengths drawn
for many are spread as lengths are, some short and some long, and so are the times at which their memory comes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slos_serve.core.jit import jit

if TYPE_CHECKING:
    from typing import Self

FloatArray = npt.NDArray[np.float64]

WINDOW = 2000
PRIOR_WEIGHT = 4.0
CLASS_WEIGHT = 32.0
PRIOR_SIGMA = 0.7
MAX_GROWTH = 4.0
MAX_CLASSES = 64
NUM_PROMPT_BUCKETS = 10  # 1-3, 4-15, ..., 4^9 and more tokens

_UNIT_BINS = 32  # one bin per length below this, then _UNIT_BINS / 2 per octave
_HALF = _UNIT_BINS // 2
_OCTAVES = 16
NUM_BINS = _UNIT_BINS + _HALF * _OCTAVES


def _bin(length: int) -> int:
    """Return the bin of an output length; the last one holds everything longer."""
    if length < _UNIT_BINS:
        return max(length, 0)
    shift = length.bit_length() - _UNIT_BINS.bit_length() + 1
    return min(_HALF * shift + (length >> shift), NUM_BINS - 1)


def _edges() -> FloatArray:
    """Return NUM_BINS + 1 lengths: bin i holds lengths above edges[i] up to and including edges[i + 1]."""
    firsts = [float(length) for length in range(_UNIT_BINS)]
    firsts += [float((_HALF + i) << shift) for shift in range(1, _OCTAVES + 1) for i in range(_HALF)]
    firsts.append(float(_UNIT_BINS << _OCTAVES))
    return np.array(firsts) - 1.0


_EDGES = _edges()


def _bucket(prompt_tokens: int) -> int:
    return min(max(prompt_tokens, 1).bit_length() - 1 >> 1, NUM_PROMPT_BUCKETS - 1)


def _log_normal(median: float, sigma: float) -> FloatArray:
    """Return the chance of each bin under a log-normal; what lies beyond is in the last bin."""
    logs = [math.log(edge / median) / sigma if edge > 0 else -math.inf for edge in _EDGES[:-1].tolist()]
    below = [0.5 * math.erfc(-z / math.sqrt(2.0)) for z in logs]
    return np.diff(np.array([*below, 1.0]))


def length_quantile(seq: int, produced: int) -> float:
    """Return the quantile that is drawn for the request numbered `seq` once it has `produced` tokens.

    Multiples of irrational numbers: over requests and draws they fill (0, 1) evenly.
    """
    return 0.01 + 0.98 * ((seq * 0.6180339887498949 + produced * 0.7548776662466927) % 1.0)


class LengthModel:
    """Predict output lengths from a class, a prompt length and what has been produced so far.

    `hints`: typical (median) output tokens by class name; classes need not be listed. At most
    `MAX_CLASSES` classes are told apart, later ones share one. `ValueError` for a hint below 1.
    """

    def __init__(self, hints: Mapping[str, float] | None = None) -> None:
        self.hints: dict[str, float] = {}
        for name, hint in (hints or {}).items():
            if not (math.isfinite(hint) and hint >= 1):
                raise ValueError(f"output length hint of class {name!r} = {hint!r}: expected at least 1 token")
            self.hints[name] = float(hint)
        self._priors = {name: _log_normal(hint, PRIOR_SIGMA) for name, hint in self.hints.items()}
        self._counts: dict[str, FloatArray] = {}  # by class: row 0 the class, row 1 + b the bucket b
        self._curves: dict[tuple[str, int], FloatArray] = {}

    def observe(self, slo_class: str, prompt_tokens: int, output_tokens: int) -> None:
        """Learn from a request that ran to its end; cancelled and failed ones say nothing about length."""
        if output_tokens < 1:
            return
        name = self._known(slo_class)
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = np.zeros((1 + NUM_PROMPT_BUCKETS, NUM_BINS))
        _count(counts, 1 + _bucket(prompt_tokens), _bin(output_tokens))
        if name:
            for bucket in range(NUM_PROMPT_BUCKETS):
                self._curves.pop((name, bucket), None)
        else:  # the shared class stands behind any number of names
            self._curves.clear()

    def predict(
        self, slo_class: str, prompt_tokens: int, max_output_tokens: int, produced: int = 0, quantile: float = 0.9
    ) -> float:
        """Return the `quantile` of the output length of a request that has `produced` tokens and goes on.

        Above `produced` and never above `max_output_tokens`; does not fall as `produced` grows.
        """
        if produced >= max_output_tokens:
            return float(max_output_tokens)
        bucket = _bucket(prompt_tokens)
        curve = self._curves.get((slo_class, bucket))
        if curve is None:
            curve = self._curve(slo_class, bucket)
        length = _length(curve, _EDGES, produced, _bin(produced), quantile)
        return min(max(length, produced + 1.0), float(max_output_tokens))

    def num_observations(self, slo_class: str) -> float:
        """Return how many (faded) observations stand behind a class."""
        counts = self._counts.get(self._known(slo_class))
        return 0.0 if counts is None else float(counts[0].sum())

    def to_json(self) -> dict[str, Any]:
        """Return hints and the filled bins of every histogram."""
        classes = {}
        for name, counts in self._counts.items():
            filled = [np.flatnonzero(row).tolist() for row in counts]
            classes[name] = [{str(i): float(row[i]) for i in bins} for row, bins in zip(counts, filled, strict=True)]
        return {"schema": "slos-serve-lengths/1", "hints": dict(self.hints), "classes": classes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`; `ValueError` for another schema or impossible counts."""
        if data.get("schema") != "slos-serve-lengths/1":
            raise ValueError(f"schema = {data.get('schema')!r}: expected 'slos-serve-lengths/1'")
        model = cls(data["hints"])
        for name, rows in data["classes"].items():
            if len(rows) != 1 + NUM_PROMPT_BUCKETS:
                raise ValueError(f"length histograms of class {name!r}: expected {1 + NUM_PROMPT_BUCKETS}")
            counts = np.zeros((1 + NUM_PROMPT_BUCKETS, NUM_BINS))
            for row, filled in enumerate(rows):
                for index, count in filled.items():
                    if not (0 <= int(index) < NUM_BINS and math.isfinite(count) and count >= 0):
                        raise ValueError(f"length histogram of class {name!r}: bin {index} = {count!r}")
                    counts[row, int(index)] = count
            model._counts[name] = counts
        return model

    def _known(self, slo_class: str) -> str:
        """Return the name under which a class is counted."""
        if slo_class in self._counts or len(self._counts) < MAX_CLASSES:
            return slo_class
        return ""

    def _curve(self, slo_class: str, bucket: int) -> FloatArray:
        """Return F at the upper edge of each bin, shape (NUM_BINS,); what is missing to 1 is at the limit."""
        # a limit is no length: the mass of "runs to its limit" is in no bin
        chances = self._priors.get(slo_class, _NOWHERE)
        counts = self._counts.get(self._known(slo_class))
        if counts is not None:
            one = counts[1 + bucket]
            chances = _shrunk(counts[0], float(counts[0].sum()), one, float(one.sum()), chances)
        curve = _summed(chances)
        if len(self._curves) >= MAX_CLASSES * NUM_PROMPT_BUCKETS:
            self._curves.clear()
        self._curves[slo_class, bucket] = curve
        return curve


_NOWHERE = np.zeros(NUM_BINS)


@jit
def _count(counts: FloatArray, row: int, index: int) -> None:
    """Add one observation to the histograms of a class and of one of its buckets; the old ones fade."""
    for one in (0, row):
        counts[one] *= 1.0 - 1.0 / WINDOW
        counts[one, index] += 1.0


@jit
def _shrunk(
    of_class: FloatArray, class_total: float, of_bucket: FloatArray, bucket_total: float, prior: FloatArray
) -> FloatArray:
    """Return the chance of each bin: the bucket's counts, shrunk to the class's, shrunk to the prior."""
    chances = np.empty(len(prior))
    for i in range(len(prior)):
        broad = (of_class[i] + PRIOR_WEIGHT * prior[i]) / (class_total + PRIOR_WEIGHT)
        chances[i] = (of_bucket[i] + CLASS_WEIGHT * broad) / (bucket_total + CLASS_WEIGHT)
    return chances


@jit
def _summed(chances: FloatArray) -> FloatArray:
    """Return the running sum of chances, at most 1."""
    curve, total = np.empty(len(chances)), 0.0
    for i in range(len(chances)):
        total += chances[i]
        curve[i] = min(total, 1.0)
    return curve


@jit
def _length(curve: FloatArray, edges: FloatArray, produced: int, at: int, quantile: float) -> float:
    """Return the `quantile` of the length of an output that has `produced` tokens, which are in bin `at`."""
    length = _invert(curve, edges, quantile)
    if produced > 0:
        low = curve[at - 1] if at > 0 else 0.0
        within = min((produced - edges[at]) / (edges[at + 1] - edges[at]), 1.0)
        longer = 1.0 - (low + (curve[at] - low) * within)
        # past the last thing known about the class, rounding is all that is left of F
        conditional = _invert(curve, edges, 1.0 - (1.0 - quantile) * longer) if longer > 1e-9 else math.inf
        length = min(conditional, MAX_GROWTH * max(length, produced))
    return length


@jit
def _invert(curve: FloatArray, edges: FloatArray, share: float) -> float:
    """Return the length at which F reaches `share`; `inf` where it never does."""
    index = np.searchsorted(curve, share)
    if index == len(curve):
        return math.inf
    low = curve[index - 1] if index > 0 else 0.0
    left, right = edges[index], edges[index + 1]
    length: float = left + (right - left) * (share - low) / (curve[index] - low)
    return length
