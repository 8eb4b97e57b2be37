"""Let planner and router compile their loops before the first request, not during it: each takes seconds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from slos_serve.core.lengths import LengthModel
from slos_serve.core.moves import NUM_SEEN, move_rows
from slos_serve.core.perf import PerfModel
from slos_serve.core.planning.steady import foretell
from slos_serve.core.routing.routers import Arrival, SloRouter, snapshot_of
from slos_serve.core.slo.grading import GRADE_DTYPE, feed_rows
from slos_serve.core.types import Limits, Planner, ReplicaState, Request, RequestTable, Slo, Status, Tier

_MODEL = PerfModel.from_terms(
    [{"per_token_s": 1e-4, "per_request_s": 1e-4, "per_context_token_s": 1e-7, "per_pair_s": 1e-9, "fixed_s": 5e-3}]
)
_LIMITS = Limits(max_num_batched_tokens=2048, max_num_seqs=64, max_model_len=4096, block_size=16, num_kv_blocks=4000)


def warm_up_router() -> None:
    """Route a few made-up requests between made-up replicas, with drafts and without."""
    router, names = SloRouter(), ["plain", "drafting"]
    for name, num_drafts in zip(names, (0, 3), strict=True):
        limits = replace(_LIMITS, max_draft_length=num_drafts)
        router.observe(snapshot_of(_situation(limits, 2), replica_id=name))
    for i in range(4):
        arrival = Arrival(request_id=str(i), arrival_s=0.1, num_prompt_tokens=200, ttft_deadline_s=0.5 + i, tpot_s=0.1)
        router.choose(arrival, names, 0.1)


def warm_up(planner: Planner, limits: Limits) -> None:
    """Plan a few made-up situations."""
    _move_and_grade()
    for num_candidates in (0, 2, 40):
        state = _situation(limits, num_candidates)
        foretell(replace(state, limits=replace(limits, max_draft_length=0)), planner.plan(state), 2)
    planner.plan(_situation(limits, 40, overloaded=True))
    # So little memory, and so much time, that sets are proposed which do not hold.
    small = replace(limits, max_num_seqs=8, max_model_len=1024, block_size=16, num_kv_blocks=500)
    planner.plan(_situation(small, 40, ttft_s=0.5))


def _move_and_grade() -> None:
    """Move a row of a table, grade one token of a stream that promises nothing, and learn from one length."""
    rows, ends = _situation(_LIMITS, 0).requests.rows, np.zeros(64, np.int64)
    move_rows(rows, np.zeros(1, np.int64), np.zeros((NUM_SEEN, 1), np.int64), ends, ends.copy(), 16, 0.0, 0.0, 0.0)
    grades, one = np.zeros(1, GRADE_DTYPE), np.ones(1, np.int64)
    feed_rows(grades, np.zeros(1, np.int64), one, np.zeros(1, np.int64), 1.0)
    lengths = LengthModel()
    lengths.observe("", 100, 100)
    lengths.predict("", 100, 200, produced=10)


def _situation(limits: Limits, num_candidates: int, *, overloaded: bool = False, ttft_s: float = 0.2) -> ReplicaState:
    """Return decodes with promises and without, and candidates more than fit; `overloaded`: half of them promised."""
    table = RequestTable()
    decodes = min(4, limits.max_num_seqs)
    longest = limits.max_model_len // 2
    for i in range(decodes + num_candidates):
        slo = Slo() if i % 4 == 3 else Slo(ttft_s=ttft_s * (1 + 0.05 * i), tpot_s=0.05 if i % 2 else 0.1)
        request = Request(
            request_id=str(i),
            arrival_s=0.0,
            num_prompt_tokens=max(1, min(500 + 20 * i, longest)),
            max_output_tokens=max(1, longest),
            slo=slo,
        )
        table.add(request)
    rows = table.rows[:decodes]
    rows["status"] = Status.RUNNING
    rows["tier"][:2] = Tier.PROMISED
    rows["num_computed_tokens"] = rows["num_prompt_tokens"]
    rows["num_output_tokens"] = 1
    rows["num_kv_blocks"] = [math.ceil(n / limits.block_size) for n in rows["num_prompt_tokens"].tolist()]
    rows["first_token_s"] = rows["last_token_s"] = 0.1
    if overloaded:
        table.rows["tier"][decodes : decodes + num_candidates // 2] = Tier.PROMISED
    return ReplicaState(
        now_s=0.1, requests=table, num_free_kv_blocks=limits.num_kv_blocks // 2, limits=limits, perf_model=_MODEL
    )
