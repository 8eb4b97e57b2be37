"""Where one vLLM keeps the requests that wait, and how to put a plan's queue in their place for one step.

Up to 0.30 vLLM moves what it sets aside into a queue of its own; from 0.31 on it leaves it where it waits
and marks it, and keeps those that hold KV blocks in a queue that is always served first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue

if TYPE_CHECKING:
    from vllm.v1.core.sched.request_queue import RequestQueue
    from vllm.v1.request import Request


class SetAside:
    """vLLM 0.29 and 0.30: `skipped_waiting` before `waiting`."""

    QUEUES = frozenset({"waiting", "skipped_waiting"})
    METHODS: Mapping[str, list[str]] = {
        "_try_promote_blocked_waiting_request": ["request"],
        "_select_waiting_queue_for_scheduling": [],
    }
    ATTRIBUTES: tuple[str, ...] = ()

    @staticmethod
    def promote(scheduler: Any, request: Request) -> bool:
        return bool(scheduler._try_promote_blocked_waiting_request(request))

    @staticmethod
    def served(scheduler: Any) -> tuple[Iterable[Request], Iterable[Request]]:
        return scheduler.skipped_waiting, scheduler.waiting

    @staticmethod
    def is_bound(scheduler: Any) -> bool:
        return bool(scheduler.waiting)

    def swap(self, scheduler: Any, offered: Sequence[Request]) -> None:
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
        skipped_before = set(scheduler.skipped_waiting) if scheduler.skipped_waiting else set()
        from_skipped = [r for r in admitted if r in skipped_before]
        newly_aside = [r for r in aside if r not in skipped_before]
        from_waiting = {r for r in admitted if r not in skipped_before}.union(newly_aside)
        if from_skipped:
            scheduler.skipped_waiting.remove_requests(set(from_skipped))
        if from_waiting:
            scheduler.waiting.remove_requests(from_waiting)
        for request in reversed(newly_aside):
            scheduler.skipped_waiting.prepend_request(request)


class InPlace:
    """vLLM 0.31 to 0.33: `kv_holding_waiting` before `waiting`; `deferred_waiting` marks what was set aside.

    Without a KV connector only streamed sessions hold blocks while they wait.
    """

    QUEUES = frozenset({"waiting", "kv_holding_waiting"})
    METHODS: Mapping[str, list[str]] = {"_handle_blocked_waiting_request": ["request"], "_holds_kv_blocks": ["request"]}
    ATTRIBUTES: tuple[str, ...] = ("deferred_waiting", "max_num_active_reqs")

    @staticmethod
    def promote(scheduler: Any, request: Request) -> bool:
        return bool(scheduler._handle_blocked_waiting_request(request))

    @staticmethod
    def served(scheduler: Any) -> tuple[Iterable[Request], Iterable[Request]]:
        return scheduler.kv_holding_waiting, scheduler.waiting

    @staticmethod
    def is_bound(scheduler: Any) -> bool:
        return len(scheduler.waiting) + len(scheduler.kv_holding_waiting) > len(scheduler.deferred_waiting)

    def swap(self, scheduler: Any, offered: Sequence[Request]) -> None:
        self._waiting, self._holding = scheduler.waiting, scheduler.kv_holding_waiting
        holding = set(self._holding) if self._holding else set()
        if holding:  # vLLM serves these first, whatever the plan's order
            wanted = set(offered)
            scheduler.kv_holding_waiting = FCFSRequestQueue(r for r in self._holding if r in wanted)
            offered = [r for r in offered if r not in holding]
        scheduler.waiting = FCFSRequestQueue(offered)

    def restore(self, scheduler: Any) -> tuple[RequestQueue, list[Request]]:
        left = scheduler.waiting
        scheduler.waiting, scheduler.kv_holding_waiting = self._waiting, self._holding
        return left, []

    @staticmethod
    def take_out(scheduler: Any, admitted: Sequence[Request], aside: Sequence[Request]) -> None:
        if admitted:
            scheduler.waiting.remove_requests(set(admitted))
            if scheduler.kv_holding_waiting:
                scheduler.kv_holding_waiting.remove_requests(set(admitted))


KINDS: tuple[type[SetAside] | type[InPlace], ...] = (SetAside, InPlace)


def kind_of(queues: set[str] | frozenset[str]) -> type[SetAside] | type[InPlace] | None:
    """Return the way of waiting that has these queues, None for one that is not known."""
    return next((kind for kind in KINDS if kind.QUEUES == queues), None)


def kind_in(scheduler: Any) -> type[SetAside] | type[InPlace] | None:
    """Return the way of waiting of a scheduler that was made."""
    return next((kind for kind in KINDS if all(hasattr(scheduler, name) for name in kind.QUEUES)), None)
