"""How one vLLM keeps the requests that wait, and how a plan's queue takes their place for one step.

Up to 0.30 vLLM moves a request that cannot run yet into a queue of its own, `skipped_waiting` (`SetAside`). From 0.31
on such a request stays where it waits and is marked in `deferred_waiting`, and requests that hold KV blocks wait in
`kv_holding_waiting`, which is always served first (`InPlace`). Which of the two a vLLM does is read from the queues
that it has, never from its version. Each class is one step's strategy: `swap`, vLLM's `schedule()`, `restore`,
`take_out`; what does not need a step is static.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request


class SetAside:
    """The way of vLLM 0.29 and 0.30: `skipped_waiting` is served before `waiting`."""

    QUEUES = frozenset({"waiting", "skipped_waiting"})
    METHODS: Mapping[str, list[str]] = {"_try_promote_blocked_waiting_request": ["request"]}
    ATTRIBUTES: tuple[str, ...] = ()

    @staticmethod
    def promote(scheduler: Any, request: Request) -> bool:
        """Let vLLM make a blocked request runnable if what it waited for has come; tell whether it may run."""
        return bool(scheduler._try_promote_blocked_waiting_request(request))

    @staticmethod
    def served(scheduler: Any) -> tuple[RequestQueue, RequestQueue]:
        """Return the two queues in the order in which vLLM serves them."""
        return scheduler.skipped_waiting, scheduler.waiting

    @staticmethod
    def is_bound(scheduler: Any) -> bool:
        """Tell whether requests that could run were left waiting, as vLLM itself defines it."""
        return bool(scheduler.waiting)

    def swap(self, scheduler: Any, offered: Sequence[Request]) -> None:
        """Put a queue of the `offered` requests in the place of both."""
        self._waiting, self._skipped = scheduler.waiting, scheduler.skipped_waiting
        scheduler.waiting = FCFSRequestQueue(offered)
        scheduler.skipped_waiting = FCFSRequestQueue()

    def restore(self, scheduler: Any) -> tuple[RequestQueue, list[Request]]:
        """Put vLLM's queues back; return what is left of the plan's, and what vLLM set aside."""
        left, aside = scheduler.waiting, list(scheduler.skipped_waiting)
        scheduler.waiting, scheduler.skipped_waiting = self._waiting, self._skipped
        return left, aside

    @staticmethod
    def take_out(scheduler: Any, admitted: Sequence[Request], aside: Sequence[Request]) -> None:
        """Remove from vLLM's queues whom it has admitted, and move to `skipped_waiting` whom it has set aside."""
        skipped_before = set(scheduler.skipped_waiting) if scheduler.skipped_waiting else set()
        from_skipped = {r for r in admitted if r in skipped_before}
        newly_aside = [r for r in aside if r not in skipped_before]
        from_waiting = {r for r in admitted if r not in skipped_before}.union(newly_aside)
        if from_skipped:
            scheduler.skipped_waiting.remove_requests(from_skipped)
        if from_waiting:
            scheduler.waiting.remove_requests(from_waiting)
        for request in reversed(newly_aside):
            scheduler.skipped_waiting.prepend_request(request)


class InPlace:
    """The way of vLLM 0.31 to 0.33: `kv_holding_waiting` is served before `waiting`, and marks say who cannot run.

    vLLM makes and takes away the marks itself; a request that is only swapped out keeps its own. Without a KV
    connector no request but a streamed session holds blocks while it waits.
    """

    QUEUES = frozenset({"waiting", "kv_holding_waiting"})
    METHODS: Mapping[str, list[str]] = {"_handle_blocked_waiting_request": ["request"], "_holds_kv_blocks": ["request"]}
    ATTRIBUTES: tuple[str, ...] = ("deferred_waiting", "max_num_active_reqs")

    @staticmethod
    def promote(scheduler: Any, request: Request) -> bool:
        """Let vLLM make a blocked request runnable if what it waited for has come; tell whether it may run."""
        return bool(scheduler._handle_blocked_waiting_request(request))

    @staticmethod
    def served(scheduler: Any) -> tuple[RequestQueue, RequestQueue]:
        """Return the two queues in the order in which vLLM serves them."""
        return scheduler.kv_holding_waiting, scheduler.waiting

    @staticmethod
    def is_bound(scheduler: Any) -> bool:
        """Tell whether requests that could run were left waiting, as vLLM itself defines it."""
        return len(scheduler.waiting) + len(scheduler.kv_holding_waiting) > len(scheduler.deferred_waiting)

    def swap(self, scheduler: Any, offered: Sequence[Request]) -> None:
        """Put a queue of the `offered` requests in the place of `waiting`.

        Those that hold KV blocks stay in a queue of their own, for vLLM looks for them there; it serves these first,
        whatever the plan's order.
        """
        self._waiting, self._holding = scheduler.waiting, scheduler.kv_holding_waiting
        if self._holding:
            holding, wanted = set(self._holding), set(offered)
            scheduler.kv_holding_waiting = FCFSRequestQueue(r for r in self._holding if r in wanted)
            offered = [r for r in offered if r not in holding]
        scheduler.waiting = FCFSRequestQueue(offered)

    def restore(self, scheduler: Any) -> tuple[RequestQueue, list[Request]]:
        """Put vLLM's queues back; return what is left of the plan's, and nothing set aside: all have stayed."""
        left = scheduler.waiting
        scheduler.waiting, scheduler.kv_holding_waiting = self._waiting, self._holding
        return left, []

    @staticmethod
    def take_out(scheduler: Any, admitted: Sequence[Request], _aside: Sequence[Request]) -> None:
        """Remove from vLLM's queues whom it has admitted."""
        scheduler.waiting.remove_requests(set(admitted))
        if scheduler.kv_holding_waiting:
            scheduler.kv_holding_waiting.remove_requests(set(admitted))


Kind = type[SetAside] | type[InPlace]
KINDS: tuple[Kind, ...] = (SetAside, InPlace)


def kind_of(queues: Iterable[str]) -> Kind | None:
    """Return the way of waiting that has just these queues, None where no way is known."""
    return next((kind for kind in KINDS if frozenset(queues) == kind.QUEUES), None)


def kind_in(scheduler: Any) -> Kind | None:
    """Return the way of waiting of a scheduler that was made, None where no way is known."""
    return next((kind for kind in KINDS if all(hasattr(scheduler, name) for name in kind.QUEUES)), None)
