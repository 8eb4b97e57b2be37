"""Fit the performance model to measured steps, and keep it right while the engine runs.

Theory of operation, offline (`fit_perf_model`; the regression itself is in `core.roofline`). Each step
gives one row of terms (tokens, requests, context, draft steps, attention pairs, 1) and its seconds. Steps
of a shape that occurs c times count 1/sqrt(c) each, so that a million decodes do not drown the prefills.
The first step of a repeated shape is left out (it compiles, allocates, warms caches), and so are rare
stalls. A second line must lower the error by more than chance would. Held-out steps are of shapes that training
has not seen, where there are shapes enough; what is reported about them includes the stalls.
What context costs is asked about far beyond the longest one that was measured. There a few percent of a
coefficient are most of a step, so the model holds how far chance may have moved it (`PerfModel.doubt`).

Online (`OnlineCorrection`). The lines are multiplied by one slowly moving factor, the geometric mean of
measured / fitted with clipped steps. Over it, a margin for each kind of batch (with prefill tokens or
decodes only): a quantile of measured / predicted in a sliding window, at the rank that covers the next
step with that chance. Where the machine drifts, a window's 95 % covers less than 95 % of what comes next;
so the quantile itself follows what is covered (adaptive conformal inference, Gibbs and Candes 2021): up a
little after a step that took longer, down less after one that did not, never below 95 %. The margin starts
at 1.3 and approaches the quantile as n / (n + `EVIDENCE`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slos_serve.core.perf import TERMS, PerfModel
from slos_serve.core.roofline import doubts, fit_lines

if TYPE_CHECKING:
    from typing import Self

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MIN_STEPS = 8
MARGIN_QUANTILE = 0.95
MAX_QUANTILE = 0.99
QUANTILE_STEP = 0.005  # how far the quantile moves after a step beyond its margin; the other way, by 1/19 of it
FAR = ("per_context_token_s", "per_pair_s")  # terms that are multiplied far beyond what was measured
STALL_FACTOR = 3.0  # a step this much slower than predicted is a stall,
MAX_STALL_SHARE = 0.1  # unless there are so many that the model must be what is wrong
CLIP = 4.0  # median sizes of an error beyond which it counts no more when one line and two are compared

START_MARGIN = 1.3
EVIDENCE = 50.0  # steps of a kind after which its margin is half way to what was measured
MAX_MARGIN = 4.0
WINDOW = 2048  # steps behind the coverage: a machine that is slow for seconds is no drift
MARGIN_WINDOW = 128  # steps of each kind behind a margin: few, so that it follows what else the machine does
REFRESH = 16  # steps between two looks at the quantiles
MAX_CORRECTION = 3.0
DRIFT_FACTOR = 1.25
MIN_DRIFT_STEPS = 200
MIN_COVERAGE = 0.9
_KINDS = ("decode", "prefill")


class StepSample(NamedTuple):
    """What one engine step computed and the seconds it took; the terms are those of `core.perf`."""

    num_tokens: float
    num_requests: float
    context_tokens: float
    draft_steps: float
    attention_pairs: float
    has_prefill: float
    seconds: float


TOKENS, REQUESTS, CONTEXT, DRAFTS, PAIRS, HAS_PREFILL, SECONDS = range(7)  # columns of a table of them


def from_records(records: Iterable[Mapping[str, Any]]) -> list[StepSample]:
    """Read step records (dicts with the names of `StepSample`); what is missing or no number becomes nan.

    Absent terms other than tokens, requests and seconds are 0.
    """
    samples = []
    for record in records:
        values = {"context_tokens": 0.0, "draft_steps": 0.0, "attention_pairs": 0.0, "has_prefill": 0.0, **record}
        samples.append(StepSample(*(_number(values.get(name)) for name in StepSample._fields)))
    return samples


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """A fitted model and how far to trust it.

    `r2`: on seconds, of all fitted steps but the stalls; nan where all took the same. `mape_heldout`: mean
    |predicted - measured| / measured of steps that a fit of the others has not seen, stalls included.
    `margin_coverage`: the share of those within their margin. `terms`: names of the coefficients that are
    not 0. `longest_context`: the most tokens of one request that a step has read. `num_steps` were fitted,
    `num_heldout` of them kept apart first; `num_bad` were not usable, `num_first_sight` were left out, and
    so were `num_stalls` of `num_steps` in the end.
    """

    model: PerfModel
    r2: float
    mape_heldout: float
    margin_coverage: float
    num_steps: int
    terms: tuple[str, ...]
    longest_context: int = 0
    num_heldout: int = 0
    num_bad: int = 0
    num_first_sight: int = 0
    num_stalls: int = 0


def fit_perf_model(
    samples: Iterable[StepSample],
    *,
    holdout: float = 0.25,
    num_lines: int = 2,
    rng: np.random.Generator,
) -> FitReport:
    """Fit a roofline of at most `num_lines` lines (1 or 2); `samples` in the order in which they ran.

    `holdout` is the share of steps kept apart to judge the model; the returned model is then fitted on all.
    Raises `ValueError` where fewer than `MIN_STEPS` usable steps are given.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout = {holdout!r}: expected a share between 0 and 1")
    if num_lines not in {1, 2}:
        raise ValueError(f"num_lines = {num_lines!r}: expected 1 or 2")
    table = np.array(list(samples), dtype=np.float64).reshape(-1, len(StepSample._fields))
    usable = (
        np.isfinite(table).all(axis=1) & (table >= 0).all(axis=1) & (table[:, SECONDS] > 0) & (table[:, TOKENS] > 0)
    )
    num_bad = len(table) - int(usable.sum())
    table = table[usable]
    first = _first_sights(table)
    steps = _Steps.of(table[~first])
    if len(steps.seconds) < MIN_STEPS:
        raise ValueError(f"{len(steps.seconds)} usable steps: expected at least {MIN_STEPS}")
    heldout = _pick_groups(steps.group, holdout, rng)
    seen, unseen = steps.take(~heldout), steps.take(heldout)
    count = _choose_num_lines(seen) if num_lines == 2 else 1
    judged, _ = _fit_with_margins(seen, count)
    ratios = unseen.seconds / predicted_s(judged, unseen.terms)
    limit = np.where(unseen.has_prefill, judged.margin_prefill, judged.margin_decode)
    model, stalled = _fit_with_margins(steps, count)
    calm = steps.take(~stalled)
    error = calm.seconds - predicted_s(model, calm.terms)
    spread = calm.seconds - calm.seconds.mean()
    total = float(spread @ spread)
    return FitReport(
        model=model,
        r2=1.0 - float(error @ error) / total if total > 1e-12 * float(calm.seconds @ calm.seconds) else math.nan,
        mape_heldout=float(np.mean(np.abs(1.0 / ratios - 1.0))),
        margin_coverage=float(np.mean(ratios <= limit)),
        num_steps=len(steps.seconds),
        terms=tuple(term for i, term in enumerate(TERMS) if any(line[i] > 0 for line in model.lines)),
        longest_context=_longest_context(steps),
        num_heldout=len(unseen.seconds),
        num_bad=num_bad,
        num_first_sight=int(first.sum()),
        num_stalls=int(stalled.sum()),
    )


def predicted_s(model: PerfModel, terms: FloatArray) -> FloatArray:
    """Return margin-free seconds of many batches; `terms` has shape (N, 6): columns of `TERMS`, the last 1."""
    result: FloatArray = (terms @ model.as_array().T).max(axis=1)
    return result


def _longest_context(steps: _Steps) -> int:
    """Return the longest context of one request, where a step says it: of decodes alone on average, of a chunk alone.

    A chunk of x tokens at context c reads x * (c + x / 2), and the last of them c + x.
    """
    tokens, requests, context, _, pairs, _ = steps.terms.T
    chunk = np.where(steps.has_prefill & (requests == 1), pairs / tokens + tokens / 2, 0.0)
    decode = np.where(steps.has_prefill, 0.0, context / np.maximum(requests, 1.0))
    return round(float(max(chunk.max(), decode.max())))


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps as columns. `weight` balances the shapes; `group` numbers the shapes that are alike."""

    terms: FloatArray
    seconds: FloatArray
    has_prefill: BoolArray
    group: IntArray
    weight: FloatArray

    @classmethod
    def of(cls, table: FloatArray) -> Self:
        terms = np.hstack([table[:, :HAS_PREFILL], np.ones((len(table), 1))])
        group = _groups(table[:, :SECONDS])
        weight = 1.0 / np.sqrt(np.bincount(group)[group]) if len(table) else np.zeros(0)
        return cls(terms, table[:, SECONDS], table[:, HAS_PREFILL] > 0, group, weight)

    def take(self, rows: BoolArray) -> _Steps:
        return _Steps(self.terms[rows], self.seconds[rows], self.has_prefill[rows], self.group[rows], self.weight[rows])

    def fit_lines(self, num_lines: int) -> FloatArray:
        return fit_lines(self.terms, self.seconds, self.weight, num_lines)


def _groups(columns: FloatArray) -> IntArray:
    """Give alike rows the same number: sizes exact up to 16, then within an eighth of an octave."""
    coarse = np.where(columns <= 16, columns, 16 + np.floor(8 * np.log2(np.maximum(columns, 16.0) / 16)))
    _, inverse = np.unique(coarse, axis=0, return_inverse=True)
    return inverse.reshape(-1).astype(np.int64)


def _first_sights(table: FloatArray) -> BoolArray:
    """Mark the first step of each shape (tokens, requests, drafts, kind) that comes again at least twice."""
    first = np.zeros(len(table), dtype=np.bool_)
    if len(table):
        shapes = _groups(table[:, [TOKENS, REQUESTS, DRAFTS, HAS_PREFILL]])
        _, index, counts = np.unique(shapes, return_index=True, return_counts=True)
        first[index[counts >= 3]] = True
    return first


def _pick_groups(group: IntArray, share: float, rng: np.random.Generator) -> BoolArray:
    """Mark about `share` of the rows, whole groups where there are at least eight, at least one row each way."""
    names = np.unique(group)
    if len(names) < 8:
        group, names = np.arange(len(group)), np.arange(len(group))
    order = rng.permutation(names)
    sizes = np.bincount(group, minlength=int(names[-1]) + 1)[order]
    picked = order[: max(1, int(np.searchsorted(np.cumsum(sizes), share * len(group))))]
    return np.isin(group, picked)


def _choose_num_lines(steps: _Steps) -> int:
    """Return 2 where a second line lowers the error by more than its coefficients could by chance, else 1.

    On all steps, for the few that only the second line rules may be any fold's. The Bayesian information criterion
    (Schwarz 1978) of clipped errors: the second line has two coefficients more, and the place where they meet.
    """
    if len(steps.seconds) < 4 * len(TERMS):
        return 1
    sizes = [np.abs(np.log(steps.seconds / (steps.terms @ steps.fit_lines(n).T).max(axis=1))) for n in (1, 2)]
    limit = max(CLIP * float(np.median(sizes[1])), 1e-3)
    one, two = (float(np.average(np.minimum(size, limit) ** 2, weights=steps.weight)) for size in sizes)
    num = float(steps.weight.sum() ** 2 / (steps.weight @ steps.weight))
    return 2 if num * math.log(one / two) > 3 * math.log(num) else 1


def _fit_with_margins(steps: _Steps, num_lines: int) -> tuple[PerfModel, BoolArray]:
    """Return the model of `steps` with its margins, and which steps were stalls that it did not learn from."""
    lines = steps.fit_lines(num_lines)
    stalled = steps.seconds > STALL_FACTOR * (steps.terms @ lines.T).max(axis=1)
    if stalled.mean() > MAX_STALL_SHARE:
        stalled[:] = False
    if stalled.any():
        lines = steps.take(~stalled).fit_lines(num_lines)
    calm = steps.take(~stalled)
    above = doubts(lines, calm.terms, calm.seconds, calm.weight)
    doubt = tuple(float(value) if term in FAR else 0.0 for term, value in zip(TERMS, above, strict=True))
    model = PerfModel(lines=tuple(tuple(float(value) for value in line) for line in lines), doubt=doubt)
    ratios = steps.seconds / predicted_s(model, steps.terms)
    every = _upper_quantile(ratios)
    prefill, decode = ratios[steps.has_prefill], ratios[~steps.has_prefill]
    margins = [_upper_quantile(kind) if len(kind) >= MIN_STEPS else every for kind in (prefill, decode)]
    return replace(model, margin_prefill=margins[0], margin_decode=margins[1]), stalled


def _upper_quantile(ratios: FloatArray, quantile: float = MARGIN_QUANTILE) -> float:
    """Return the value that covers the next ratio with chance `quantile`: rank ceil((n + 1) * q)."""
    rank = min(math.ceil((len(ratios) + 1) * quantile), len(ratios)) - 1
    return float(np.partition(ratios, rank)[rank])


class OnlineCorrection:
    """Keep a fitted model right: one slow factor on its lines, a margin for each kind of batch.

    `model` is what to plan with now; it changes every `REFRESH` steps at most. SLOs are defined by the
    pinned profile, never by this. Constant memory; steps without a usable time are counted in `num_bad`.
    """

    def __init__(self, model: PerfModel) -> None:
        self.base = model
        self.num_steps = 0
        self.num_bad = 0
        self._log_factor = 0.0
        self._ratios: tuple[deque[float], ...] = (deque(maxlen=MARGIN_WINDOW), deque(maxlen=MARGIN_WINDOW))  # to base
        self._counts = [0, 0]
        self._within: deque[bool] = deque(maxlen=WINDOW)
        self._num_within = 0
        self._until_refresh = 1
        self._limits = [0.0, 0.0]  # margin of each kind times the factor: what a ratio may reach
        self._quantiles = [MARGIN_QUANTILE, MARGIN_QUANTILE]
        self._model = model
        self._refresh()

    @property
    def model(self) -> PerfModel:
        """The corrected model with its present margins."""
        return self._model

    @property
    def num_steady(self) -> int:
        """How many steps may be observed, the last of which may change `model`."""
        return self._until_refresh

    @property
    def factor(self) -> float:
        """The correction on the lines of the profile, 1.0 where the engine is as fast as then."""
        return math.exp(self._log_factor)

    @property
    def coverage(self) -> float | None:
        """Share of the last `WINDOW` steps that ended within predicted time and margin; None before any."""
        return self._num_within / len(self._within) if self._within else None

    @property
    def drift(self) -> bool:
        """Whether the profile needs to be measured again: it is off by a quarter, or margins do not hold."""
        if self.num_steps < MIN_DRIFT_STEPS:
            return False
        covered = self._num_within / len(self._within)
        return abs(self._log_factor) > math.log(DRIFT_FACTOR) or covered < MIN_COVERAGE

    def observe(self, sample: StepSample) -> None:
        """Learn from one measured step."""
        tokens, requests, context, drafts, pairs, has_prefill, seconds = sample
        base = 0.0
        for line in self.base.lines:
            line_s = (
                line[0] * tokens + line[1] * requests + line[2] * context + line[3] * drafts + line[4] * pairs + line[5]
            )
            if not line_s <= base:
                base = line_s
        # written so that nan fails
        if not (0.0 < seconds < math.inf and 0.0 < base < math.inf and has_prefill < math.inf and min(sample) >= 0.0):
            self.num_bad += 1
            return
        ratio = seconds / base
        kind = 1 if has_prefill > 0 else 0
        within = ratio <= self._limits[kind]
        if len(self._within) == WINDOW:
            self._num_within -= self._within[0]
        self._within.append(within)
        self._num_within += within
        moved = self._quantiles[kind] + QUANTILE_STEP * (MARGIN_QUANTILE - within)
        self._quantiles[kind] = min(max(moved, MARGIN_QUANTILE), MAX_QUANTILE)
        self._ratios[kind].append(ratio)
        self._counts[kind] += 1
        self.num_steps += 1
        step = math.log(ratio) - self._log_factor
        self._log_factor += min(max(step, -0.25), 0.25) / min(100.0 + self.num_steps, 1000.0)
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._refresh()

    def to_json(self) -> dict[str, Any]:
        """Return everything that `from_json` needs to go on."""
        return {
            "schema": "slos-serve-correction/1",
            "base": self.base.to_json(),
            "log_factor": self._log_factor,
            "num_steps": self.num_steps,
            "num_bad": self.num_bad,
            "counts": list(self._counts),
            "quantiles": list(self._quantiles),
            "ratios": {kind: list(self._ratios[i]) for i, kind in enumerate(_KINDS)},
            "within": [int(value) for value in self._within],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`; `ValueError` for another schema or unusable numbers."""
        if data.get("schema") != "slos-serve-correction/1":
            raise ValueError(f"schema = {data.get('schema')!r}: expected 'slos-serve-correction/1'")
        correction = cls(PerfModel.from_json(data["base"]))
        correction._log_factor = float(data["log_factor"])
        correction.num_steps, correction.num_bad = int(data["num_steps"]), int(data["num_bad"])
        correction._counts = [int(count) for count in data["counts"]]
        quantiles = [float(quantile) for quantile in data["quantiles"]]
        if len(quantiles) != 2 or not all(MARGIN_QUANTILE <= quantile <= MAX_QUANTILE for quantile in quantiles):
            raise ValueError(f"quantiles = {quantiles!r}: expected two of {MARGIN_QUANTILE} to {MAX_QUANTILE}")
        correction._quantiles = quantiles
        for i, kind in enumerate(_KINDS):
            ratios = [float(ratio) for ratio in data["ratios"][kind]]
            if not all(0 < ratio < math.inf for ratio in ratios):
                raise ValueError(f"correction ratios of {kind}: expected positive finite numbers")
            correction._ratios[i].extend(ratios)
        correction._within.extend(bool(value) for value in data["within"])
        correction._num_within = sum(correction._within)
        correction._refresh()
        return correction

    def _refresh(self) -> None:
        """Recompute factor, margins and the model made of them."""
        # often while evidence is scarce, then every REFRESH steps
        self._until_refresh = min(max(self.num_steps // 4, 1), REFRESH)
        largest = math.log(MAX_CORRECTION)
        self._log_factor = min(max(self._log_factor, -largest), largest)
        factor = math.exp(self._log_factor)
        margins = []
        starts = (self.base.margin_decode, self.base.margin_prefill)
        for kind, ratios in enumerate(self._ratios):
            margin = start = max(START_MARGIN, starts[kind])
            if ratios:
                measured = _upper_quantile(np.array(ratios), self._quantiles[kind]) / factor
                trust = self._counts[kind] / (self._counts[kind] + EVIDENCE)
                margin = max(measured, start + (measured - start) * trust)
            margins.append(min(margin, MAX_MARGIN))
        self._limits = [margin * factor for margin in margins]
        self._model = replace(self.base.times(factor), margin_decode=margins[0], margin_prefill=margins[1])
