"""One run: a workload on one replica until every request has its outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.summary import GradedRequest, summarize
from slos_serve.sim.invariants import check_conservation, check_table
from slos_serve.sim.kernel import Kernel, Priority
from slos_serve.sim.replica import Replica, ReplicaOptions

if TYPE_CHECKING:
    from slos_serve.core.perf import PerfModel
    from slos_serve.core.types import Planner
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.records import SimRequest
    from slos_serve.sim.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left behind. `stopped`: it was cut short because its miss budget was spent."""

    graded: list[GradedRequest]
    replica: Replica
    workload: Workload
    simulated_s: float
    stopped: bool

    def entry(self, *, system: str, wall_s: float, rate_rps: float | None = None) -> dict[str, Any]:
        """Return the document of `simulate --json`; `wall_s` and `plan_s` are the caller's wall time."""
        replica = self.replica
        document = summarize(
            self.graded,
            system=system,
            scenario=self.workload.name,
            duration_s=self.workload.duration_s,
            rate_rps=self.workload.rate_rps if rate_rps is None else rate_rps,
        )
        plan_s = np.array(replica.plan_s or [0.0])
        used_blocks = replica.engine.pool.num_blocks - replica.engine.pool.lowest_free
        return {
            **document,
            "num_steps": replica.num_steps,
            "simulated_s": self.simulated_s,
            "wall_s": wall_s,
            "plan_s": {
                "p50": float(np.percentile(plan_s, 50)),
                "p99": float(np.percentile(plan_s, 99)),
                "max": float(plan_s.max()),
            },
            "kv_peak_tokens": used_blocks * replica.engine.pool.block_size,
            "num_preemptions": replica.engine.num_preemptions,
            "num_cut_plans": replica.engine.num_cut_plans,
            "num_dropped": self.workload.num_dropped,
        }


def run_workload(
    workload: Workload,
    planner: Planner,
    hardware: Hardware,
    *,
    seed: int = 0,
    options: ReplicaOptions | None = None,
    max_model_len: int | None = None,
    max_draft_length: int = 0,
    plan_model: PerfModel | None = None,
    plan_clock: Callable[[], float] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    miss_budget: Mapping[str, int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Serve a workload to its end and check that every request has exactly one outcome.

    `miss_budget`: stop as soon as a class has more requests not met than this (its attainment is then
    known to be too low); what is unfinished or was never issued counts as missed. `on_progress` gets the
    number of requests that have ended, after each.
    """
    kernel = Kernel()
    graded: list[GradedRequest] = []
    misses: Counter[str] = Counter()

    def on_end(sim: SimRequest, grade: GradedRequest) -> None:
        graded.append(grade)
        if on_progress is not None:
            on_progress(len(graded))
        if grade.outcome not in ("met", "none", "cancelled"):
            misses[grade.slo_class] += 1
            if miss_budget is not None and misses[grade.slo_class] > miss_budget.get(grade.slo_class, len(graded)):
                kernel.stop()
        following = workload.after(sim, kernel.now_s)
        if following is not None:
            arrive(following)

    def arrive(sim: SimRequest) -> None:
        kernel.schedule(sim.request.arrival_s, Priority.ARRIVAL, lambda: replica.submit(sim))

    replica = Replica(
        kernel,
        planner,
        limits=hardware.limits(max_model_len=max_model_len, max_draft_length=max_draft_length),
        true_model=hardware.perf_model,
        lengths=workload.length_model(),
        rng=np.random.default_rng(seed),
        on_end=on_end,
        options=options,
        plan_model=plan_model,
        plan_clock=plan_clock,
        on_step=on_step,
    )
    for sim in workload.arrivals:
        arrive(sim)
    kernel.run()
    check_table(replica.table, replica.engine.pool, replica.limits, kernel.now_s)
    stopped = len(graded) < workload.num_requests
    if stopped:
        _grade_the_rest(workload, replica, graded)
    check_conservation(workload.num_requests, Counter(grade.outcome for grade in graded))
    return RunResult(graded=graded, replica=replica, workload=workload, simulated_s=kernel.now_s, stopped=stopped)


def _grade_the_rest(workload: Workload, replica: Replica, graded: list[GradedRequest]) -> None:
    """Count what a stopped run left unfinished, unborn or never issued as missed."""
    replica.abandon()
    missing = workload.num_by_class()
    missing.subtract(grade.slo_class for grade in graded)
    for slo_class, count in sorted(missing.items()):
        graded.extend(GradedRequest(slo_class=slo_class, outcome="missed") for _ in range(count))
