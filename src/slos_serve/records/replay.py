"""Plan recorded inputs again, compare the plans byte by byte, and compare them with what the engine ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slos_serve.core.types import ReplicaState
    from slos_serve.records.reader import Recording


@dataclass(slots=True)
class Replay:
    """How recorded plans compare: with the same inputs planned again, and with what the engine then ran.

    `divergences` counts, by what and why, requests whose share the engine did not run as planned.
    """

    num_plans: int = 0
    num_same: int = 0
    num_steered: int = 0
    num_exact: int = 0
    differing: list[str] = field(default_factory=list)
    divergences: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return counts and shares; a share of nothing is null."""
        return {
            "num_plans": self.num_plans,
            "num_same": self.num_same,
            "share_same": self.num_same / self.num_plans if self.num_plans else None,
            "differing": list(self.differing),
            "num_steered": self.num_steered,
            "num_exact": self.num_exact,
            "share_exact": self.num_exact / self.num_steered if self.num_steered else None,
            "divergences": dict(self.divergences),
        }


def replay(recording: Recording) -> Replay:
    """Plan every recorded input again and compare, byte by byte, then compare plans with what was scheduled."""
    result, planner = Replay(), recording.planner()
    is_async = bool(recording.engine.get("is_async"))
    for recorded in recording.plans:
        state = recorded.state()
        result.num_plans += 1
        again, before = planner.plan(state).to_json(), recorded.document["plan"]
        if json.dumps(again, sort_keys=True) == json.dumps(before, sort_keys=True):
            result.num_same += 1
        else:
            keys = [key for key in again if again[key] != before.get(key)]
            result.differing.append(f"{recorded.where}: {', '.join(keys)}")
        if recorded.document.get("steered"):
            result.num_steered += 1
            found = list(divergences(state, before, recorded.document["scheduled"], is_async=is_async))
            result.num_exact += not found
            result.divergences.update(found)
    return result


def divergences(
    state: ReplicaState, plan: Mapping[str, Any], scheduled: Mapping[str, int], *, is_async: bool
) -> Iterator[str]:
    """Yield, for each request that the engine ran otherwise than planned, what and why.

    Requests that the planner was not asked about follow vLLM's own rules and are no divergence.
    """
    table, limits = state.requests, state.limits
    rows = table.rows
    shares = dict(zip(plan["request_ids"], zip(plan["num_tokens"], plan["draft_lengths"], strict=True), strict=True))
    fresh = 0
    for name, (tokens, drafts) in shares.items():
        row = rows[table.index(name)]
        done = int(row["num_computed_tokens"]) or int(row["num_cached_tokens"])
        fresh += max(0, -(-(done + tokens + drafts) // limits.block_size) - int(row["num_kv_blocks"]))
    others = sum(count for name, count in scheduled.items() if name not in table)
    planned = sum(tokens + drafts for tokens, drafts in shares.values())
    for name, (tokens, drafts) in shares.items():
        found = scheduled.get(name, 0)
        if tokens <= found <= tokens + drafts:
            continue
        what = "not run" if not found else "cut" if found < tokens else "more"
        if found > tokens + drafts:
            why = "unexplained"
        elif planned + others > limits.max_num_batched_tokens:
            why = "token budget, shared with requests under vLLM's own rules"
        elif fresh > state.num_free_kv_blocks:
            why = "no free KV blocks"
        elif is_async:
            why = "it ended, or its drafts were refused, while the step before ran"
        elif int(rows[table.index(name)]["num_cached_tokens"]) and not found:
            why = "its cached prefix was gone"
        elif rows[table.index(name)]["num_computed_tokens"] == 0 and found and found < tokens:
            why = "the prefix cache held more than when it was asked"
        else:
            why = "unexplained"
        yield f"{what}: {why}"
    for name in scheduled:
        if name in table and name not in shares:
            yield "not planned: unexplained"
