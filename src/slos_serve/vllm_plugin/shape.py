"""What a scheduled batch computes, in the terms of the performance model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.types import Status
from slos_serve.vllm_plugin.record import BatchShape

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from slos_serve.vllm_plugin.tracking import Tracker


def batch_shape(tracker: Tracker, output: SchedulerOutput) -> BatchShape:
    """Measure a batch right after `schedule()`, while the table still holds what was known before it.

    A request decodes where exactly one token was left to compute (drafts beside it do not change that);
    everything else is a prefill chunk. Requests without a row count by their share alone.
    """
    shares = output.num_scheduled_tokens
    table = tracker.table
    ids = shares if not tracker.stock else [i for i in shares if i in table]
    index = np.array([table.index(i) for i in ids], dtype=np.int64)
    counts = np.array([shares[i] for i in ids] if tracker.stock else list(shares.values()), dtype=np.int64)
    rows = table.rows
    starts = rows["num_computed_tokens"][index]
    total = rows["num_prompt_tokens"][index] + rows["num_output_tokens"][index]
    waited = np.flatnonzero(rows["status"][index] == Status.WAITING)
    if waited.size:  # admitted in this step: what the prefix cache held is known only now
        names = list(ids)
        live = tracker.live
        for position in waited.tolist():
            name = names[position]
            starts[position] = live[name].request.num_computed_tokens - shares[name]
    decodes = (total - starts) == 1
    prefills = ~decodes
    chunks, befores = counts[prefills], starts[prefills]
    others = [n for i, n in shares.items() if i not in table] if tracker.stock else []
    return BatchShape(
        num_tokens=int(output.total_num_scheduled_tokens),
        num_requests=len(shares),
        context_tokens=int(starts[decodes].sum()),
        draft_steps=int(output.num_spec_tokens_to_schedule),
        attention_pairs=float((chunks * (befores + chunks / 2)).sum() + sum(n * n / 2 for n in others)),
        has_prefill=bool(chunks.size or any(n > 1 for n in others)),
    )
