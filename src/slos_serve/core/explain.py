"""Why a request is promised or not: the binding constraint, the slack, and what would have made it possible.

Theory of operation. A planner is a function of its state, so every "why" is a question about another state:
give the replica more KV blocks, more seats, this request a later deadline or a slower pace, or take another
request away, and plan again. The first change, in the order of `CONSTRAINTS`, after which the request is promised
names what binds. Nothing here knows how the planner decides; it costs some dozens of plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.slo.next_due import next_due_s
from slos_serve.core.types import DEADLINES, PROMISES, Tier

if TYPE_CHECKING:
    from slos_serve.core.types import Plan, Planner, ReplicaState, RequestTable, Rows, Verdict

# deadline-passed: no first token can be in time any more; compute: even alone, or beside what is promised; memory: KV
# blocks; seats: max_num_seqs; search: the planner's work limit; pace: its tokens after the first, not its first one.
CONSTRAINTS = ("requested", "deadline-passed", "memory", "seats", "search", "pace", "compute")
MORE = 64  # how many times the blocks, seats or work a counterfactual gets
MAX_LATER_S = 600.0
LATER_STEP_S = 1e-3
MAX_TRIED = 48
MAX_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a plan says about one request, and why. Times in seconds; None where there is nothing to say.

    `tier` is what it held before the plan; `is_promised` what holds after it; `let_go`: it was promised and no plan
    can keep it. `slack_s`: planned time to spare before the first token is due, or, once tokens come, until the next
    one is; negative where it is late. `binding` is one of `CONSTRAINTS`, "" for a promise. What would have made it
    possible: a first token due `later_s` later, a replica with nothing else to do (`fits_alone`: one more of them), or
    any one of `without` not there. `alone_s`: time to the first token
    on an idle engine from now; `is_late`: a token of it has been late.
    """

    request_id: str
    slo_class: str
    tier: str
    is_promised: bool
    let_go: bool = False
    reason: str = ""
    binding: str = ""
    slack_s: float | None = None
    predicted_ttft_s: float | None = None
    alone_s: float | None = None
    later_s: float | None = None
    fits_alone: bool = False
    without: tuple[str, ...] = ()
    num_output_tokens: int = 0
    is_late: bool = False
    num_at_risk: int = 0


def explain(state: ReplicaState, request_id: str, planner: Planner) -> Explanation:
    """Plan the state, and as many like it as it takes to say why. `KeyError` for a request that it does not hold."""
    index = state.requests.index(request_id)
    row = state.requests.rows[index]
    tier = int(row["tier"])
    plan = planner.plan(state)
    verdict = _verdict(plan, request_id)
    says_yes = verdict is not None and verdict.promised
    promised = says_yes or (tier == Tier.PROMISED and request_id not in plan.at_risk)
    due_s = float(next_due_s(state.requests.rows[index : index + 1])[0]) - state.limits.guard_s
    started = int(row["num_output_tokens"]) > 0
    found = Explanation(
        request_id=request_id,
        slo_class=state.requests.classes[int(row["class_index"])],
        tier=Tier(tier).name.lower().replace("_", "-"),
        is_promised=promised,
        let_go=request_id in plan.at_risk,
        reason="" if verdict is None else verdict.reason,
        slack_s=due_s - state.now_s if math.isfinite(due_s) else None,
        alone_s=_alone_s(state, request_id),
        num_output_tokens=int(row["num_output_tokens"]),
        is_late=bool(row["missed"]),
        num_at_risk=len(plan.at_risk),
    )
    if not started and (verdict is None or not verdict.promised):
        verdict = _verdict(planner.plan(_asked_anew(state, request_id)), request_id) if promised else None
    if verdict is not None and verdict.promised:
        return replace(found, slack_s=verdict.slack_s, predicted_ttft_s=verdict.predicted_ttft_s)
    if promised:
        return found
    return _explain_no(found, state, planner, has_slo=_wants_anything(row), started=started)


def _explain_no(
    found: Explanation, state: ReplicaState, planner: Planner, *, has_slo: bool, started: bool
) -> Explanation:
    """Add what binds and what would have helped."""
    if not has_slo:
        return replace(found, binding="requested", slack_s=None)
    if found.is_late or (found.slack_s is not None and found.slack_s <= 0):
        found = replace(found, binding="deadline-passed")
    if started:
        return replace(found, binding=found.binding or "compute")
    asked = _asked_anew(state, found.request_id)

    def helps(change: Callable[[ReplicaState], ReplicaState]) -> bool:
        verdict = _verdict(planner.plan(change(asked)), found.request_id)
        return verdict is not None and verdict.promised

    later_s = _least_delay(helps, found.request_id)
    slack_s = found.slack_s if found.binding else None if later_s is None else -later_s
    return replace(
        found,
        binding=found.binding or _binding(helps, found.request_id),
        slack_s=slack_s,
        later_s=later_s,
        fits_alone=helps(lambda s: _without(s, set(s.requests.request_ids) - {found.request_id})),
        without=_whose_absence_helps(helps, asked, found.request_id),
    )


def _binding(helps: Callable[[Callable[[ReplicaState], ReplicaState]], bool], request_id: str) -> str:
    """Return the first of memory, seats, search and pace whose lack of limits helps, else compute."""
    if not helps(lambda s: _without(s, set(s.requests.request_ids) - {request_id}, more_memory=True)):
        return "compute"  # not even alone
    changes: dict[str, Callable[[ReplicaState], ReplicaState]] = {
        "memory": _with_memory,
        "seats": lambda s: replace(s, limits=replace(s.limits, max_num_seqs=MORE * s.limits.max_num_seqs)),
        "search": lambda s: replace(s, limits=replace(s.limits, work_limit=MORE * s.limits.work_limit)),
        "pace": lambda s: _with_row(s, request_id, _unpaced),
    }
    return next((name for name, change in changes.items() if helps(change)), "compute")


def _least_delay(helps: Callable[[Callable[[ReplicaState], ReplicaState]], bool], request_id: str) -> float | None:
    """Return by how much later the first token would have to be due, to the millisecond; None where that is no help."""

    def later(seconds: float) -> Callable[[ReplicaState], ReplicaState]:
        def delay(row: Rows) -> None:
            for name in DEADLINES:
                row[name] += seconds

        return lambda s: _with_row(s, request_id, delay)

    high = LATER_STEP_S
    while not helps(later(high)):
        high *= 4
        if high > MAX_LATER_S:
            return None
    low = high / 4 if high > LATER_STEP_S else 0.0
    while high - low > LATER_STEP_S:
        middle = (low + high) / 2
        low, high = (low, middle) if helps(later(middle)) else (middle, high)
    return high


def _whose_absence_helps(
    helps: Callable[[Callable[[ReplicaState], ReplicaState]], bool], state: ReplicaState, request_id: str
) -> tuple[str, ...]:
    """Return requests each of whose absence alone would have been enough, the cheapest promises first."""
    rows, ids = state.requests.rows, state.requests.request_ids
    order = np.lexsort((-rows["num_prompt_tokens"], rows["weight"], -(rows["tier"] == Tier.PROMISED).astype(int)))
    named: list[str] = []
    for name in [ids[i] for i in order.tolist() if ids[i] != request_id][:MAX_TRIED]:
        if len(named) == MAX_NAMED:
            break
        if helps(lambda s, name=name: _without(s, {name})):  # type: ignore[misc]
            named.append(name)
    return tuple(named)


def _verdict(plan: Plan, request_id: str) -> Verdict | None:
    return next((verdict for verdict in plan.verdicts if verdict.request_id == request_id), None)


def _wants_anything(row: Rows) -> bool:
    return any(math.isfinite(float(row[name])) for name in PROMISES)


def _alone_s(state: ReplicaState, request_id: str) -> float | None:
    """Return how long an idle engine would take to the first token; None where it is out."""
    row = state.requests.rows[state.requests.index(request_id)]
    if row["num_output_tokens"] > 0:
        return None
    done = int(row["num_computed_tokens"]) or int(row["num_cached_tokens"])
    return state.perf_model.prefill_seconds(int(row["num_prompt_tokens"]), state.limits.max_num_batched_tokens, done)


def _with_table(state: ReplicaState, change: Callable[[RequestTable], object]) -> ReplicaState:
    table = state.requests.copy()
    change(table)
    return replace(state, requests=table)


def _with_row(state: ReplicaState, request_id: str, change: Callable[[Rows], object]) -> ReplicaState:
    return _with_table(state, lambda table: change(table.rows[table.index(request_id)]))


def _asked_anew(state: ReplicaState, request_id: str) -> ReplicaState:
    """Return the state as if nothing had been said about the request's promise."""

    def ask(row: Rows) -> None:
        row["tier"] = Tier.PENDING

    return _with_row(state, request_id, ask)


def _unpaced(row: Rows) -> None:
    for name in PROMISES:
        if name != "ttft_deadline_s":
            row[name] = math.inf


def _with_memory(state: ReplicaState) -> ReplicaState:
    more = MORE * state.limits.num_kv_blocks
    return replace(
        state,
        num_free_kv_blocks=more - state.limits.num_kv_blocks + state.num_free_kv_blocks,
        limits=replace(state.limits, num_kv_blocks=more),
    )


def _without(state: ReplicaState, names: set[str], *, more_memory: bool = False) -> ReplicaState:
    """Return the state without some requests, their blocks free."""
    rows = state.requests.rows
    freed = sum(int(rows["num_kv_blocks"][state.requests.index(name)]) for name in names)

    def remove(table: RequestTable) -> None:
        for name in names:
            table.remove(name)

    fewer = replace(_with_table(state, remove), num_free_kv_blocks=state.num_free_kv_blocks + freed)
    return _with_memory(fewer) if more_memory else fewer
