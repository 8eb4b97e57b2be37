"""What a scheduled batch computes, in the terms of the performance model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slos_serve.records.writer import BatchShape
from slos_serve.vllm_plugin.engine import view

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Shapes:
    """Measure batches right after `schedule()`; what decodes in one batch after the other is looked at once.

    A request decodes where exactly one token was left to compute (drafts beside it do not change that); everything else
    is a prefill chunk. The context of a decode without drafts grows by one from batch to batch.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._number = 0
        self._decodes: dict[str, int] = {}  # those of the last batch: context minus the batch's number, which stays
        self._sum = 0  # of these

    def of(self, output: SchedulerOutput) -> BatchShape:
        """Return the shape of a batch."""
        counts, total = output.num_scheduled_tokens, int(output.total_num_scheduled_tokens)
        self._number += 1
        new = self._others(counts, total, has_drafts=bool(output.scheduled_spec_decode_tokens))
        context = self._sum + self._number * len(self._decodes)
        num_prompt_tokens, pairs, drafts = 0, 0.0, output.scheduled_spec_decode_tokens
        for request_id in new:
            count = counts[request_id]
            request = self._scheduler.requests[request_id]
            start, is_decode = view.was_before(request, count, len(drafts.get(request_id, ())))
            if not is_decode:
                num_prompt_tokens += count
                pairs += count * (start + count / 2)
                continue
            context += start
            if count == 1:
                self._decodes[request_id] = start - self._number
                self._sum += start - self._number
        return BatchShape(
            num_tokens=total,
            num_requests=len(counts),
            context_tokens=context,
            draft_steps=0 if getattr(output, "skip_drafts", False) else int(output.num_spec_tokens_to_schedule),
            attention_pairs=pairs,
            has_prefill=num_prompt_tokens > 0,
            num_prompt_tokens=num_prompt_tokens,
        )

    def _others(self, counts: Mapping[str, int], total: int, *, has_drafts: bool) -> Iterable[str]:
        """Return whom to look at; the others decode one token each, as in the batch before."""
        decodes = self._decodes
        if total == len(decodes) and not has_drafts and counts.keys() == decodes.keys():
            return ()
        for request_id in decodes.keys() - counts.keys():
            self._sum -= decodes.pop(request_id)
        new = counts.keys() - decodes.keys()
        if not has_drafts and total - sum(counts[request_id] for request_id in new) == len(decodes):
            return new
        decodes.clear()  # one that decoded has more to compute
        self._sum = 0
        return counts
