"""Many replicas behind one front door: routing, hops, snapshots, hand-over, and what goes wrong.

A request is routed when it arrives. Where the system makes promises and the router allows hops, one that
the replica's plan left without a promise, and that has not started, is looked at again: at the plan that
saw it first, and then every snapshot period. Where the router finds a better place, it is taken back and
sent there, `hop_s` later, with its arrival time and the replicas tried; where it finds none it stays.

Snapshots leave a replica with a plan, at most every `snapshot_period_s`, and reach the router
`snapshot_lag_s` later; idle replicas send one every period too.

With `num_prefill` the first so many replicas only compute prompts: a request moves to one of the others
with its first token, `transfer_s` of its prompt later (the KV cache travels; its blocks are free at once).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slos_serve.core.routing.routers import Arrival, LeastLoad, Router, snapshot_of
from slos_serve.core.types import Tier
from slos_serve.named import check_router, make_router
from slos_serve.sim.cluster.fleet import Door, ReplicaSet
from slos_serve.sim.cluster.silos import Homes, Silos
from slos_serve.sim.replica.invariants import InvariantError
from slos_serve.sim.replica.kernel import Kernel, Priority
from slos_serve.sim.replica.outputs import predicted_length
from slos_serve.sim.replica.requests import Record, SimRequest

if TYPE_CHECKING:
    from slos_serve.core.lengths import LengthModel
    from slos_serve.core.routing.snapshots import ReplicaSnapshot
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.core.types import Plan, ReplicaState
    from slos_serve.sim.cluster.faults import Fault
    from slos_serve.sim.replica.replica import Hooks, Replica, ReplicaOptions

DEFAULT_ROUTER = "round-robin"
MAX_LOOKS = 8  # undecided requests of one replica that are looked at again in one period
MAX_SESSIONS = 256
POOLED = "pooled"  # not a router: one replica as fast as all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """How many replicas, and how requests reach them; see the module's text. Times in seconds.

    `num_replicas` counts those of `num_prefill` too; with those, `router` is not asked: sessions return to their
    prefill replica. `silos`: replicas by class, for partitioned GPUs; they replace `router`. `max_hops` None: what
    the router asks for. `kv_transfer_s_per_token`: KV bytes of a token over the bandwidth between two replicas.
    """

    num_replicas: int = 1
    num_prefill: int = 0
    router: str = DEFAULT_ROUTER
    silos: Mapping[str, int] = field(default_factory=dict)
    snapshot_period_s: float = 0.25
    snapshot_lag_s: float = 0.0
    hop_s: float = 0.005
    max_hops: int | None = None
    detect_s: float = 1.0
    kv_transfer_s_per_token: float = 0.0
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or not 0 <= self.num_prefill < self.num_replicas:
            raise ValueError(
                f"{self.num_prefill} of {self.num_replicas} replicas for prefill: expected some for decode"
            )
        check_router(self.router, where="ClusterOptions", key="router", more=(POOLED,))
        if self.silos and (sum(self.silos.values()) != self.num_replicas or min(self.silos.values()) < 1):
            raise ValueError(
                f"silos = {dict(self.silos)}: expected {self.num_replicas} replicas in all, 1 or more each"
            )
        for name in ("snapshot_lag_s", "hop_s", "detect_s", "kv_transfer_s_per_token"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"ClusterOptions.{name} = {getattr(self, name)!r}: expected 0 or more")
        if not self.snapshot_period_s > 0:
            raise ValueError("ClusterOptions.snapshot_period_s: expected a positive time")
        for fault in self.faults:
            if fault.replica >= self.num_replicas:
                raise ValueError(f"fault of replica {fault.replica}: expected one below {self.num_replicas}")

    def make_router(self, seed: int) -> Router:
        """Return the router of a run."""
        if self.silos:
            return Silos(self.silos)
        if self.num_prefill:
            return Homes()
        return make_router(self.router, rng=np.random.default_rng([seed, 77]))


class MakeReplica(Protocol):
    """Build a replica by name; `number` tells its chance apart from the others'."""

    def __call__(self, name: str, number: int, hooks: Hooks) -> Replica:
        """Return it."""
        ...


@dataclass(slots=True)
class _Watched:
    """A request that may still hop. `looked_s`: when the router was last asked about it."""

    sim: SimRequest
    tried: tuple[str, ...]
    looked_s: float = -math.inf


class Cluster:
    """Route submitted requests to replicas; read `replicas` and the counters when the kernel has run."""

    def __init__(
        self,
        kernel: Kernel,
        make_replica: MakeReplica,
        hooks: Hooks,
        *,
        router: Router,
        options: ClusterOptions,
        replica_options: ReplicaOptions,
        makes_promises: bool,
        lengths: LengthModel,
        num_requests: int,
        route_clock: Callable[[], float] | None = None,
    ) -> None:
        self.kernel = kernel
        self.options = options
        self.router = router
        self.num_hops = 0
        self.num_moved = 0  # hand-overs after the first token
        self.route_s: list[float] = []
        self._make = make_replica
        self._hooks = hooks
        self._replica_options = replica_options
        self._lengths = lengths
        self._left = num_requests
        self._clock = route_clock
        self._names = [f"r{i}" for i in range(options.num_replicas)]
        self._watched: dict[str, dict[str, _Watched]] = {name: {} for name in self._names}
        self._waiting: list[SimRequest] = []
        self._published_s = dict.fromkeys(self._names, -math.inf)
        self._decode_router = LeastLoad()
        self._makes_promises = makes_promises
        self._has_hops = makes_promises and self._max_hops > 0
        self._hears_steps = hooks.step is not None or (replica_options.async_lag and self._has_hops)
        door = Door(
            make=self._make_replica,
            closed=self._closed,
            failed=lambda record: self._end(record.sim, record.fail()),
            again=lambda sim: self._route(sim, ()),
            reopened=self._let_in,
        )
        self.fleet = ReplicaSet(kernel, self._names, door, faults=options.faults, detect_s=options.detect_s)
        if router.uses_snapshots:
            kernel.schedule(kernel.now_s, Priority.STEP_END, self._tick)

    @property
    def replicas(self) -> list[Replica]:
        """Every replica there has been."""
        return self.fleet.replicas

    @property
    def _max_hops(self) -> int:
        return self.router.hops if self.options.max_hops is None else self.options.max_hops

    # -- the way of a request ------------------------------------------------------------------------

    def submit(self, sim: SimRequest) -> None:
        """Take a request that arrives now."""
        self._route(sim, ())

    def _route(self, sim: SimRequest, tried: tuple[str, ...]) -> None:
        names = self._of_role(prefill=True)
        if not names:
            if self.fleet.is_returning:
                self._waiting.append(sim)
            else:
                self._end(sim, Record(sim).fail())
            return
        arrival = self._arrival(sim, tried, names)
        start = self._clock() if self._clock else 0.0
        route = self.router.choose(arrival, names, self.kernel.now_s)
        if self._clock:
            self.route_s.append(self._clock() - start)
        assert route.replica_id is not None
        self._deliver(sim, route.replica_id, tried)

    def _deliver(self, sim: SimRequest, name: str, tried: tuple[str, ...], record: Record | None = None) -> None:
        if self._has_hops and record is None and len(tried) < self._max_hops:
            self._watched[name][sim.request.request_id] = _Watched(sim, tried)
        self.fleet.submit(name, sim, record)

    def _arrival(self, sim: SimRequest, tried: tuple[str, ...], names: Sequence[str]) -> Arrival:
        cached = {} if sim.session_id else dict.fromkeys(names, sim.num_cached_tokens)
        predicted = float(sim.request.max_output_tokens)
        if self.router.uses_snapshots:  # the others only count requests
            predicted = predicted_length(self._lengths, sim, self._replica_options)
        return Arrival.of(
            sim.request,
            predicted_output_tokens=predicted,
            session_id=sim.session_id,
            cached_tokens=cached,
            tried=tried,
        )

    def _end(self, sim: SimRequest, grade: GradedRequest) -> None:
        self._left -= 1
        self.router.ended(sim.request.request_id)
        self._decode_router.ended(sim.request.request_id)
        if grade.num_output_tokens and self.router.uses_snapshots:
            self._lengths.observe(sim.request.slo_class, sim.request.num_prompt_tokens, sim.num_output_tokens)
        self._hooks.end(sim, grade)
        if self._left == 0:
            self.kernel.stop()

    def _hand_over(self, record: Record) -> None:
        """Move a request whose first token is out to a replica that decodes."""
        sim = record.sim
        self.num_moved += 1
        self.router.ended(sim.request.request_id)
        arrival = self._arrival(sim, (), ())
        names = self._of_role(prefill=False)
        if not names:
            self._end(sim, record.fail())
            return
        name = self._decode_router.choose(arrival, names, self.kernel.now_s).replica_id
        assert name is not None
        at_s = self.kernel.now_s + sim.request.num_prompt_tokens * self.options.kv_transfer_s_per_token
        self.kernel.schedule(at_s, Priority.ARRIVAL, lambda: self._deliver(sim, name, (), record))

    # -- hops and snapshots ----------------------------------------------------------------------------

    def _planned(self, replica: Replica, state: ReplicaState, plan: Plan) -> float:
        """Take note of a plan: publish where it is time, and look at who got no promise; say when to look again."""
        if self._watched[replica.name] and not replica.is_mid_step:
            self._look(replica, set(plan.batch.request_ids))
        if self.router.uses_snapshots:
            now_s = self.kernel.now_s
            if now_s - self._published_s[replica.name] >= self.options.snapshot_period_s:
                self._publish(replica, replace(state, now_s=now_s), plan)
        if self._watched[replica.name]:
            return self.kernel.now_s
        if not self.router.uses_snapshots:
            return math.inf
        return self._published_s[replica.name] + self.options.snapshot_period_s

    def _stepped(self, replica: Replica, record: dict[str, object]) -> None:
        if self._hooks.step is not None:
            self._hooks.step(record)
        if self._replica_options.async_lag and self._watched[replica.name]:
            self._look(replica, set())

    def _look(self, replica: Replica, in_batch: set[str]) -> None:
        """Ask the router again about requests that wait without a promise."""
        watched, table, now_s = self._watched[replica.name], replica.table, self.kernel.now_s
        looks = 0
        for request_id in list(watched):
            one = watched[request_id]
            if request_id not in table:
                del watched[request_id]
                continue
            row = table.rows[table.index(request_id)]
            if row["tier"] == Tier.PROMISED or row["num_computed_tokens"] or row["num_output_tokens"]:
                del watched[request_id]
            elif looks < MAX_LOOKS and now_s - one.looked_s >= self.options.snapshot_period_s:
                looks += 1
                one.looked_s = now_s
                if request_id not in in_batch:
                    self._try_hop(replica, one)

    def _try_hop(self, replica: Replica, one: _Watched) -> None:
        tried = (*one.tried, replica.name)
        names = [name for name in self._of_role(prefill=True) if name not in tried]
        if not names:
            return
        arrival = self._arrival(one.sim, tried, names)
        route = self.router.rank(arrival, names, self.kernel.now_s)
        if route.reason not in {"feasible", "turn"} or route.replica_id is None:
            return
        target = route.replica_id
        self.num_hops += 1
        del self._watched[replica.name][one.sim.request.request_id]
        replica.withdraw(one.sim.request.request_id)
        self.router.place(arrival, target, self.kernel.now_s)
        at_s = self.kernel.now_s + self.options.hop_s
        self.kernel.schedule(at_s, Priority.ARRIVAL, lambda: self._deliver(one.sim, target, tried))

    def _tick(self) -> None:
        """Let idle replicas publish too, while anything is still to come."""
        for replica in self.fleet.live.values():
            if not len(replica.table):
                self._publish(replica, replica.state(self.kernel.now_s))
        if self._left > 0:
            self.kernel.schedule(self.kernel.now_s + self.options.snapshot_period_s, Priority.STEP_END, self._tick)

    def _publish(self, replica: Replica, state: ReplicaState, plan: Plan | None = None) -> None:
        self._published_s[replica.name] = self.kernel.now_s
        snapshot = snapshot_of(
            state,
            replica_id=replica.name,
            headroom_tokens_per_s=plan.headroom_tokens_per_s if plan else 0.0,
            step_s=plan.batch.predicted_s if plan else 0.0,
            planner=replica.planner,
            sessions=replica.engine.pool.sessions(MAX_SESSIONS),
            mode="enforce" if self._makes_promises else "observe",
        )
        if self.options.snapshot_lag_s:
            at_s = self.kernel.now_s + self.options.snapshot_lag_s
            self.kernel.schedule(at_s, Priority.STEP_END, lambda: self._observe(snapshot))
        else:
            self._observe(snapshot)

    def _observe(self, snapshot: ReplicaSnapshot) -> None:
        if snapshot.time_s > self.kernel.now_s:
            raise InvariantError(f"a snapshot of {snapshot.time_s} s is read at {self.kernel.now_s} s")
        if self.fleet.is_open(snapshot.replica_id):
            self.router.observe(snapshot)

    # -- replicas come and go ----------------------------------------------------------------------

    def _of_role(self, *, prefill: bool) -> list[str]:
        """Return the open replicas that take new requests, or those that take over after the first token."""
        count = self.options.num_prefill
        names = self._names if not count else self._names[:count] if prefill else self._names[count:]
        return [name for name in names if self.fleet.is_open(name)]

    def _make_replica(self, name: str, number: int) -> Replica:
        hooks = replace(
            self._hooks,
            end=self._end,
            step=(lambda record: self._stepped(replica, record)) if self._hears_steps else None,
            plan=self._planned if self._has_hops or self.router.uses_snapshots else None,
            first_token=self._hand_over if self._names.index(name) < self.options.num_prefill else None,
        )
        replica = self._make(name, number, hooks)
        self._watched[name].clear()
        self._published_s[name] = -math.inf
        return replica

    def _closed(self, name: str) -> None:
        self.router.forget(name)
        self._decode_router.forget(name)

    def _let_in(self) -> None:
        """Route what waits at the door again."""
        waiting, self._waiting = self._waiting, []
        for sim in waiting:
            self._route(sim, ())

    def live_ids(self) -> list[str]:
        """Return the ids of all requests on live replicas, for checks."""
        return [request_id for replica in self.fleet.live.values() for request_id in replica.table.request_ids]
