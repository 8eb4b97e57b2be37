"""vLLM's own scheduler on the virtual clock: what our re-implementation must agree with.

No model runs: outputs are made up by a mock executor, and each step takes the hardware model's time.
Needs vLLM; nothing else here imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.sim.kernel import Kernel, Priority
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler

if TYPE_CHECKING:
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.records import SimRequest
    from slos_serve.sim.workload import Workload


@dataclass(slots=True)
class Served:
    """Batches (tokens by request) in order, and when each request's tokens came out, in seconds."""

    batches: list[dict[str, int]] = field(default_factory=list)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)


class VllmReplica:
    """One scheduler of vLLM's (`cls`), stepped like an engine core. Single-round workloads without drafts."""

    def __init__(self, kernel: Kernel, hardware: Hardware, root: Path, cls: type[Any], **options: Any) -> None:
        limits = hardware.limits()
        self.kernel = kernel
        self.model = hardware.perf_model
        self.served = Served()
        self.scheduler = make_scheduler(
            root,
            cls=cls,
            num_blocks=limits.num_kv_blocks + 1,  # vLLM keeps one block for itself
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            **options,
        )
        self._engine = Engine(self.scheduler)
        self._is_busy = False

    def submit(self, sim: SimRequest) -> None:
        """Take a request that arrives now."""
        request = make_request(
            sim.request.request_id,
            prompt_tokens=sim.request.num_prompt_tokens,
            max_tokens=sim.num_output_tokens,
            arrival_s=sim.request.arrival_s,
        )
        self.scheduler.add_request(request)
        if not self._is_busy:
            self._is_busy = True
            self.kernel.schedule(self.kernel.now_s, Priority.PLAN, self._step)

    def _step(self) -> None:
        if not self.scheduler.has_requests():
            self._is_busy = False
            return
        requests = self.scheduler.requests
        lengths = {name: request.num_tokens for name, request in requests.items()}
        output = self.scheduler.schedule()
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
        at_s = self.kernel.now_s + (seconds if batch else 1e-3)
        self.kernel.schedule(at_s, Priority.STEP_END, lambda: self._complete(output, result))

    def _complete(self, output: Any, result: Any) -> None:
        for batch in self.scheduler.update_from_output(output, result).values():
            for one in batch.outputs:
                times = self.served.token_times_s.setdefault(one.request_id, [])
                times += [self.kernel.now_s] * len(one.new_token_ids)
        self.kernel.schedule(self.kernel.now_s, Priority.PLAN, self._step)


def serve(workload: Workload, hardware: Hardware, root: Path, cls: type[Any], **options: Any) -> Served:
    """Serve a workload to its end; `options` are those of `vllm_plugin.testing.make_config`."""
    kernel = Kernel()
    replica = VllmReplica(kernel, hardware, root, cls, **options)
    for sim in workload.arrivals:
        kernel.schedule(sim.request.arrival_s, Priority.ARRIVAL, lambda sim=sim: replica.submit(sim))  # type: ignore[misc]
    kernel.run()
    replica.scheduler.shutdown()
    return replica.served
