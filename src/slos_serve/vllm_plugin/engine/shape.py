"""What a scheduled batch computes, in the terms of the performance model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slos_serve.records.writer import BatchShape
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Shapes:
    """Measure batches right after `schedule()`; one that decodes the same requests again costs a comparison."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._counts: dict[str, int] = {}
        self._decodes: BatchShape | None = None  # the last batch, if it was decodes of one token each

    def of(self, output: SchedulerOutput) -> BatchShape:
        """Return the shape of a batch."""
        counts, last = output.num_scheduled_tokens, self._decodes
        if last is not None and counts == self._counts:
            shape = replace(last, context_tokens=last.context_tokens + last.num_requests)
        else:
            shape = _measure(self._scheduler.requests, output)
            self._counts = counts
        is_steady = shape.num_tokens == shape.num_requests and not (shape.has_prefill or shape.draft_steps)
        self._decodes = shape if is_steady else None
        return shape


def _measure(requests: Any, output: SchedulerOutput) -> BatchShape:
    """Look at each request of a batch.

    A request decodes where exactly one token was left to compute (drafts beside it do not change that);
    everything else is a prefill chunk.
    """
    context = num_prefills = num_prompt_tokens = 0
    pairs, drafts = 0.0, output.scheduled_spec_decode_tokens
    for request_id, count in output.num_scheduled_tokens.items():
        start, is_decode = view.was_before(requests[request_id], count, len(drafts.get(request_id, ())))
        if is_decode:
            context += start
        else:
            num_prefills += 1
            num_prompt_tokens += count
            pairs += count * (start + count / 2)
    return BatchShape(
        num_tokens=int(output.total_num_scheduled_tokens),
        num_requests=len(output.num_scheduled_tokens),
        context_tokens=context,
        draft_steps=0 if getattr(output, "skip_drafts", False) else int(output.num_spec_tokens_to_schedule),
        attention_pairs=pairs,
        has_prefill=num_prefills > 0,
        num_prompt_tokens=num_prompt_tokens,
    )
