"""One run: a workload on one replica or many until every request has its outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.slo.summary import GradedRequest, summarize
from slos_serve.core.types import PlannerTraits
from slos_serve.sim.cluster.cluster import POOLED, Cluster, ClusterOptions
from slos_serve.sim.replica.fast_forward import FastReplica
from slos_serve.sim.replica.invariants import check_apart, check_conservation, check_table
from slos_serve.sim.replica.kernel import Kernel, Priority
from slos_serve.sim.replica.replica import Hooks, Replica, ReplicaOptions

if TYPE_CHECKING:
    from slos_serve.core.perf import PerfModel
    from slos_serve.core.types import Planner
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.replica.requests import SimRequest
    from slos_serve.sim.workloads.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run left behind. `stopped`: it was cut short because its miss budget was spent."""

    graded: list[GradedRequest]
    cluster: Cluster
    workload: Workload
    simulated_s: float
    stopped: bool

    @property
    def replica(self) -> Replica:
        """The first replica."""
        return self.cluster.replicas[0]

    @property
    def attainment(self) -> float | None:
        """Share of the requests with an SLO that met all of it; None where there are none."""
        share: float | None = self.entry()["attainment"]
        return share

    def entry(self, *, system: str = "", wall_s: float = 0.0, rate_rps: float | None = None) -> dict[str, Any]:
        """Return the document of `simulate --json`; `wall_s`, `plan_s` and `route_s` are the caller's wall time.

        Counts are of all replicas; `kv_peak_tokens` is the highest of any.
        """
        cluster, replicas = self.cluster, self.cluster.replicas
        document = summarize(
            self.graded,
            system=system,
            scenario=self.workload.name,
            duration_s=self.workload.duration_s,
            rate_rps=self.workload.rate_rps if rate_rps is None else rate_rps,
        )
        pools = [replica.engine.pool for replica in replicas]
        return {
            **document,
            "num_steps": sum(replica.num_steps for replica in replicas),
            "simulated_s": self.simulated_s,
            "wall_s": wall_s,
            "plan_s": _percentiles([seconds for replica in replicas for seconds in replica.plan_s]),
            "kv_peak_tokens": max((pool.num_blocks - pool.lowest_free) * pool.block_size for pool in pools),
            "num_preemptions": sum(replica.engine.num_preemptions for replica in replicas),
            "num_cut_plans": sum(replica.engine.num_cut_plans for replica in replicas),
            "num_dropped": self.workload.num_dropped,
            "replicas": cluster.options.num_replicas,
            "router": "silos" if cluster.options.silos else cluster.options.router,
            "hops": cluster.num_hops,
            "route_s": _percentiles(cluster.route_s),
        }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = np.array(seconds or [0.0])
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


def pooled(hardware: Hardware, count: int) -> Hardware:
    """Return one replica `count` times as fast as `hardware`, with the memory and seats of all."""
    faster = hardware.slower(1 / count)
    return replace(faster, kv_tokens=hardware.kv_tokens * count, max_num_seqs=hardware.max_num_seqs * count)


def run_workload(
    workload: Workload,
    planner: Planner,
    hardware: Hardware,
    *,
    seed: int = 0,
    options: ReplicaOptions | None = None,
    cluster: ClusterOptions | None = None,
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
    number of requests that have ended, after each. Router `pooled` runs one replica as fast as all.
    """
    kernel = Kernel()
    options, cluster = options or ReplicaOptions(), cluster or ClusterOptions()
    if options.async_lag is None:
        options = replace(options, async_lag=hardware.async_scheduling)
    if cluster.router == POOLED:
        if plan_model is not None:
            plan_model = pooled(replace(hardware, perf_model=plan_model), cluster.num_replicas).perf_model
        hardware, cluster = pooled(hardware, cluster.num_replicas), ClusterOptions()
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
        kernel.schedule(sim.request.arrival_s + sim.transit_s, Priority.ARRIVAL, lambda: front.submit(sim))

    def make_replica(name: str, number: int, hooks: Hooks) -> Replica:
        return FastReplica(
            kernel,
            planner,
            limits=hardware.limits(max_model_len=max_model_len, max_draft_length=max_draft_length),
            true_model=hardware.perf_model,
            lengths=workload.length_model(),
            rng=np.random.default_rng([seed, number] if number else seed),
            hooks=hooks,
            options=options,
            plan_model=plan_model,
            name=name,
        )

    front = Cluster(
        kernel,
        make_replica,
        Hooks(end=on_end, step=on_step, plan_clock=plan_clock),
        router=cluster.make_router(seed),
        options=cluster,
        replica_options=options,
        makes_promises=PlannerTraits.of(planner).makes_promises,
        lengths=workload.length_model(),
        num_requests=workload.num_requests,
        route_clock=plan_clock,
    )
    for sim in workload.arrivals:
        arrive(sim)
    kernel.run()
    stopped = len(graded) < workload.num_requests
    _check(front, kernel.now_s)
    if stopped:
        _grade_the_rest(workload, front, graded)
    check_conservation(workload.num_requests, Counter(grade.outcome for grade in graded))
    return RunResult(graded=graded, cluster=front, workload=workload, simulated_s=kernel.now_s, stopped=stopped)


def _check(cluster: Cluster, now_s: float) -> None:
    for replica in cluster.replicas:
        replica.settle()
        check_table(replica.table, replica.engine.pool, replica.limits, now_s)
    check_apart(cluster.live_ids())


def _grade_the_rest(workload: Workload, cluster: Cluster, graded: list[GradedRequest]) -> None:
    """Count what a stopped run left unfinished, unborn or never issued as missed."""
    for replica in cluster.replicas:
        replica.abandon()
    missing = workload.num_by_class()
    missing.subtract(grade.slo_class for grade in graded)
    for slo_class, count in sorted(missing.items()):
        graded.extend(GradedRequest(slo_class=slo_class, outcome="missed") for _ in range(count))
