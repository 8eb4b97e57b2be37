"""A router that becomes another one while the cluster runs: routers compared on the same replicas, in turn.

Replicas take minutes to start and a machine changes meanwhile, by more than routers differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

from slos_serve.core.routing.routers import make_router
from slos_serve.ray_serve.router import SloRequestRouter

RAYS_OWN = "ray"
STAND_IN = "round-robin"  # keeps the fleet's books, without hops, while Ray's own router decides


class SwitchedRouter(SloRequestRouter):
    """The router whose name stands in the file `switch`: one of ours, or `ray`."""

    def initialize_state(self, switch: str = "", **options: Any) -> None:
        """Begin with what the file says."""
        super().initialize_state(policy=STAND_IN, **options)
        self._switch = Path(switch)
        self._name = ""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Choose as the router of the moment does."""
        name = self._switch.read_text(encoding="utf-8")
        if name != self._name:
            self._name = name
            policy = STAND_IN if name == RAYS_OWN else name
            self.fleet.use(make_router(policy, rng=np.random.default_rng(0)))
        if name == RAYS_OWN:
            chosen: list[list[Any]] = await PowerOfTwoChoicesRequestRouter.choose_replicas(
                self, candidate_replicas, pending_request
            )
            return chosen
        return await super().choose_replicas(candidate_replicas, pending_request)
