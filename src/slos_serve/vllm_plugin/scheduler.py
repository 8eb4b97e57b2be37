"""The scheduler classes to give to vLLM: `--scheduler-cls slos_serve.vllm_plugin.scheduler.AutoSloScheduler`.

`SloScheduler` is for synchronous scheduling (CPUs, or `--no-async-scheduling`), `AsyncSloScheduler` for
asynchronous scheduling, vLLM's default on GPUs; `AutoSloScheduler` is whichever fits, by vLLM's own configuration.
Both run vLLM's own `schedule()`; the planner's decisions reach it through one method that vLLM asks for the size of
every share (see `steer`).

What plans is imported with the first scheduler, which vLLM makes after its worker. Numba before the worker ends an
engine on CPUs from vLLM 0.31 on; and a vLLM that lacks what we import serves on in its own order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from slos_serve.vllm_plugin.runtime import SloRuntime

logger = logging.getLogger("vllm.slos_serve")

HOOK = "_reserve_prefill_lookahead"  # vLLM asks it for the size of every share; `engine.view` checks that it does


def make_runtime(scheduler: Any) -> SloRuntime | None:
    """Return the plug-in's state for a scheduler; None, said in one line, on a vLLM that lacks what it imports."""
    try:
        from slos_serve.vllm_plugin.runtime import SloRuntime  # noqa: PLC0415
    except ImportError as error:
        logger.warning("SLO scheduler is off and vLLM's own order runs: this vLLM is unknown (%s)", error)
        return None
    return SloRuntime(scheduler, is_async=isinstance(scheduler, AsyncScheduler))


def capping(caps: Mapping[str, int]) -> Callable[[Request, int, int], int]:
    """Return what takes the hook's place: a request's share is at most what the plan gives it; 0 holds it.

    vLLM calls it for every request of every batch, so it is short: what its own version does beyond
    `max(0, ...)` is for multi-module MTP, which is never steered (see `view.unsupported`).
    """
    cap_of = caps.get

    def share(request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:  # noqa: ARG001 - as vLLM's
        cap = cap_of(request.request_id, 0)
        if num_new_tokens > cap:
            return cap
        return num_new_tokens if num_new_tokens > 0 else 0  # noqa: FURB136 - max() costs a call

    return share


class SloMixin:
    """Steer one of vLLM's schedulers; put it before that class in the bases.

    An instance whose constructor has not run (some tests make such) has no `slo` and is vLLM's own.
    """

    slo: SloRuntime | None = None
    is_stand_in = False  # in the place of the class that was given, which this engine cannot run

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slo = make_runtime(self)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Run vLLM's `schedule()`, steered where there is a plan to carry out."""
        slo = self.slo
        if slo is None:
            return super().schedule(throttle_prefills)  # type: ignore[misc, no-any-return]
        caps = slo.before_schedule()
        if caps is None:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
        else:
            vars(self)[HOOK] = capping(caps)  # for this call alone: what is not steered costs nothing
            try:
                output = super().schedule(throttle_prefills)  # type: ignore[misc]
            finally:
                del vars(self)[HOOK]
                slo.end_steering(throttled=throttle_prefills)
        slo.after_schedule(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> dict[int, Any]:
        """Let vLLM take the output, then grade it and learn from the step."""
        if self.slo is not None:
            self.slo.before_update(scheduler_output)
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if self.slo is not None:
            self.slo.after_update(outputs)
        return outputs

    def add_request(self, request: Request) -> None:
        """Queue a request and take up its promises."""
        super().add_request(request)  # type: ignore[misc]
        if self.slo is not None:
            self.slo.on_add(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.slo is not None:
            self.slo.on_free(request)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def set_pause_state(self, pause_state: Any) -> None:
        """Pause or resume; the time of a pause counts against no promise."""
        super().set_pause_state(pause_state)  # type: ignore[misc]
        if self.slo is not None:
            self.slo.on_pause()

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Empty the prefix cache; what plans expected of it is looked up again."""
        result = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        if self.slo is not None:
            self.slo.on_cache_reset()
        return result

    def shutdown(self) -> None:
        """Stop the plug-in, then vLLM's scheduler."""
        if self.slo is not None:
            self.slo.shutdown()
        super().shutdown()  # type: ignore[misc]


class SloScheduler(SloMixin, Scheduler):
    """The SLO scheduler for synchronous scheduling.

    An asynchronous engine would run half of its steps empty with it: there the other class takes its place, and
    only observes, because it is not what was asked for (see `view.mismatch`).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the class that the engine can run."""
        if cls is not SloScheduler or not _is_async(*args, **kwargs):
            return super().__new__(cls)
        return StandIn(*args, **kwargs)


class AsyncSloScheduler(SloMixin, AsyncScheduler):
    """The SLO scheduler for asynchronous scheduling."""


class StandIn(AsyncSloScheduler):
    """In the place of the synchronous class on an asynchronous engine."""

    is_stand_in = True


class AutoSloScheduler:
    """Whichever of the two fits how the engine schedules, by vLLM's own configuration."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return a scheduler of the class that fits."""
        return (AsyncSloScheduler if _is_async(*args, **kwargs) else SloScheduler)(*args, **kwargs)


def _is_async(*args: Any, **kwargs: Any) -> bool:
    config = kwargs.get("vllm_config", args[0] if args else None)
    return config is not None and bool(config.scheduler_config.async_scheduling)
