"""Least squares for rooflines: the highest of a few lines with coefficients that are not negative.

Theory of operation. The error is relative, (measured - predicted) / predicted: a step of 5 ms matters to a
50 ms promise as much as one of 500 ms to a TTFT. Relative to what was measured it would be smallest below the
mean, for short steps would count most; and where the host is late for one output and on time for the next, a long
step is followed by one as much too short. Huber weights (from the median size of the errors) bound it, so a
stalled step does little harm. One line is an active-set non-negative least squares, repeated with the weights and
the predictions that it leads to. Two are found by turns, from several starts: give each row to the line that is
higher there, refit both, and keep the best roofline seen, by the mean size of log(measured / predicted).

What changes with the size of a batch is whether weights or arithmetic take the time: tokens and the fixed cost have
a coefficient for each line. Attention, sampling and drafts come on top of either, so the lines share theirs. Else the
line that rules small batches says what long contexts cost from the few short ones that it has seen. A shared term that
chance may have made is left out: what a few thousand tokens of context say is multiplied by a hundred thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

OWN = (0, -1)  # the terms that each line has for itself: per token, fixed
SURE = 3.0  # standard errors that a shared term must be away from nothing

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def fit_lines(terms: FloatArray, seconds: FloatArray, weight: FloatArray, num_lines: int) -> FloatArray:
    """Return the coefficients of the best roofline found of at most `num_lines` (1 or 2), shape (lines, k).

    `terms`: shape (N, k). `seconds` (> 0) and `weight` (how much a row counts): shape (N,).
    """
    everything = np.zeros(len(seconds), dtype=np.int64)
    rows = _Rows(terms / seconds[:, None], np.ones(len(seconds)), everything, np.sqrt(weight))
    best, best_error = _by_turns(rows, terms, seconds, weight, 1)
    if num_lines == 2:
        rows = _Rows.of(best, terms, seconds, weight)
        predicted = (terms @ best.T).max(axis=1)
        starts = [(predicted > np.quantile(predicted, q)).astype(np.int64) for q in (0.25, 0.5, 0.75, 0.9, 0.97)]
        # a line that is flatter in tokens than the other begins below it: start from curvature, too
        middle = np.argsort(np.argsort(seconds / predicted)) > 0.5 * len(predicted)
        for start in [*starts, middle.astype(np.int64)]:
            lines, error = _by_turns(replace(rows, line_of=start), terms, seconds, weight, 2)
            if error < best_error:
                best, best_error = lines, error
    return _without_chance(best, terms, seconds, weight)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Steps as seen from a roofline: divided by what it predicts, and weighted by how far they are from it.

    `relative`: the terms, shape (N, k). `target`: measured / predicted. `line_of`: which line rules. `root`: of the
    weights.
    """

    relative: FloatArray
    target: FloatArray
    line_of: IntArray
    root: FloatArray

    @classmethod
    def of(cls, lines: FloatArray, terms: FloatArray, seconds: FloatArray, weight: FloatArray) -> _Rows:
        each = terms @ lines.T
        predicted = np.maximum(each.max(axis=1), 1e-3 * seconds)
        target = seconds / predicted
        root = np.sqrt(weight * _robust(np.abs(target - 1.0)))
        return cls(terms / predicted[:, None], target, each.argmax(axis=1), root)

    def without(self, term: int) -> _Rows:
        relative = self.relative.copy()
        relative[:, term] = 0.0
        return replace(self, relative=relative)

    def refit(self, num_lines: int) -> FloatArray:
        """Return the lines that fit best where each row is ruled by its line."""
        found = nonnegative_least_squares(self.design(num_lines), self.target * self.root)
        shared = np.delete(np.arange(self.relative.shape[1]), OWN)
        lines = np.zeros((num_lines, self.relative.shape[1]))
        lines[:, shared] = found[: len(shared)]
        lines[:, OWN] = found[len(shared) :].reshape(num_lines, len(OWN))
        return lines

    def design(self, num_lines: int) -> FloatArray:
        """Return the weighted columns of the regression: the shared terms, then each line's own."""
        scaled = self.relative * self.root[:, None]
        own = [scaled[:, OWN] * (self.line_of == line)[:, None] for line in range(num_lines)]
        return np.hstack([np.delete(scaled, OWN, axis=1), *own])

    def errors(self, lines: FloatArray) -> FloatArray:
        """Return the weighted errors, shape (N,)."""
        found: FloatArray = ((self.relative * lines[self.line_of]).sum(axis=1) - self.target) * self.root
        return found


def _without_chance(lines: FloatArray, terms: FloatArray, seconds: FloatArray, weight: FloatArray) -> FloatArray:
    """Return the lines without the shared terms that the steps are no evidence for."""
    rows = _Rows.of(lines, terms, seconds, weight)
    shared = np.delete(np.arange(terms.shape[1]), OWN).tolist()
    while True:
        present = [term for term in shared if lines[0, term] > 0]
        if not present:
            return lines
        error = _squares(rows.errors(lines))
        others = {term: rows.without(term).refit(len(lines)) for term in present}
        rise = {term: _squares(rows.errors(others[term])) - error for term in present}
        least = min(rise, key=rise.__getitem__)
        if rise[least] > SURE**2 * error / max(len(terms) - 2 * terms.shape[1], 1):
            return lines
        lines, rows = others[least], rows.without(least)


def doubts(lines: FloatArray, terms: FloatArray, seconds: FloatArray, weight: FloatArray) -> FloatArray:
    """Return what each shared coefficient may be above its value: `SURE` standard errors; shape (k,), 0 for others.

    They count from what the steps say with every term present: one that was left out, for chance could have made it,
    may be there all the same. The errors are the sandwich estimator's (White 1980), which takes them as they are.
    """
    rows = _Rows.of(lines, terms, seconds, weight)
    design = rows.design(len(lines))
    scale = np.sqrt((design * design).sum(axis=0))
    scale[scale == 0] = 1.0
    design = design / scale
    bread = np.linalg.pinv(design.T @ design, hermitian=True)
    shaken = design * rows.errors(lines)[:, None]
    spread = np.sqrt(np.maximum(np.diag(bread @ (shaken.T @ shaken) @ bread), 0.0)) / scale
    result = np.zeros(terms.shape[1])
    shared = np.delete(np.arange(terms.shape[1]), OWN)
    beyond = np.maximum(rows.refit(len(lines))[0] - lines[0], 0.0)
    result[shared] = beyond[shared] + SURE * spread[: len(shared)]
    return result


def _squares(errors: FloatArray) -> float:
    return float(errors @ errors)


def _robust(size: FloatArray) -> FloatArray:
    """Return Huber's weights for errors of this size."""
    limit = max(1.5 * 1.4826 * float(np.median(size)), 0.01)
    weights: FloatArray = np.minimum(1.0, limit / np.maximum(size, limit))
    return weights


def _by_turns(
    rows: _Rows, terms: FloatArray, seconds: FloatArray, weight: FloatArray, num_lines: int
) -> tuple[FloatArray, float]:
    """Refit each line to the steps it rules and hand out the steps again, until it stops getting better."""
    lines = np.zeros((num_lines, terms.shape[1]))
    best, best_error, stale = lines, math.inf, 0
    for _ in range(50):
        if np.bincount(rows.line_of, minlength=num_lines).min() < min(terms.shape[1], len(seconds)):
            return best, best_error
        lines = rows.refit(num_lines)
        rows = _Rows.of(lines, terms, seconds, weight)
        error = float(np.average(np.abs(np.log(rows.target)), weights=weight))
        stale = 0 if error < best_error * (1 - 1e-6) else stale + 1
        if error < best_error:
            best, best_error = lines.copy(), error
        if stale == 5:
            break
    return best, best_error


def nonnegative_least_squares(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """Return x >= 0 that minimises |matrix @ x - target| (the active-set method of Lawson and Hanson)."""
    scale = np.sqrt((matrix * matrix).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    gram, goal = scaled.T @ scaled, scaled.T @ target
    x = np.zeros(len(goal))
    free = np.zeros(len(goal), dtype=np.bool_)
    for _ in range(10 * len(goal)):
        gain = np.where(free, -math.inf, goal - gram @ x)
        if gain.max() <= 1e-10 * max(float(np.abs(goal).max()), 1e-300):
            break
        free[int(gain.argmax())] = True
        while free.any():
            trial = np.zeros(len(goal))
            trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], goal[free], rcond=1e-12)[0]
            if trial[free].min() > 0:
                x = trial
                break
            shrinking = free & (trial <= 0)
            ratio = x[shrinking] / np.maximum(x[shrinking] - trial[shrinking], 1e-300)
            x = x + min(float(ratio.min()), 1.0) * (trial - x)
            free &= x > 1e-12 * max(float(x.max()), 1e-300)
            x[~free] = 0.0
    result: FloatArray = x / scale
    return result
