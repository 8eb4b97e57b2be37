"""What must hold in every run; each check raises `InvariantError` that says what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.slo.summary import OUTCOMES
from slos_serve.core.types import Status
from slos_serve.errors import SlosServeError

if TYPE_CHECKING:
    from slos_serve.core.types import Limits, RequestTable
    from slos_serve.sim.replica.kvpool import KvPool


class InvariantError(SlosServeError, AssertionError):
    """A simulation broke a rule that no plan may break: the fault is the simulator's or the planner's."""


def check_table(table: RequestTable, pool: KvPool, limits: Limits, now_s: float) -> None:
    """Check blocks, progress and time of the live requests between two steps."""
    rows = table.rows
    held = int(rows["num_kv_blocks"].sum())
    if held + pool.num_free != pool.num_blocks:
        raise InvariantError(f"{held} KV blocks held and {pool.num_free} free: expected {pool.num_blocks} in all")
    if not 0 <= pool.num_cached <= pool.num_free:
        raise InvariantError(f"{pool.num_cached} cached blocks: expected within the {pool.num_free} free ones")
    if len(rows) == 0:
        return
    sequence = rows["num_prompt_tokens"] + rows["num_output_tokens"]
    if (rows["num_computed_tokens"] >= sequence).any():
        raise InvariantError("a live request has nothing left to compute")
    if (rows["num_computed_tokens"] > rows["num_kv_blocks"] * limits.block_size).any():
        raise InvariantError("a request has computed tokens without KV blocks")
    waiting = rows["status"] == Status.WAITING
    if rows["num_kv_blocks"][waiting].any():
        raise InvariantError("a waiting request holds KV blocks")
    if len(rows) - int(waiting.sum()) > limits.max_num_seqs:
        raise InvariantError(f"more than max_num_seqs = {limits.max_num_seqs} requests run")
    if (rows["arrival_s"] > now_s).any():
        raise InvariantError("a request is live before it arrived")
    started = np.isfinite(rows["first_token_s"])
    if (rows["first_token_s"][started] <= rows["arrival_s"][started]).any():
        raise InvariantError("a token came out no later than its request arrived")


def check_apart(request_ids: Sequence[str]) -> None:
    """Check that no request is live on two replicas."""
    twice = [name for name, count in Counter(request_ids).items() if count > 1]
    if twice:
        raise InvariantError(f"requests {twice[:3]} are live on several replicas")


def check_conservation(num_offered: int, outcomes: Mapping[str, int]) -> None:
    """Check that every offered request has exactly one outcome."""
    unknown = sorted(set(outcomes) - {*OUTCOMES, "none"})
    if unknown:
        raise InvariantError(f"outcomes {unknown}: expected names among {OUTCOMES}")
    total = sum(outcomes.values())
    if total != num_offered:
        raise InvariantError(f"{total} outcomes for {num_offered} requests")
