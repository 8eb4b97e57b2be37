"""The highest rate at which every class attains its target: a bracket, then a bisection, run by run.

For one seed (one window of a scenario) the rate is stretched up or down by `STEP` until a rate that
passes and one that fails enclose the capacity, then the bracket is halved (geometrically) until it is
within `tolerance`. The answer is the highest rate that passed; attainment falls with the rate except for
chance, so the search trusts the bracket. A rate passes a target where every class of the mix attains it
and the last accepted request finishes within `MAX_DRAIN_S` of its last deadline. Runs are remembered: all
targets share them, and a run stops as soon as the lowest target is out of reach.

A system's capacity is the mean over its seeds; ratios are of such means, over the same seeds, with a
bootstrap interval over seeds. Rates are per GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.summary import drain_seconds
from slos_serve.sim.hardware import load_hardware
from slos_serve.sim.replica import ReplicaOptions
from slos_serve.sim.run import run_workload
from slos_serve.sim.scenarios import Offer, find_scenario
from slos_serve.sim.systems import find_system

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.run import RunResult
    from slos_serve.sim.workload import Workload

TARGETS = (0.90, 0.95, 0.99)
MAX_DRAIN_S = 20.0
STEP = 1.4
LOWEST_RPS, HIGHEST_RPS = 0.01, 500.0
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One system, with settings, on some seeds of a scenario, pooled. `guess_rps`: where the search starts, per GPU."""

    scenario: str
    system: str
    hardware: str
    data: str
    part: str
    seeds: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    targets: tuple[float, ...] = TARGETS
    tolerance: float = 0.03
    guess_rps: float = 1.0
    acceptance: float = 0.7
    known_lengths: bool = False
    max_requests: int | None = None

    def run(self, rate_rps: float) -> dict[float, bool]:
        """Simulate every seed at `rate_rps` per GPU and return which targets they pass together."""
        hardware = load_hardware(self.hardware)
        scenario = find_scenario(self.scenario)
        offers = [
            Offer(
                data=Path(self.data),
                hardware=hardware,
                rate_rps=rate_rps * hardware.num_gpus,
                part=self.part,
                seed=seed,
                max_requests=self.max_requests,
            )
            for seed in self.seeds
        ]
        workloads = [scenario.offer(offer) for offer in offers]
        counts = sum((workload.num_by_class() for workload in workloads), Counter[str]())
        budget = {name: int((1 - min(self.targets)) * count + 1e-9) for name, count in counts.items()}
        met: Counter[str] = Counter()
        for seed, workload in zip(self.seeds, workloads, strict=True):
            result = self._simulate(workload, hardware, seed, budget)
            if result.stopped or drain_seconds(result.graded) >= MAX_DRAIN_S:
                return dict.fromkeys(self.targets, False)
            for grade in result.graded:
                if grade.outcome == "met":
                    met[grade.slo_class] += 1
                else:
                    budget[grade.slo_class] -= 1
        worst = min(met[name] / count for name, count in counts.items())
        return {target: worst >= target for target in self.targets}

    def _simulate(self, workload: Workload, hardware: Hardware, seed: int, budget: Mapping[str, int]) -> RunResult:
        system = find_system(self.system)
        return run_workload(
            workload,
            system.build(**dict(self.settings)),
            hardware,
            seed=seed,
            options=ReplicaOptions(
                acceptance={"": self.acceptance},
                exact_windows=False,
                known_lengths=self.known_lengths,
                makes_promises=system.makes_promises,
            ),
            max_model_len=find_scenario(self.scenario).max_model_len(hardware),
            max_draft_length=system.max_draft_length,
            miss_budget=budget,
        )


def find_capacity(
    run: Callable[[float], Mapping[float, bool]], targets: Sequence[float], *, guess_rps: float, tolerance: float
) -> dict[float, float]:
    """Return the highest passing rate for each target; 0 where even `LOWEST_RPS` fails."""
    runs: dict[float, Mapping[float, bool]] = {}

    def passes(rate: float, target: float) -> bool:
        if rate not in runs:
            runs[rate] = run(rate)
        return runs[rate][target]

    capacity: dict[float, float] = {}
    rate = guess_rps
    for target in sorted(targets):
        low, high = _bracket(passes, target, rate, runs)
        while low > 0 and high / low > 1 + tolerance:
            middle = float(np.sqrt(low * high))
            low, high = (middle, high) if passes(middle, target) else (low, middle)
        capacity[target] = low
        rate = low if low > 0 else LOWEST_RPS
    return capacity


def _bracket(
    passes: Callable[[float, float], bool], target: float, start: float, runs: Mapping[float, Mapping[float, bool]]
) -> tuple[float, float]:
    """Return (highest passing, lowest failing) rates around a target's capacity, known runs first."""
    failed = [rate for rate, passed in runs.items() if not passed[target]]
    high = min(failed, default=np.inf)
    low = max((rate for rate, passed in runs.items() if passed[target] and rate < high), default=0.0)
    rate = start if not runs else (low or high / STEP)
    while low == 0.0:
        if passes(rate, target):
            low = rate
        else:
            high = min(high, rate)
            rate /= STEP
            if rate < LOWEST_RPS:
                return 0.0, high
    while not np.isfinite(high):
        rate = low * STEP
        if rate > HIGHEST_RPS:
            return low, low
        low, high = (rate, high) if passes(rate, target) else (low, rate)
    return low, high


def solve(task: Task) -> dict[float, float]:
    """Return one task's capacity by target, in requests per second and GPU."""
    return find_capacity(task.run, task.targets, guess_rps=task.guess_rps, tolerance=task.tolerance)


def tune(tasks: Sequence[Task]) -> tuple[Task, float]:
    """Return the task (setting) with the highest capacity at its lowest target, and that capacity.

    Settings race: one that does not pass a little above the best so far is out after one run.
    """
    best, most = tasks[0], 0.0
    for task in tasks:
        target = min(task.targets)
        bar = most * (1 + task.tolerance)
        if most > 0 and not task.run(bar)[target]:
            continue
        one = replace(task, targets=(target,), guess_rps=bar or task.guess_rps)
        capacity = solve(one)[target]
        if capacity > most:
            best, most = task, capacity
    return best, most


def solve_all(
    tasks: Iterable[Task], *, num_processes: int | None = None, progress: Callable[[Task], None] | None = None
) -> list[dict[float, float]]:
    """Solve tasks on several processes; the order of results is that of tasks."""
    tasks = list(tasks)
    count = min(len(tasks), num_processes or os.cpu_count() or 1)
    answers = []
    if count <= 1:
        for task in tasks:
            answers.append(solve(task))
            if progress is not None:
                progress(task)
        return answers
    with ProcessPoolExecutor(count) as pool:
        for task, answer in zip(tasks, pool.map(solve, tasks), strict=True):
            answers.append(answer)
            if progress is not None:
                progress(task)
    return answers


@dataclass(slots=True, kw_only=True)
class Measured:
    """Capacities of one system at its chosen settings: by target, one figure per seed."""

    system: str
    settings: dict[str, Any]
    by_target: dict[float, list[float]] = field(default_factory=dict)

    def mean(self, target: float) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.by_target[target]))


def ratio_interval(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """Return a 95 % bootstrap interval of mean(ours) / mean(theirs) over paired seeds; None with fewer than 3."""
    if len(ours) < 3:
        return None
    draws = np.random.default_rng(seed).integers(len(ours), size=(BOOTSTRAP_DRAWS, len(ours)))
    upper = np.array(ours)[draws].mean(axis=1)
    lower = np.array(theirs)[draws].mean(axis=1)
    if (lower <= 0).any():
        return None
    low, high = np.percentile(upper / lower, [2.5, 97.5])
    return float(low), float(high)
