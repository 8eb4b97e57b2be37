"""The closed lists of what is said about requests: one word for one thing, wherever it is said.

Headers, bodies, pages, records, logs and labels of metrics carry these strings and no others. `MEANINGS` says what each
tells a client; `docs/http-api.md` lists them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypedDict


class Said(StrEnum):
    """The verdict on a request: whether its SLO is promised."""

    PENDING = "pending"
    PROMISED = "promised"
    PROMOTED = "promoted"
    BEST_EFFORT = "best-effort"
    REJECTED = "rejected"


class Reason(StrEnum):
    """Why a verdict is no promise; `NONE` for a promise."""

    NONE = ""
    TOO_TIGHT = "too-tight"
    COMPUTE = "compute"
    MEMORY = "memory"
    DEADLINE_PASSED = "deadline-passed"
    REQUESTED = "requested"
    NO_PRIORITY_CLASS = "no-priority-class"
    UNKNOWN_KEY = "unknown-key"
    INVALID = "invalid"
    OBSERVE = "observe"
    PAUSED = "paused"
    SHARE = "share"
    QUEUE_FULL = "queue-full"
    TENANT_FULL = "tenant-full"
    TTL_EXPIRED = "ttl-expired"


class Outcome(StrEnum):
    """What became of a request, from worst to best; of several parts of one request the worst counts."""

    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    MISSED = "missed"
    DECLINED = "declined"
    MET = "met"
    NONE = "none"


class RequestTold(TypedDict):
    """Whom a word of the engine is about; `slo_id` is None for what did not come through our edge."""

    slo_id: str | None
    request_id: str
    slo_class: str
    tenant: str
    session: str | None
    stamped_s: float  # Unix time from which its promise counts
    client: int  # which API server it came through


class VerdictTold(RequestTold):
    """A verdict as the engine sends it; `asked` is the SLO resolved for this prompt, in milliseconds by name."""

    verdict: str  # of `Said`
    reason: str  # of `Reason`
    slack_ms: float | None
    predicted_ttft_ms: float | None
    asked: dict[str, float]


class EndTold(RequestTold):
    """How a request ended, as the engine sends it; `tokens` is its course, for a picture."""

    outcome: str  # of `Outcome`
    reason: str
    promised: bool
    stages: dict[str, str]
    least_slack_ms: dict[str, float]  # measured, by stage, where a stage was graded
    ttft_ms: float | None
    tpot_ms: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    promise_lead_ms: float | None
    tokens: Any


MEANINGS: dict[type[StrEnum], dict[str, str]] = {
    Said: {
        Said.PENDING: "no verdict yet",
        Said.PROMISED: "its SLO is promised",
        Said.PROMOTED: "not promised at first, promised since",
        Said.BEST_EFFORT: "served without a promise",
        Said.REJECTED: "not served: a 429",
    },
    Reason: {
        Reason.NONE: "nothing to explain",
        Reason.TOO_TIGHT: "it asks for more than this engine can do even when idle; trying again cannot help",
        Reason.COMPUTE: "the engine is busy with what is promised",
        Reason.MEMORY: "the KV cache has no room for it beside what is promised",
        Reason.DEADLINE_PASSED: "its first token was due before it could be planned",
        Reason.REQUESTED: "nothing else was asked for",
        Reason.NO_PRIORITY_CLASS: "`service_tier: priority` was asked for, and the operator has named no class for it",
        Reason.UNKNOWN_KEY: "it came with none of the operator's API keys, so what it asks for is not heard",
        Reason.INVALID: "its `vllm_xargs` make no sense as an SLO",
        Reason.OBSERVE: "plans are not carried out now, for the engine or for its class",
        Reason.PAUSED: "the operator has paused the engine; it may be promised when that ends",
        Reason.SHARE: "its tenant holds as many promises as the operator allows",
        Reason.QUEUE_FULL: "as many requests without a promise wait as the operator allows",
        Reason.TENANT_FULL: "its tenant has as many requests under way as the operator allows",
        Reason.TTL_EXPIRED: "it waited longer than its class allows and was never begun",
    },
    Outcome: {
        Outcome.FAILED: "the engine could not finish it",
        Outcome.REJECTED: "a 429, or sent away from the queue",
        Outcome.CANCELLED: "its client left; it counts neither for nor against",
        Outcome.MISSED: "late at one of its checks; a broken promise where it was promised",
        Outcome.DECLINED: "never promised, so it counts as a miss, in time or not",
        Outcome.MET: "in time at all of its checks",
        Outcome.NONE: "it had no SLO",
    },
}
