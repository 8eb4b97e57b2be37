"""Make vLLM's own `schedule()` carry out a plan, and leave its queues as if it had not been asked.

vLLM's `schedule()` walks `running`, then admits from the waiting queues, asking one method for the size of
each share (the hook, see `view.HOOK`). For the length of one call this module
- sorts `running` in plan order, held requests after it (a KV shortage evicts from the end),
- puts a queue of the planned waiting requests, in plan order, in place of vLLM's (see `queues`),
- gives the hook a cap per request: its planned tokens, 0 to hold it,
- switches the policy to first-come-first-served, so that plan order is the only order, and suspends vLLM's own limits
  on prefill (its cadence, its threshold for long prompts), which would cut what the plan gives.
Afterwards queues, order and settings are restored: requests that were admitted are taken out, requests that
vLLM preempted or set aside are put where vLLM would have put them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from slos_serve.vllm_plugin.engine.queues import kind_in

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.core.types import BatchPlan

UNCAPPED = 1 << 40
EXPIRED = "slo:best-effort:rejected"


def expire(scheduler: Any, requests: Sequence[Request], outputs: dict[int, Any]) -> None:
    """End waiting requests as vLLM ends aborted ones, and tell their clients so in this step's `outputs`.

    To be called where a step's output has been taken: nothing of a waiting request is in flight then.
    """
    scheduler.finish_requests([r.request_id for r in requests], RequestStatus.FINISHED_ABORTED)
    for request in requests:
        last = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=EXPIRED,
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(last)


class DraftLookup:
    """Stand in for vLLM's draft-length table: the same length for every batch size.

    Its mere presence keeps vLLM from padding a new request to a full draft, which a cap would break.
    """

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length

    def __getitem__(self, batch_size: int) -> int:
        return self.draft_length


def _adapter(request: Request) -> int:
    """Return the number of the adapter that a request runs with, 0 for none."""
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


class PlanError(ValueError):
    """A plan that cannot be carried out: the planner's fault, found before anything was changed."""


class Steering:
    """One steered call of `schedule()`: construct, `begin`, call it, `finish`.

    `waiting` holds the waiting requests that may run now, by id; `stock` those that follow vLLM's own
    rules, running or waiting. The constructor checks and changes nothing; `begin` cannot fail half-way.
    Raises `PlanError` for a plan that names unknown requests or asks for impossible shares.
    """

    def __init__(
        self,
        scheduler: Any,
        plan: BatchPlan,
        *,
        waiting: Mapping[str, Request],
        stock: Mapping[str, Request],
        next_draft_length: int | None = None,
        stock_tokens: int = UNCAPPED,
    ) -> None:
        self.scheduler = scheduler
        ids, tokens, drafts = plan.request_ids, plan.num_tokens.tolist(), plan.draft_lengths.tolist()
        if not len(ids) == len(tokens) == len(drafts):
            raise PlanError(f"plan of {len(ids)} ids, {len(tokens)} sizes, {len(drafts)} draft lengths")
        if tokens and (min(tokens) < 1 or min(drafts) < 0):
            if min(tokens) < 0 or min(drafts) < 0:
                raise PlanError("plan with a negative share")
            # vLLM stops admitting at a share of 0: what gets nothing is not offered
            some = [i for i, count in enumerate(tokens) if count]
            ids, tokens, drafts = [ids[i] for i in some], [tokens[i] for i in some], [drafts[i] for i in some]
        self.expected: dict[str, int] = dict(zip(ids, tokens, strict=True))
        if len(self.expected) != len(tokens):
            raise PlanError("plan names a request twice")
        if any(drafts):
            self.caps = {i: n + d for i, n, d in zip(ids, tokens, drafts, strict=True)}
        else:
            self.caps = self.expected.copy() if stock else self.expected
        requests = scheduler.requests
        try:
            self.preempted: list[Request] = [requests[i] for i in plan.preempted]
            planned: list[Request] = [requests[i] for i in ids]
        except KeyError as error:
            raise PlanError(f"plan names {error}, which is not live") from None
        out = {r.request_id for r in self.preempted}
        if out and not out.isdisjoint(self.expected):
            raise PlanError("plan preempts a request that it also schedules")
        if any(r.status is not RequestStatus.RUNNING for r in self.preempted):
            raise PlanError("plan preempts a request that does not run")
        self.offered: list[Request] = [r for r in planned if r.request_id in waiting] if waiting else []
        self._is_uniform = not self.offered and max(tokens, default=1) == 1
        if waiting:
            planned = [r for r in planned if r.request_id not in waiting]
        if any(r.status is not RequestStatus.RUNNING for r in planned):
            raise PlanError("plan schedules a request that cannot run yet")
        self.sorted = planned
        if len(planned) < len(scheduler.running):
            shares = self.expected
            self.sorted = planned + [
                r for r in scheduler.running if r.request_id not in shares and r.request_id not in out
            ]
        self.next_draft_length = next_draft_length
        self._suspended: list[tuple[Any, str, Any]] = []
        kind = kind_in(scheduler)
        assert kind is not None  # else `view.probe` has said so
        self.queues = kind()
        self.num_surplus = self._leave_out_surplus() if self.offered and scheduler.lora_config is not None else 0
        if stock:
            # one token in each step at least: no plan can stall them
            self.caps.update(dict.fromkeys(stock, max(1, stock_tokens // len(stock))))
            self._join_stock(stock)

    def _join_stock(self, stock: Mapping[str, Request]) -> None:
        """Serve requests with rules of their own: running ones first, waiting ones by arrival.

        Those that vLLM cannot run yet are offered too, so that it looks whether what they wait for has come.
        """
        scheduler = self.scheduler
        ours = [r for r in self.sorted if r.request_id not in stock]
        self.sorted = [r for r in scheduler.running if r.request_id in stock] + ours
        first = min((r.arrival_time for r in self.offered), default=0.0)
        theirs = [r for queue in self.queues.served(scheduler) for r in queue if r.request_id in stock]
        earlier = [r for r in theirs if r.arrival_time <= first]
        self.offered = earlier + self.offered + [r for r in theirs if r.arrival_time > first]

    def _leave_out_surplus(self) -> int:
        """Offer no request whose adapter would be one too many beside all that run, held ones too; return how many.

        vLLM looks at the adapters of what one step schedules alone, for it holds nobody; where held ones come back
        and are too many its engine ends. The plan's order decides, promised requests first.
        """
        loaded = {_adapter(r) for r in self.sorted} | {0}
        fitting = []
        for request in self.offered:
            adapter = _adapter(request)
            if adapter in loaded or len(loaded) <= self.scheduler.lora_config.max_loras:
                loaded.add(adapter)
                fitting.append(request)
            else:
                self.caps.pop(request.request_id, None)
                self.expected.pop(request.request_id, None)
        surplus, self.offered = len(self.offered) - len(fitting), fitting
        return surplus

    def go_on(self) -> None:
        """Turn to the steps after the one that was carried out as planned: one token for each request of it."""
        if self._is_uniform:
            return
        self._is_uniform = True
        self.expected = dict.fromkeys(self.expected, 1)
        self.caps = self.expected
        self.sorted = [self.scheduler.requests[request_id] for request_id in self.expected]
        self.offered = []

    def leave_out(self, request_ids: Iterable[str]) -> None:
        """Plan no longer for requests that have ended, before the same steering begins again."""
        for request_id in request_ids:
            if self.expected.pop(request_id, None) is not None and self.caps is not self.expected:
                del self.caps[request_id]
        expected = self.expected
        self.sorted = [r for r in self.sorted if r.request_id in expected]

    def begin(self) -> None:
        """Preempt what the plan preempts and put the plan's queues in place."""
        scheduler = self.scheduler
        if self.preempted:
            gone, now = set(self.preempted), time.monotonic()
            scheduler.running = [r for r in scheduler.running if r not in gone]
            for request in self.preempted:
                scheduler._preempt_request(request, now)
        self._was_bound = scheduler.prefill_capacity_bound
        self._running: list[Request] = scheduler.running
        self._num_running = len(self.sorted)
        scheduler.running = self.sorted
        self.queues.swap(scheduler, self.offered)
        self._suspend(scheduler, "policy", SchedulingPolicy.FCFS)
        # The plan says which steps carry prompts, and how much of them.
        self._suspend(scheduler, "local_prefill_interval", 1)
        self._suspend(scheduler.scheduler_config, "long_prefill_token_threshold", 0)
        if scheduler.num_spec_tokens > 0 and scheduler.dynamic_sd_lookup is None:
            length = scheduler.num_spec_tokens if self.next_draft_length is None else self.next_draft_length
            self._suspend(scheduler, "dynamic_sd_lookup", DraftLookup(min(length, scheduler.num_spec_tokens)))

    def _suspend(self, owner: Any, name: str, value: Any) -> None:
        """Set for this step what `finish` puts back; a vLLM that has no such setting gets none."""
        found = getattr(owner, name, value)
        if found != value:
            self._suspended.append((owner, name, found))
            setattr(owner, name, value)

    def finish(self, *, throttled: bool = False) -> None:
        """Restore queues, order and settings around what `schedule()` did.

        `throttled`: the step was to defer prefills, which vLLM does for data-parallel balance.
        """
        scheduler = self.scheduler
        queue, aside = self.queues.restore(scheduler)
        for owner, name, found in self._suspended:
            setattr(owner, name, found)
        running = RequestStatus.RUNNING
        offered = set(self.offered)
        admitted = scheduler.running[self._num_running :]  # vLLM appends whom it admits, and evicts from the end
        evicted = [r for r in queue if r not in offered] if len(queue) else []
        if admitted or evicted:
            stayed = [r for r in self._running if r.status is running]
            scheduler.running = stayed + admitted
        else:
            scheduler.running = self._running
        if admitted or aside:
            self.queues.take_out(scheduler, admitted, aside)
        for request in reversed(evicted):
            scheduler.waiting.prepend_request(request)
        if not throttled or self._was_bound:  # else vLLM has left its mark alone
            scheduler.prefill_capacity_bound = self.queues.is_bound(scheduler)

    def divergences(self, found: Mapping[str, int]) -> Iterator[str]:
        """Say of each request whose share was not the planned one how: missing, short, long, or extra."""
        if found == self.expected:
            return
        for request_id, tokens in self.expected.items():
            scheduled = found.get(request_id, 0)
            if not tokens <= scheduled <= self.caps[request_id]:
                yield "missing" if not scheduled else "short" if scheduled < tokens else "long"
        for _ in found.keys() - self.caps.keys():
            yield "extra"
