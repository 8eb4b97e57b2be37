"""vLLM's own scheduler classes on the virtual clock: what our re-implementations must agree with.

No model runs: outputs are made up by a mock executor, and each step takes the hardware model's time. With
our scheduler class the plug-in itself runs, its clock and its step times moved to the virtual clock, its
planner's work limit fixed, so that a run is deterministic. An asynchronous class schedules one batch ahead, as
vLLM's engine core does with it; the device runs one batch at a time. Needs vLLM; nothing else here imports it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from slos_serve.core.types import DEFAULT_WORK_LIMIT
from slos_serve.sim.replica.kernel import Kernel, Priority
from slos_serve.sim.replica.requests import Record
from slos_serve.vllm_plugin.engine.clock import Clock
from slos_serve.vllm_plugin.pipeline import InFlight, Pipeline
from slos_serve.vllm_plugin.safety.work_limit import WorkLimit
from slos_serve.vllm_plugin.scheduler import SloMixin
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler, write_profile

if TYPE_CHECKING:
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.replica.requests import SimRequest
    from slos_serve.sim.workloads.workload import Workload

EPOCH_S = 1e9  # the virtual clock's zero, as wall-clock time


@dataclass(slots=True)
class Served:
    """Batches (tokens by request) in order, when each request's tokens came out, and the grades, in order of end."""

    batches: list[dict[str, int]] = field(default_factory=list)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    graded: list[GradedRequest] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of the requests that met their SLO."""
        return sum(grade.outcome == "met" for grade in self.graded) / len(self.graded)


class _VirtualPipeline(Pipeline):
    """Batches in flight whose seconds are the virtual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.step_s: dict[int, float] = {}

    def take(self, output: Any, now_s: float) -> tuple[InFlight, float] | None:
        """Return the batch and how long it took on the virtual clock."""
        done = super().take(output, now_s)
        return None if done is None else (done[0], self.step_s[id(output)])


class _FixedWork(WorkLimit):
    """The planner's limit where no wall clock may bear on plans."""

    @property
    def value(self) -> int:
        """The default limit, in units of work."""
        return DEFAULT_WORK_LIMIT

    def affords_new(self, num_requests: int) -> bool:  # noqa: ARG002 - a wall clock's question
        """Look at everybody in every plan."""
        return True

    def adapt(self, share: float, tolerated: float) -> None:
        """Leave plans as they are."""


class VllmReplica:
    """One scheduler of vLLM's (`cls`), or ours, stepped like an engine core. Single-round workloads without drafts."""

    def __init__(
        self, kernel: Kernel, workload: Workload, hardware: Hardware, root: Path, cls: type[Any], **options: Any
    ) -> None:
        limits = hardware.limits()
        self.kernel = kernel
        self.model = hardware.perf_model
        self.served = Served()
        self.is_ours = issubclass(cls, SloMixin)
        if self.is_ours:
            profile = write_profile(root / "profile.json", hardware.perf_model)
            options["slo"] = {
                "mode": "enforce",
                "profile": str(profile),
                "state": False,
                "guard_ms": 0,
                "safety": {"is_enabled": False},
                "fault_dir": str(root),
                **options.get("slo", {}),
            }
        self.scheduler = make_scheduler(
            root,
            cls=cls,
            **{
                "num_blocks": limits.num_kv_blocks + 1,  # vLLM keeps one block for itself
                "max_num_seqs": limits.max_num_seqs,
                "max_num_batched_tokens": limits.max_num_batched_tokens,
                "max_model_len": limits.max_model_len,
                **options,
            },
        )
        self._pipeline = _VirtualPipeline()
        if self.is_ours:
            slo = self.scheduler.slo
            slo.clock = slo.tracker.clock = Clock(lambda: EPOCH_S + kernel.now_s)
            slo.tracker.lengths = workload.length_model()
            slo.pipeline = self._pipeline  # its seconds are the virtual ones
            slo.work_limit = _FixedWork()
            slo.learner.poll()
        self._engine = Engine(self.scheduler)
        self._records: dict[str, Record] = {}
        self._depth = 2 if issubclass(cls, AsyncScheduler) else 1
        self._is_asked = False
        self._queue: deque[tuple[Any, Any]] = deque()  # batches handed over, the first of which runs

    def submit(self, sim: SimRequest) -> None:
        """Take a request that arrives now."""
        request, slo = sim.request, sim.request.slo
        promises = {"ttft_ms": slo.ttft_s, "tpot_ms": slo.tpot_s, "thinking_tpot_ms": slo.thinking_tpot_s}
        args: dict[str, Any] = {f"slo_{name}": 1000 * value for name, value in promises.items() if value is not None}
        if args:
            args["slo_class"] = request.slo_class
        args["hidden_max_tokens"] = request.max_output_tokens
        self.scheduler.add_request(
            make_request(
                request.request_id,
                prompt_tokens=request.num_prompt_tokens,
                max_tokens=sim.num_output_tokens,
                arrival_s=EPOCH_S + request.arrival_s,
                args=args if self.is_ours else None,
            )
        )
        self._records[request.request_id] = Record(sim)
        if not self._queue and not self._is_asked:
            self._ask()

    def _ask(self) -> None:
        self._is_asked = True
        self.kernel.schedule(self.kernel.now_s, Priority.PLAN, self._step)

    def _step(self) -> None:
        self._is_asked = False
        while len(self._queue) < self._depth and self.scheduler.has_requests():
            self._schedule()

    def _schedule(self) -> None:
        requests = self.scheduler.requests
        lengths = {name: request.num_tokens for name, request in requests.items()}
        output = self.scheduler.schedule()
        self._note_promises()
        batch = dict(output.num_scheduled_tokens)
        result = self._engine.execute(output)
        if batch:  # the step after the last request is an empty one
            self.served.batches.append(batch)
        context, pairs = 0.0, 0.0
        for name, tokens in batch.items():
            start = requests[name].num_computed_tokens - tokens  # schedule() has already counted them
            if lengths[name] - start == 1:
                context += start
            else:
                pairs += tokens * (start + 0.5 * tokens)
        seconds = self.model.seconds(sum(batch.values()), len(batch), context_tokens=context, attention_pairs=pairs)
        self._pipeline.step_s[id(output)] = seconds if batch else 1e-3
        self._queue.append((output, result))
        if len(self._queue) == 1:
            self._start()

    def _start(self) -> None:
        at_s = self.kernel.now_s + self._pipeline.step_s[id(self._queue[0][0])]
        self.kernel.schedule(at_s, Priority.STEP_END, self._complete)

    def _note_promises(self) -> None:
        if not self.is_ours:
            return
        for name, live in self.scheduler.slo.tracker.live.items():
            record = self._records[name]
            if live.was_promised and record.promised_s == math.inf:
                record.promised_s = self.kernel.now_s

    def _complete(self) -> None:
        now_s = self.kernel.now_s
        output, result = self._queue.popleft()
        for batch in self.scheduler.update_from_output(output, result).values():
            for one in batch.outputs:
                times = self.served.token_times_s.setdefault(one.request_id, [])
                times += [now_s] * len(one.new_token_ids)
                record = self._records[one.request_id]
                record.feed(now_s, len(times))
                if one.finish_reason is not None:
                    self.served.graded.append(record.finish(now_s, makes_promises=self.is_ours))
                    del self._records[one.request_id]
        del self._pipeline.step_s[id(output)]
        if self._queue:
            self._start()
        self._ask()


def serve(workload: Workload, hardware: Hardware, root: Path, cls: type[Any], **options: Any) -> Served:
    """Serve a workload to its end; `options` are those of `vllm_plugin.testing.make_config`, and `num_blocks`."""
    kernel = Kernel()
    replica = VllmReplica(kernel, workload, hardware, root, cls, **options)
    for sim in workload.arrivals:
        kernel.schedule(sim.request.arrival_s, Priority.ARRIVAL, lambda sim=sim: replica.submit(sim))  # type: ignore[misc]
    kernel.run()
    replica.scheduler.shutdown()
    return replica.served
