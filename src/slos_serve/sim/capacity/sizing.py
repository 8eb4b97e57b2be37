"""How many replicas a workload needs: the fewest that keep every class's promises, and what they have to spare.

The same simulation as everywhere, with more or fewer replicas. Attainment grows with replicas and falls
with the rate but for chance, so both searches gallop and then halve. Attainment is that of the class that
has least, over all windows; a window that does not drain in time is met by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from slos_serve.sim.capacity.runs import outcome_of
from slos_serve.sim.capacity.search import RunOutcome, pooled
from slos_serve.sim.replica.replica import ReplicaOptions

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.replica.requests import SimRequest
    from slos_serve.sim.systems import System
    from slos_serve.sim.workloads.workload import Workload

BURST_SHARE = 0.2  # of the requests, in the middle, arrive faster
Z95 = 1.959964
FACTOR_STEP, HIGHEST_FACTOR = 1.05, 8.0


def retimed(workload: Workload, at_s: Callable[[float], float]) -> Workload:
    """Return the workload with every first arrival moved."""

    def moved(sim: SimRequest) -> SimRequest:
        return replace(sim, request=replace(sim.request, arrival_s=at_s(sim.request.arrival_s)))

    return replace(workload, arrivals=[moved(sim) for sim in workload.arrivals], duration_s=at_s(workload.duration_s))


def faster(workload: Workload, factor: float) -> Workload:
    """Return the workload at `factor` times its rate, by stretching time."""
    return retimed(workload, lambda at_s: at_s / factor)


def with_burst(workload: Workload, factor: float) -> Workload:
    """Return the workload with the middle fifth of its requests arriving `factor` times as fast."""
    times = [sim.request.arrival_s for sim in workload.arrivals]
    first = times[int((0.5 - BURST_SHARE / 2) * (len(times) - 1))]
    last = times[int((0.5 + BURST_SHARE / 2) * (len(times) - 1))]

    def at_s(time_s: float) -> float:
        inside = min(max(time_s - first, 0.0), last - first)
        return time_s - inside * (1 - 1 / factor)

    return retimed(workload, at_s)


@dataclass(slots=True, kw_only=True)
class Deployment:
    """One system on one hardware; remembers what it has run. `on_run` is told of every run."""

    system: System
    settings: Mapping[str, Any]
    hardware: Hardware
    max_model_len: int
    acceptance: float = 0.7
    seed: int = 0
    on_run: Callable[[], None] = lambda: None
    _known: dict[tuple[int, int], tuple[Workload, RunOutcome]] = field(default_factory=dict)

    def outcomes(self, workloads: Sequence[Workload], num_replicas: int) -> list[RunOutcome]:
        """Return what comes of each workload."""
        return [self._run(workload, num_replicas) for workload in workloads]

    def attainment(self, workloads: Sequence[Workload], num_replicas: int) -> float:
        """Return the attainment of the class that has least."""
        return pooled(self.outcomes(workloads, num_replicas))

    def curve(self, workloads: Sequence[Workload]) -> dict[int, list[RunOutcome]]:
        """Return what came of the workloads with each number of replicas that all of them have been run with."""
        counts = sorted({count for _, count in self._known})
        tried = {count: [self._known.get((id(one), count)) for one in workloads] for count in counts}
        return {count: [one[1] for one in every if one] for count, every in tried.items() if all(every)}

    def _run(self, workload: Workload, num_replicas: int) -> RunOutcome:
        key = id(workload), num_replicas
        if key not in self._known:
            result = self.system.serve(
                workload,
                self.hardware,
                settings=self.settings,
                num_replicas=num_replicas,
                engine=ReplicaOptions(acceptance={"": self.acceptance}),
                seed=self.seed,
                max_model_len=self.max_model_len,
            )
            self._known[key] = workload, outcome_of(result)  # the workload stays alive, and its id its own
            self.on_run()
        return self._known[key][1]


def worst_class(outcomes: Sequence[RunOutcome]) -> tuple[str, int, int]:
    """Return the class that attains least over all windows: its name, the requests met and those offered."""
    names = sorted({name for one in outcomes for name in one.by_class})
    sums = {name: [one for one in outcomes if name in one.by_class] for name in names}
    counts = {
        name: (sum(o.met(name) for o in mine), sum(o.by_class[name][1] for o in mine)) for name, mine in sums.items()
    }
    name = min(counts, key=lambda one: counts[one][0] / max(1, counts[one][1]))
    return name, *counts[name]


def likely(met: int, offered: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's): what so few requests leave open."""
    offered = max(1, offered)
    share, spread = met / offered, Z95**2 / offered
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / offered + spread / (4 * offered))
    return max(0.0, middle - half), min(1.0, middle + half)


def fewest(passes: Callable[[int], bool], *, start: int, most: int) -> int | None:
    """Return the smallest number from 1 to `most` that passes, None where `most` fails."""
    low, high = 0, min(max(start, 1), most)
    while not passes(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def highest_factor(passes: Callable[[float], bool]) -> float:
    """Return the highest factor on the rate that passes, at least 1 (which is known to pass), to 5 %."""
    steps = [1.0]
    while steps[-1] * FACTOR_STEP <= HIGHEST_FACTOR:
        steps.append(steps[-1] * FACTOR_STEP)
    low, high, stride = 0, len(steps), 4
    while low + stride < len(steps) and passes(steps[low + stride]):
        low, stride = low + stride, 2 * stride
    high = min(low + stride, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(steps[middle]) else (low, middle)
    return steps[low]
