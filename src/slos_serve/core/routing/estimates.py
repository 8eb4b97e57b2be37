"""All replicas at a glance: a guess of feasibility and a price for each, by one closed form over arrays.

`ReplicaEstimates` keeps one column of figures for each replica, made anew only where its snapshot, or what was sent
there since, has changed. The closed form over them (prefill backlog due before the request, the rate that the decodes
leave, KV blocks) narrows many replicas down to the few that are worth the planner's own test (`virtual_copy`).

The price is what the promise takes of each resource until `RENT_S` from now (seconds of an idle engine; share
of the KV room, times seconds), each times `PRICE_BASE` to the power of how full that resource would be: the
exponential weights of online routing (Aspnes et al., "On-line routing of virtual circuits with applications to load
balancing and machine scheduling", J. ACM 44(3), 1997), under which no resource is filled while another one is free.
Prices within `NEAR` of the cheapest are alike, as learnt models of equal engines differ by as much: there the replica
with the fewest requests wins, or promises that ask for little would all go to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from slos_serve.core.perf import FloatArray
from slos_serve.core.routing.router_base import Arrival, Known
from slos_serve.core.routing.virtual_copy import LEAST_SHARE, Flow, VirtualCopy

BoolArray = npt.NDArray[np.bool_]
PRICE_BASE = 64.0  # how much dearer a full resource is than an empty one
RENT_S = 1.0
FULLEST = 1.5  # beyond it a resource grows no dearer
NEAR = 1.25
UNHURRIED_S = 10.0  # to reckon with where there is no deadline
Value = TypeVar("Value", float, FloatArray)


class Figures(NamedTuple, Generic[Value]):
    """What the closed form knows of a replica; of many, arrays. `time_s` is -inf where there is no snapshot."""

    since_s: Value  # known since then
    time_s: Value  # of the snapshot
    step_ends_s: Value  # the step that it tells of
    step_s: Value  # a step of the decodes alone
    max_step_s: Value
    peak: Value  # prefill tokens per second of an idle engine
    rate: Value  # and with its decodes kept
    busy_rate: Value  # at which its backlog is reckoned to shrink
    clear_s: Value  # when that backlog would be computed
    listed: Value  # its tokens
    load: Value  # decode tokens per second that it will add
    free_blocks: Value
    num_blocks: Value
    block_size: Value
    guard_s: Value
    num_requests: Value
    num_parked: Value  # of those: best effort
    parked_tokens: Value


NUM_FIGURES = len(Figures._fields)
UNKNOWN = Figures(*[0.0] * NUM_FIGURES)._replace(time_s=-math.inf, peak=1.0, num_blocks=1.0, block_size=1.0)


class Estimates(NamedTuple):
    """The closed form's view of a request, arrays over `names`."""

    names: list[str]
    known: Figures[FloatArray]
    left_tokens: FloatArray
    wait_s: FloatArray  # until the step under way ends
    done: FloatArray  # prefill tokens of the backlog computed by then
    num_requests: FloatArray
    fits: BoolArray
    price: FloatArray
    slack_s: FloatArray
    rate: FloatArray

    def cheapest(self, good: BoolArray) -> list[int]:
        """Return indices, the good ones first and each part by price; of like prices the least loaded first."""
        order = np.lexsort((self.price, ~good))
        near = good & (self.price <= NEAR * self.price[order[0]])
        if np.count_nonzero(near) > 1:
            order = np.lexsort((self.price, np.where(near, self.num_requests, math.inf), ~good))
        return list(order.tolist())

    def parked(self, most: int) -> list[int]:
        """Return indices by how soon best-effort work would be done; those with `most` requests of it last."""
        known = self.known
        order = np.lexsort((known.parked_tokens / np.maximum(self.rate, 1.0), known.num_parked >= most))
        return list(order.tolist())


class ReplicaEstimates:
    """See the module's text."""

    def __init__(self) -> None:
        self._column: dict[str, int] = {}
        self._flow: list[Flow | None] = []
        self._figures: FloatArray = np.zeros((NUM_FIGURES, 0))
        self._free: list[int] = []

    def put(self, name: str, known: Known, copy: VirtualCopy | None) -> None:
        """Take what has become of a replica; `copy` is None where there is no snapshot to plan with."""
        column = self._column.get(name, self._free.pop() if self._free and name not in self._column else None)
        if column is None:
            column = len(self._flow)
            self._flow.append(None)
            self._figures = np.concatenate([self._figures, np.zeros((NUM_FIGURES, 1))], axis=1)
        self._column[name] = column
        if copy is None:
            self._flow[column] = None
            self._figures[:, column] = UNKNOWN._replace(since_s=known.since_s)
            return
        flow = self._flow[column] = copy.flow([one for one in known.recent.values() if one[1].is_owed])
        self._figures[:, column] = figures(known, copy, flow)

    def drop(self, name: str) -> None:
        """Forget a replica."""
        if name in self._column:
            self._free.append(self._column.pop(name))

    def known(self, names: Sequence[str]) -> Figures[FloatArray]:
        """Return the figures of replicas that were put in, as arrays over `names`."""
        return Figures(*self._figures[:, [self._column[name] for name in names]])

    def flow(self, name: str) -> Flow:
        """Return what was sent to a replica since its snapshot."""
        flow = self._flow[self._column[name]]
        assert flow is not None
        return flow

    def estimate(
        self,
        arrival: Arrival,
        names: list[str],
        known: Figures[FloatArray],
        *,
        cached: FloatArray,
        newness: FloatArray,
        now_s: float,
    ) -> Estimates:
        """Return the closed form for a request.

        `known` is of `names`, all with a snapshot. `cached`: tokens of the prompt that each has; `newness`: the
        share of the others' mean load that each is taken to have beside its own.
        """
        left_tokens = arrival.num_prompt_tokens - cached
        deadline_s = arrival.deadline_s - known.guard_s
        blocks = np.ceil((arrival.num_prompt_tokens + 1) / known.block_size)
        output, pace_s = max(1.0, arrival.predicted_output_tokens), arrival.pace_s
        wait_s, done = progress(known, now_s)
        flows = [self.flow(name) for name in names]
        due = [one.due_by(at_s) for one, at_s in zip(flows, deadline_s.tolist(), strict=True)]
        work = np.maximum(0.0, np.array(due) - done) + newness * known.listed.mean() + left_tokens
        rate = np.maximum(known.rate - known.load, LEAST_SHARE * known.peak)
        left_s: FloatArray | float = UNHURRIED_S
        if math.isfinite(arrival.deadline_s):
            left_s = np.maximum(deadline_s - now_s, 1e-3)
        slack_s = left_s - wait_s - work / rate
        free = known.free_blocks - blocks
        decodes = min(output, RENT_S / pace_s)
        compute = 1.0 - rate / known.peak + wait_s / left_s + work / (known.peak * left_s)
        memory = 1.0 - free / known.num_blocks
        room = (blocks + decodes / known.block_size) / known.num_blocks
        price = (left_tokens + decodes) / known.peak * PRICE_BASE ** np.minimum(compute, FULLEST)
        price += room * RENT_S * PRICE_BASE ** np.minimum(memory, FULLEST)
        fits = (slack_s >= 0.0) & (free >= 0.0) & (known.rate - known.load >= 1.0 / pace_s)
        num_requests = known.num_requests + newness * known.num_requests.mean()
        return Estimates(names, known, left_tokens, wait_s, done, num_requests, fits, price, slack_s, rate)


def progress(known: Figures[FloatArray], now_s: float) -> tuple[FloatArray, FloatArray]:
    """Return how long a newcomer waits for the step under way, and the prefill tokens done by its end.

    A fluid estimate: since the snapshot prefills went on at the rate that decodes leave. A step is not
    interrupted. After the one that the snapshot tells of, it is taken to have just begun, as long as a
    step may be while there are prompts to compute; one without is short.
    """
    left = np.maximum(0.0, known.clear_s - now_s) * known.busy_rate
    fresh = np.where(left > 0.0, np.minimum(known.max_step_s, known.step_s + left / known.peak), known.step_s)
    wait_s = np.where(known.step_ends_s >= now_s, known.step_ends_s - now_s, fresh)
    return wait_s, np.maximum(0.0, known.listed - left) + known.busy_rate * wait_s


def figures(known: Known, copy: VirtualCopy, flow: Flow) -> Figures[float]:
    """Return the figures of one replica."""
    snapshot = copy.snapshot
    parked = [row for _, row in known.recent.values() if not row.is_owed]
    return Figures(
        since_s=known.since_s,
        time_s=snapshot.time_s if snapshot.mode == "enforce" else -math.inf,
        step_ends_s=snapshot.time_s + snapshot.step_s,
        step_s=copy.step_s,
        max_step_s=copy.machine.max_batch_s,
        peak=copy.peak,
        rate=copy.rate,
        busy_rate=flow.rate,
        clear_s=flow.clear_s,
        listed=flow.listed,
        load=flow.load,
        free_blocks=snapshot.free_kv_blocks - flow.blocks,
        num_blocks=float(snapshot.limits.num_kv_blocks),
        block_size=float(snapshot.limits.block_size),
        guard_s=snapshot.limits.guard_s,
        num_requests=snapshot.num_running + snapshot.num_waiting + len(known.recent),
        num_parked=snapshot.num_best_effort + len(parked),
        parked_tokens=snapshot.best_effort_tokens + sum(row.left_tokens + row.output_tokens for row in parked),
    )
