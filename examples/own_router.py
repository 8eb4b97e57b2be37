"""A router of your own: long prompts have a replica for themselves, so that short ones never wait behind them.

    python examples/own_router.py
    cd examples && slos-serve simulate --replicas 4 --router own_router:ApartByLength --system vllm --rate 8

On a cluster: `slos-serve serve MODEL --replicas 2 --router own_router:ApartByLength`, where every node can import it.
"""

from collections.abc import Sequence

import slos_serve
from slos_serve import Arrival, LeastLoad, Route

LONG_TOKENS = 1500


class ApartByLength(LeastLoad):
    """Least load, among the last replica alone for long prompts, among the others for short ones."""

    def rank(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank the replicas for a request; those meant for others come last, for when no other is left."""
        route = super().rank(arrival, replica_ids, now_s)
        is_long = arrival.num_prompt_tokens >= LONG_TOKENS
        last = max(replica_ids)
        choices = sorted(route.choices, key=lambda choice: (choice.replica_id == last) != is_long)
        return Route(choices=tuple(choices), reason=route.reason)


if __name__ == "__main__":
    for router in ("own_router:ApartByLength", "least-load"):
        run = slos_serve.simulate(
            "vllm", slos_serve.SMALL_TRACE, rate_rps=14.0, max_requests=200, replicas=3, router=router
        )
        print(f"{router:25} meets the SLOs of {100 * (run.attainment or 0.0):.1f} % of {len(run.graded)} requests")
