"""Ray Serve's request router over the policies of `core.routing.routers`.

Ray calls `choose_replicas` for every request on its router's own event loop; groups of one keep it from
choosing again by queue length. What replicas publish comes with every update of the replica set.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slos_serve.named import is_own, make_router
from slos_serve.ray_serve.decisions import recorded
from slos_serve.ray_serve.fleet import Fleet, fleet_of
from slos_serve.ray_serve.hops import Hop
from slos_serve.ray_serve.names import LocalityMixin, MultiplexMixin, RequestRouter

POLICY = "slo"
TRANSIT_S = 0.05  # from here to an engine's queue: what was sent so shortly before a snapshot may not be in it


class SloRequestRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Rank replicas by plan. Options (`request_router_kwargs`): `policy`, and what that takes; `record`: a file."""

    fleet: Fleet
    # Ray passes over a replica that does not tell its queue's length in time; a busy machine takes its time.
    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 2.0

    def initialize_state(self, policy: str = POLICY, record: str | None = None, **options: Any) -> None:
        """Make the policy; `ValueError` for an unknown one. Several routers must not all draw alike."""
        name = self._deployment_id
        self.fleet = fleet_of(name.app_name, name.name)
        options = options if is_own(policy) else {"transit_s": TRANSIT_S, **options}
        router = make_router(policy, rng=np.random.default_rng(), **options)
        self.fleet.use(recorded(router, record, policy=policy, options=options) if record else router)

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take the running replicas and what they published."""
        super().update_replicas(replicas)
        self.fleet.update({one.replica_id.unique_id: one.routing_stats for one in replicas})

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Return the replicas for a request, best first, in groups of one."""
        hop = pending_request.kwargs.get("hop") if pending_request is not None else None
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            wanted = self.apply_multiplex_routing(pending_request=pending_request)
            candidate_replicas = [one for one in candidate_replicas if one.replica_id in wanted]
        elif pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if not isinstance(hop, Hop):  # tokenize, embeddings, a call that is not ours
            return [sorted(candidate_replicas, key=self._queue_length)]
        by_id = {one.replica_id.unique_id: one for one in candidate_replicas}
        return [[by_id[name]] for name in self.fleet.choose(hop, list(by_id))]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note where a request really went: Ray may have skipped a full replica."""
        super().on_request_routed(pending_request, replica_id, result)
        hop = pending_request.kwargs.get("hop")
        if isinstance(hop, Hop):
            self.fleet.routed(hop, replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Ask others first until Ray has taken the replica off the list."""
        super().on_replica_actor_died(replica_id)
        self.fleet.lost(replica_id.unique_id)

    def _queue_length(self, replica: Any) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
