"""What a scheduled batch computes, in the terms of the performance model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slos_serve.records.writer import BatchShape

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from slos_serve.vllm_plugin.engine.tracking import Tracker


def batch_shape(tracker: Tracker, output: SchedulerOutput) -> BatchShape:
    """Measure a batch right after `schedule()`, while the tracker still holds what was known before it.

    A request decodes where exactly one token was left to compute (drafts beside it do not change that);
    everything else is a prefill chunk. Requests without a row count by their share alone.
    """
    shares = output.num_scheduled_tokens
    table = tracker.table
    # a blocked request may become runnable within schedule() itself
    is_whole = not tracker.stock and not tracker.blocked
    ids = list(shares) if is_whole else [i for i in shares if i in table]
    index = np.fromiter(map(table.index, ids), np.int64, len(ids))
    counts = np.fromiter(map(shares.__getitem__, ids), np.int64, len(ids))
    starts = tracker.computed[index]
    total = tracker.total[index]
    # admitted in this step: what the prefix cache held is known only now
    for position in np.flatnonzero(~tracker.running[index]).tolist():
        name = ids[position]
        starts[position] = tracker.live[name].request.num_computed_tokens - shares[name]
    decodes = (total - starts) == 1
    prefills = ~decodes
    chunks, befores = counts[prefills], starts[prefills]
    others = [] if is_whole else [n for i, n in shares.items() if i not in table]
    return BatchShape(
        num_tokens=int(output.total_num_scheduled_tokens),
        num_requests=len(shares),
        context_tokens=int(starts[decodes].sum()),
        draft_steps=0 if getattr(output, "skip_drafts", False) else int(output.num_spec_tokens_to_schedule),
        attention_pairs=float((chunks * (befores + chunks / 2)).sum() + sum(n * n / 2 for n in others)),
        has_prefill=bool(chunks.size or any(n > 1 for n in others)),
    )
