"""Simulate a scheduler on a trace, and find the highest rate at which it keeps its SLOs, from Python.

`import slos_serve` offers what is here beside the nouns of `core`. A scheduler is any object with
`plan(state) -> Plan`; see `slos_serve.PlannerTraits` for what else it may say. The commands run the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.config import SloConfig, load_slo_config
from slos_serve.sim.capacity.runs import outcome_of, work_rate
from slos_serve.sim.capacity.search import Answer, SearchEffort, index_of, interval, measure, rate_at
from slos_serve.sim.hardware import Hardware, load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.systems import System, find_system, system_of, system_with
from slos_serve.sim.workloads.workload import RequestFactory, trace_workload
from slos_serve.traces.trace import Trace, read_trace

if TYPE_CHECKING:
    from slos_serve.core.types import Planner
    from slos_serve.sim.run import RunResult
    from slos_serve.sim.workloads.workload import Workload

DEFAULT_HARDWARE = "a100-80g-7b-measured"


def as_system(system: str | Planner | type[Planner] | System) -> System:
    """Return what is run: a system by name, a planner's class (`"package.module:Class"` too), or one planner."""
    if isinstance(system, System):
        return system
    if isinstance(system, str):
        return find_system(system)
    if isinstance(system, type):
        return system_of(system, name=system.__name__)
    return system_with(system)


def as_trace(trace: Trace | str | Path) -> Trace:
    """Return a trace, read where it is a file's name (`FILE@start:duration` takes a window, in seconds)."""
    return trace if isinstance(trace, Trace) else read_trace(trace)


def as_hardware(hardware: Hardware | str) -> Hardware:
    """Return the hardware of a name or file."""
    return hardware if isinstance(hardware, Hardware) else load_hardware(hardware)


def as_classes(classes: SloConfig | str | Path | None) -> SloConfig:
    """Return latency classes, read where they are a file's name; the shipped ones for None."""
    return classes if isinstance(classes, SloConfig) else load_slo_config(classes)


def workload_of(
    trace: Trace | str | Path,
    hardware: Hardware,
    *,
    classes: SloConfig | str | Path | None = None,
    default_class: str = "chat",
    rate_rps: float | None = None,
    max_requests: int | None = None,
) -> Workload:
    """Return the requests of a trace with their SLOs, at the trace's own times or stretched to `rate_rps`."""
    longest = hardware.limits().max_model_len
    factory = RequestFactory(as_classes(classes), hardware.reference_s, longest)
    return trace_workload(
        as_trace(trace),
        factory,
        max_model_len=longest,
        default_class=default_class,
        rate_rps=rate_rps,
        max_requests=max_requests,
    )


def simulate(
    system: str | Planner | type[Planner] | System,
    trace: Trace | str | Path,
    *,
    hardware: Hardware | str = DEFAULT_HARDWARE,
    classes: SloConfig | str | Path | None = None,
    default_class: str = "chat",
    rate_rps: float | None = None,
    max_requests: int | None = None,
    replicas: int = 1,
    router: str | None = None,
    settings: Mapping[str, Any] | None = None,
    acceptance: float = 0.7,
    known_lengths: bool = False,
    async_lag: bool | None = None,
    seed: int = 0,
) -> RunResult:
    """Serve a trace on a virtual clock and grade every request.

    `system`: a name, a planner, its class, or `"package.module:Class"`. `default_class` is the class of rows that name
    none. `rate_rps`: requests per second in all, by stretching time (default: the trace's own). `router`: a name or
    `"package.module:Class"`. `settings` of the system replace its defaults. `acceptance`: the chance that a draft token
    is right. `async_lag`: steps are planned one ahead, as under asynchronous scheduling (None: where the hardware's
    engine does so, on GPUs). `seed` is behind all chance: the same arguments give the same result.
    """
    machine = as_hardware(hardware)
    workload = workload_of(
        trace,
        machine,
        classes=classes,
        default_class=default_class,
        rate_rps=rate_rps,
        max_requests=max_requests,
    )
    return as_system(system).serve(
        workload,
        machine,
        settings=settings,
        num_replicas=replicas,
        router=router,
        engine=ReplicaOptions(acceptance={"": acceptance}, known_lengths=known_lengths, async_lag=async_lag),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The highest rate at which every class attains `target`, in requests per second in all.

    `rate_rps` is None where no rate that was run attains it. `low_rps`, `high_rps`: bootstrap interval (95 %) over the
    windows of the trace; both equal the rate where there is one window. `attainment[rate]`: share of requests that met
    their SLO in the class that has least, at each rate that was run.
    """

    rate_rps: float | None
    low_rps: float
    high_rps: float
    target: float
    attainment: Mapping[float, float]

    @classmethod
    def of(cls, answer: Answer, target: float) -> Capacity:
        """Read a search's answer."""
        low, high = interval(answer.curve.draws(target))
        return cls(
            rate_rps=answer.curve.capacity(target),
            low_rps=low,
            high_rps=high,
            target=target,
            attainment={rate_at(index): answer.curve.worst(index) for index in answer.curve.indices},
        )


def windows_of(trace: Trace, count: int) -> list[Trace]:
    """Cut a trace into `count` windows of equally many requests, one after the other."""
    edges = np.linspace(0, len(trace), count + 1).astype(int)
    return [trace.part(first, last) for first, last in pairwise(edges.tolist())]


def capacity(
    system: str | Planner | type[Planner] | System,
    trace: Trace | str | Path,
    *,
    hardware: Hardware | str = DEFAULT_HARDWARE,
    classes: SloConfig | str | Path | None = None,
    default_class: str = "chat",
    max_requests: int | None = None,
    windows: int = 1,
    target: float = 0.9,
    replicas: int = 1,
    router: str | None = None,
    settings: Mapping[str, Any] | None = None,
    acceptance: float = 0.7,
    known_lengths: bool = False,
    async_lag: bool | None = None,
    seed: int = 0,
) -> Capacity:
    """Find the highest rate of a trace at which every class attains `target`; arguments as in `simulate`.

    The rate is varied by stretching time, so every rate has the same requests in the same order. `windows`: the trace
    is cut into so many, and served window by window; the interval is over them. `max_requests`: of each window.
    """
    found, machine = as_system(system), as_hardware(hardware)
    parts = windows_of(as_trace(trace), windows)

    def offered(part: Trace, rate_rps: float | None) -> Workload:
        return workload_of(
            part,
            machine,
            classes=classes,
            default_class=default_class,
            rate_rps=rate_rps,
            max_requests=max_requests,
        )

    first_guess = index_of(replicas * machine.num_gpus * work_rate(offered(parts[0], None), machine))
    search = measure("{}", first_guess, SearchEffort(num_windows=windows, coarse_windows=1, targets=(target,)))
    points = next(search)
    while True:
        outcomes = {
            point: outcome_of(
                found.serve(
                    offered(parts[point.window], rate_at(point.rate_index)),
                    machine,
                    settings=settings,
                    num_replicas=replicas,
                    router=router,
                    engine=ReplicaOptions(
                        acceptance={"": acceptance}, known_lengths=known_lengths, async_lag=async_lag
                    ),
                    seed=seed + point.window,
                )
            )
            for point in points
        }
        try:
            points = search.send(outcomes)
        except StopIteration as stop:
            return Capacity.of(stop.value, target)
