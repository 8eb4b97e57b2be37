"""The highest rate at which every class attains its target: attainment by rate, and where it crosses.

Theory of operation. Rates lie on one geometric grid (`STEP` apart), so that searches ask for the same
runs and systems are compared at the same rates on the same windows of requests. A `Curve` counts, for
each rate, window and class, the requests met and offered. Windows are pooled: attainment at a rate is met
over offered of all windows, for the class that has least. It falls with the rate except for chance, so
the curve is replaced by the nearest one that never rises (isotonic regression), and capacity is where
that crosses the target, between two rates that were run, linear in the logarithm of the rate. A window
that has not drained `MAX_DRAIN_S` after its last deadline counts as met by nobody.

`measure` first brackets the crossing on a few windows, with runs that may stop early, then runs every
window in full around it. It goes on outward, with growing steps, until the bootstrap interval of the
capacity lies inside the rates that were run: a bracket that chance put in the wrong place is found wrong
and left. `tune` races settings on other windows: one that fails a little above the best so far is out.

Both are generators of questions (`Point`s) and know nothing of simulation: the caller answers them, from
a file of earlier answers or on as many processes as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Settings = str  # a system's settings as JSON text, which tells them apart

STEP = 1.03
TARGETS = (0.90, 0.95, 0.99)
MAX_DRAIN_S = 20.0
LOWEST_RPS, HIGHEST_RPS = 0.004, 500.0
COARSE_STEPS = 12  # grid steps of the first bracket: a factor of 1.43
DRAWS = 2000
BEYOND = 1.5  # how far past the rates that were run a bootstrap draw may lie
INTERVAL = (2.5, 97.5)  # percentiles


def rate_at(index: int) -> float:
    """Return the rate of a grid index, in requests per second and GPU."""
    return float(f"{STEP**index:.6g}")


def index_of(rate_rps: float) -> int:
    """Return the grid index nearest to a rate."""
    return round(math.log(rate_rps) / math.log(STEP))


LOWEST, HIGHEST = index_of(LOWEST_RPS), index_of(HIGHEST_RPS)


class Point(NamedTuple):
    """One run that a search asks for. `may_stop`: as soon as the outcome is clear."""

    part: str
    settings: Settings
    rate_index: int
    window: int
    may_stop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """What came of one run: by class, requests met, offered, promised and kept; and whether it drained in time.

    `stopped`: it was cut short, and what was left counts as not met.
    """

    by_class: Mapping[str, tuple[int, int, int, int]]
    drain_s: float = 0.0
    stopped: bool = False

    def met(self, name: str) -> int:
        """Return the requests of a class that count as met."""
        return self.by_class[name][0] if self.drain_s < MAX_DRAIN_S else 0


Question = Generator[list[Point], Mapping[Point, RunOutcome], "Answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEffort:
    """How much a search may run.

    `steps`: grid steps that the final bracket may be wide. `max_rates`: how many rates the interval may ask
    for in all; `higher_rates`: how many more each target above the first.
    """

    num_windows: int = 10
    coarse_windows: int = 3
    tune_windows: int = 2
    steps: int = 1
    max_rates: int = 9
    higher_rates: int = 3
    targets: tuple[float, ...] = TARGETS


@dataclass(slots=True, kw_only=True)
class Curve:
    """Attainment by rate. `met[index]` has shape (windows, classes), as `offered` has.

    `promises[index]`: how many were given and how many kept.
    """

    classes: tuple[str, ...] = ()
    offered: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    met: dict[int, FloatArray] = field(default_factory=dict)
    promises: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, index: int, outcomes: Sequence[RunOutcome]) -> None:
        """Add a rate at which every window has run."""
        if not self.classes:
            self.classes = tuple(sorted({name for one in outcomes for name in one.by_class}))
            table = [[one.by_class.get(name, (0, 0))[1] for name in self.classes] for one in outcomes]
            self.offered = np.array(table, np.float64)
        rows = [[one.met(name) if name in one.by_class else 0 for name in self.classes] for one in outcomes]
        self.met[index] = np.array(rows, np.float64)
        counts = [count for one in outcomes for count in one.by_class.values()]
        self.promises[index] = sum(count[2] for count in counts), sum(count[3] for count in counts)

    @property
    def indices(self) -> list[int]:
        """Return the grid indices that were run, ascending."""
        return sorted(self.met)

    def attainment(self, index: int) -> dict[str, float]:
        """Return the pooled attainment of each class at a rate."""
        shares = self.met[index].sum(axis=0) / self.offered.sum(axis=0)
        return dict(zip(self.classes, shares.tolist(), strict=True))

    def worst(self, index: int) -> float:
        """Return the attainment of the class that has least."""
        return min(self.attainment(index).values())

    def capacities(self, target: float, weights: FloatArray) -> FloatArray:
        """Return the capacity for each row of window weights, shape (draws, windows), as rates."""
        indices = self.indices
        met = np.einsum("dw,rwc->drc", weights, np.stack([self.met[index] for index in indices]))
        offered = np.maximum((weights @ self.offered)[:, None, :], 1e-9)
        shares = np.where(offered > 1e-6, met / offered, 1.0).min(axis=2)
        return crossing(never_rising(shares), np.log([rate_at(index) for index in indices]), target)

    def fitted(self) -> FloatArray:
        """Return the attainment of the class that has least at each rate that was run, never rising."""
        return np.asarray(never_rising(np.array([[self.worst(index) for index in self.indices]]))[0], np.float64)

    def capacity(self, target: float) -> float | None:
        """Return the capacity over all windows; 0 where no rate passes, None where no rate that was run does."""
        if self.fitted()[0] < target:
            return 0.0 if self.indices[0] <= LOWEST else None
        if self.fitted()[-1] >= target:
            return rate_at(self.indices[-1])
        return float(self.capacities(target, np.ones((1, len(self.offered))))[0])

    def draws(self, target: float, *, seed: int = 0) -> FloatArray:
        """Return bootstrap draws of the capacity, windows drawn with replacement: the same ones for every system."""
        return self.capacities(target, window_draws(len(self.offered), seed=seed))


def window_draws(num_windows: int, *, seed: int = 0) -> FloatArray:
    """Return how often each window is drawn, shape (`DRAWS`, windows)."""
    rng = np.random.default_rng([seed, num_windows])
    draws = rng.multinomial(num_windows, [1 / num_windows] * num_windows, size=DRAWS)
    return np.asarray(draws, np.float64)


def never_rising(shares: FloatArray) -> FloatArray:
    """Return, for each row, the nearest sequence (least squares) that never rises. Shape (draws, rates)."""
    draws, rates = shares.shape
    sums = np.concatenate([np.zeros((draws, 1)), np.cumsum(shares, axis=1)], axis=1)
    fitted = np.full_like(shares, np.inf)
    for first in range(rates):
        mean = (sums[:, first + 1 :] - sums[:, first : first + 1]) / np.arange(1, rates - first + 1)
        best_after = np.maximum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
        fitted[:, first:] = np.minimum(fitted[:, first:], best_after)
    return fitted


def crossing(fitted: FloatArray, log_rates: FloatArray, target: float) -> FloatArray:
    """Return the rate at which each row falls below a target. Rows never rise.

    Where it does so beyond the rates that were run, the row goes on with its mean slope, `BEYOND` times at most.
    """
    passing = (fitted >= target - 1e-12).sum(axis=1)
    count = len(log_rates)
    last = np.clip(passing - 1, 0, max(count - 2, 0))
    following = np.minimum(last + 1, count - 1)
    rows = np.arange(len(fitted))
    upper, lower = fitted[rows, last], fitted[rows, following]
    share = np.clip((upper - target) / np.maximum(upper - lower, 1e-12), 0.0, 1.0)
    inside = log_rates[last] + share * (log_rates[following] - log_rates[last])
    slope = (fitted[:, 0] - fitted[:, -1]) / max(float(log_rates[-1] - log_rates[0]), 1e-12)
    limit = math.log(BEYOND)
    below = log_rates[0] - np.clip((target - fitted[:, 0]) / np.maximum(slope, 1e-9), 0.0, limit)
    above = log_rates[-1] + np.clip((fitted[:, -1] - target) / np.maximum(slope, 1e-9), 0.0, limit)
    log_rate = np.where(passing == 0, below, np.where(passing == count, above, inside))
    return np.asarray(np.exp(log_rate), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The settings chosen, and attainment by rate on the windows that are reported."""

    settings: Settings
    curve: Curve


def pooled(outcomes: Sequence[RunOutcome]) -> float:
    """Return the attainment of the class that has least, over some windows."""
    names = {name for one in outcomes for name in one.by_class}
    shares = []
    for name in names:
        mine = [one for one in outcomes if name in one.by_class]
        shares.append(sum(one.met(name) for one in mine) / max(1, sum(one.by_class[name][1] for one in mine)))
    return min(shares)


class _Asker:
    """Ask for whole rates of one part and setting; remember what passed on a few windows."""

    def __init__(self, part: str, settings: Settings, target: float, num_windows: int) -> None:
        self.part, self.settings, self.target, self.num_windows = part, settings, target, num_windows
        self.passed: dict[int, bool] = {}

    def points(self, index: int, *, may_stop: bool) -> list[Point]:
        return [Point(self.part, self.settings, index, window, may_stop) for window in range(self.num_windows)]

    def passes(self, index: int) -> Generator[list[Point], Mapping[Point, RunOutcome], bool]:
        if index not in self.passed:
            points = self.points(index, may_stop=True)
            answers = yield points
            self.passed[index] = pooled([answers[point] for point in points]) >= self.target
        return self.passed[index]

    def bracket(self, start: int, width: int) -> Generator[list[Point], Mapping[Point, RunOutcome], tuple[int, int]]:
        """Return (passing, failing) indices at most `width` apart; `LOWEST - 1` passes and `HIGHEST + 1` fails."""
        low, high, stride = LOWEST - 1, HIGHEST + 1, COARSE_STEPS
        index = min(max(start, LOWEST), HIGHEST)
        while low < LOWEST or high > HIGHEST:
            if (yield from self.passes(index)):
                low = index
                if index == HIGHEST:
                    return low, high
            else:
                high = index
                if index == LOWEST:
                    return low, high
            index = min(low + stride, HIGHEST) if low >= LOWEST else max(high - stride, LOWEST)
            stride *= 2
        while high - low > width:
            middle = (low + high) // 2
            low, high = (middle, high) if (yield from self.passes(middle)) else (low, middle)
        return low, high


def tune(
    grid: Sequence[Settings], start: int, effort: SearchEffort
) -> Generator[list[Point], Mapping[Point, RunOutcome], tuple[Settings, int]]:
    """Return the settings that serve the highest rate on the tuning windows, and its index."""
    target = min(effort.targets)
    best, most = grid[0], LOWEST - 1
    for settings in grid:
        asker = _Asker("tune", settings, target, effort.tune_windows)
        if most >= LOWEST:
            if most >= HIGHEST or not (yield from asker.passes(most + 1)):
                continue
            start = most + 1
        low, _ = yield from asker.bracket(start, max(2, effort.steps))
        if low > most:
            best, most = settings, low
    return best, most


def measure(settings: Settings, start: int, effort: SearchEffort) -> Question:
    """Return attainment by rate around every target, on the reporting windows."""
    target = min(effort.targets)
    coarse = _Asker("report", settings, target, min(effort.coarse_windows, effort.num_windows))
    low, high = yield from coarse.bracket(start, max(2, effort.steps))
    full = _Asker("report", settings, target, effort.num_windows)
    curve = Curve()

    def run(index: int) -> Generator[list[Point], Mapping[Point, RunOutcome], None]:
        points = full.points(index, may_stop=False)
        answers = yield points
        curve.add(index, [answers[point] for point in points])

    for index in sorted({max(low, LOWEST), min(high, HIGHEST)}):
        yield from run(index)
    while (following := _next_rate(curve, target, effort)) is not None:
        yield from run(following)
    for higher in sorted(effort.targets)[1:]:
        extra = 0
        while extra < effort.higher_rates and (following := _next_lower(curve, higher)) is not None:
            yield from run(following)
            extra += 1
    return Answer(settings=settings, curve=curve)


def _next_rate(curve: Curve, target: float, effort: SearchEffort) -> int | None:
    """Return the next rate to run to narrow the capacity interval at `target`; None when it is narrow enough."""
    indices = curve.indices
    passing = int((curve.fitted() >= target).sum())
    width = indices[-1] - indices[0]
    outward = max(1, width)
    if passing == 0:
        return max(indices[0] - outward, LOWEST) if indices[0] > LOWEST else None
    if passing == len(indices):
        return min(indices[-1] + outward, HIGHEST) if indices[-1] < HIGHEST else None
    low, high = indices[passing - 1], indices[passing]
    if high - low > effort.steps:
        return (low + high) // 2
    if len(curve.offered) < 3 or len(indices) >= effort.max_rates:
        return None
    draws = curve.draws(target)
    ends = np.percentile(draws, INTERVAL)
    if ends[0] <= rate_at(indices[0]) * (1 + 1e-9) and indices[0] > LOWEST:
        return max(indices[0] - outward, LOWEST)
    if ends[1] >= rate_at(indices[-1]) * (1 - 1e-9) and indices[-1] < HIGHEST:
        return min(indices[-1] + outward, HIGHEST)
    return None


def _next_lower(curve: Curve, target: float) -> int | None:
    """Return the next rate to run for a higher target than the search's own, coarsely."""
    indices = curve.indices
    passing = int((curve.fitted() >= target).sum())
    if passing == 0:
        stride = max(4, indices[-1] - indices[0])
        return max(indices[0] - stride, LOWEST) if indices[0] > LOWEST else None
    if passing < len(indices) and indices[passing] - indices[passing - 1] > 5:
        return (indices[passing] + indices[passing - 1]) // 2
    return None


def search(grid: Sequence[Settings], guess_rps: Callable[[], float], effort: SearchEffort) -> Question:
    """Choose settings on the tuning windows, then measure them on the reporting ones."""
    start = index_of(guess_rps())
    settings = grid[0]
    if len(grid) > 1:
        settings, found = yield from tune(grid, start, effort)
        start = found if found >= LOWEST else start
    return (yield from measure(settings, start, effort))


def ratio_draws(ours: Curve, theirs: Curve, target: float) -> FloatArray:
    """Return bootstrap draws of capacity(ours) / capacity(theirs), over the same windows in each draw."""
    return np.asarray(ours.draws(target) / theirs.draws(target), np.float64)


def interval(draws: FloatArray) -> tuple[float, float]:
    """Return the 95 % interval of draws."""
    low, high = np.percentile(draws, INTERVAL)
    return float(low), float(high)
