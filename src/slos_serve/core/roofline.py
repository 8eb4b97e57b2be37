"""Least squares for rooflines: the highest of a few lines with coefficients that are not negative.

Theory of operation. The error is relative, (predicted - measured) / measured: a step of 5 ms matters to a
50 ms promise as much as one of 500 ms to a TTFT. It is at least -1, and Huber weights (from the median
size of the errors) bound it further, so a stalled step does little harm. One line is an active-set
non-negative least squares. Two are found by turns, from several starts: give each row to the line that is
higher there, refit both, and keep the best roofline seen.

What changes with the size of a batch is whether weights or arithmetic take the time: tokens and the fixed cost have
a coefficient for each line. Attention, sampling and drafts come on top of either, so the lines share theirs. Else the
line that rules small batches says what long contexts cost from the few short ones that it has seen. A shared term that
chance may have made is left out: what a few thousand tokens of context say is multiplied by a hundred thousand.
"""

from __future__ import annotations

import math

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
    best, best_error = _by_turns(terms, seconds, weight, everything, 1)
    if num_lines == 2:
        predicted = (terms @ best.T).max(axis=1)
        starts = [(predicted > np.quantile(predicted, q)).astype(np.int64) for q in (0.25, 0.5, 0.75, 0.9, 0.97)]
        # a line that is flatter in tokens than the other begins below it: start from curvature, too
        middle = np.argsort(np.argsort(seconds / predicted)) > 0.5 * len(predicted)
        for start in [*starts, middle.astype(np.int64)]:
            lines, error = _by_turns(terms, seconds, weight, start, 2)
            if error < best_error:
                best, best_error = lines, error
    return _without_chance(best, terms / seconds[:, None], weight)


def _without_chance(lines: FloatArray, relative: FloatArray, weight: FloatArray) -> FloatArray:
    """Return the lines without the shared terms that the steps are no evidence for."""
    each = relative @ lines.T
    line_of = each.argmax(axis=1)
    size = np.abs(each.max(axis=1) - 1.0)
    root = np.sqrt(weight * _robust(size))
    relative = relative.copy()
    shared = np.delete(np.arange(relative.shape[1]), OWN).tolist()
    while True:
        present = [term for term in shared if lines[0, term] > 0]
        if not present:
            return lines
        error = _squares(lines, relative, root, line_of)
        others = {}
        for term in present:
            fewer = relative.copy()
            fewer[:, term] = 0.0
            others[term] = _refit(fewer, root, line_of, len(lines))
        rise = {term: _squares(others[term], relative, root, line_of) - error for term in present}
        least = min(rise, key=rise.__getitem__)
        if rise[least] > SURE**2 * error / max(len(relative) - 2 * relative.shape[1], 1):
            return lines
        lines = others[least]
        relative[:, least] = 0.0


def standard_errors(lines: FloatArray, terms: FloatArray, seconds: FloatArray, weight: FloatArray) -> FloatArray:
    """Return how far chance may have moved each shared coefficient, one standard error; shape (k,), 0 for others.

    The sandwich estimator (White 1980), which takes errors as they are. A coefficient that was left out has one too.
    """
    relative = terms / seconds[:, None]
    each = relative @ lines.T
    line_of = each.argmax(axis=1)
    error = each.max(axis=1) - 1.0
    root = np.sqrt(weight * _robust(np.abs(error)))
    design = _design(relative * root[:, None], line_of, len(lines))
    scale = np.sqrt((design * design).sum(axis=0))
    scale[scale == 0] = 1.0
    design = design / scale
    bread = np.linalg.pinv(design.T @ design, hermitian=True)
    shaken = design * (root * error)[:, None]
    spread = np.sqrt(np.maximum(np.diag(bread @ (shaken.T @ shaken) @ bread), 0.0)) / scale
    result = np.zeros(terms.shape[1])
    shared = np.delete(np.arange(terms.shape[1]), OWN)
    result[shared] = spread[: len(shared)]
    return result


def _squares(lines: FloatArray, relative: FloatArray, root: FloatArray, line_of: IntArray) -> float:
    error = ((relative * lines[line_of]).sum(axis=1) - 1.0) * root
    return float(error @ error)


def _robust(size: FloatArray) -> FloatArray:
    """Return Huber's weights for errors of this size."""
    limit = max(1.5 * 1.4826 * float(np.median(size)), 0.01)
    weights: FloatArray = np.minimum(1.0, limit / np.maximum(size, limit))
    return weights


def _by_turns(
    terms: FloatArray, seconds: FloatArray, weight: FloatArray, line_of: IntArray, num_lines: int
) -> tuple[FloatArray, float]:
    """Refit each line to the steps it rules and hand out the steps again, until it stops getting better."""
    relative = terms / seconds[:, None]
    robust = np.ones(len(seconds))
    lines = np.zeros((num_lines, terms.shape[1]))
    best, best_error, stale = lines, math.inf, 0
    for _ in range(50):
        if np.bincount(line_of, minlength=num_lines).min() < min(terms.shape[1], len(seconds)):
            return best, best_error
        lines = _refit(relative, np.sqrt(weight * robust), line_of, num_lines)
        each = relative @ lines.T
        line_of = each.argmax(axis=1)
        size = np.abs(each.max(axis=1) - 1.0)
        error = float(np.average(size, weights=weight))
        stale = 0 if error < best_error * (1 - 1e-6) else stale + 1
        if error < best_error:
            best, best_error = lines.copy(), error
        if stale == 5:
            break
        robust = _robust(size)
    return best, best_error


def _refit(relative: FloatArray, root: FloatArray, line_of: IntArray, num_lines: int) -> FloatArray:
    """Return the lines that fit best where each row is ruled by its line; `root`: of the weights."""
    found = nonnegative_least_squares(_design(relative * root[:, None], line_of, num_lines), root)
    shared = np.delete(np.arange(relative.shape[1]), OWN)
    lines = np.zeros((num_lines, relative.shape[1]))
    lines[:, shared] = found[: len(shared)]
    lines[:, OWN] = found[len(shared) :].reshape(num_lines, len(OWN))
    return lines


def _design(scaled: FloatArray, line_of: IntArray, num_lines: int) -> FloatArray:
    """Return the columns of the regression: the shared terms, then each line's own."""
    own = [scaled[:, OWN] * (line_of == line)[:, None] for line in range(num_lines)]
    return np.hstack([np.delete(scaled, OWN, axis=1), *own])


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
