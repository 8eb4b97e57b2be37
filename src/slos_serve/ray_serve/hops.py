"""What ingress and replica say to each other about one request, beside vLLM's own chunks.

A *hop* is one attempt to have a request served by one replica. The ingress sends it along with the request;
the replica answers with *notes* between the chunks. Neither reaches the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slos_serve.core.routing.routers import Arrival
from slos_serve.core.words import Reason

# Why a replica gives no promise although the client asked for one it might get elsewhere.
REFUSALS = frozenset({Reason.TOO_TIGHT, Reason.COMPUTE, Reason.MEMORY, Reason.DEADLINE_PASSED})
VERDICT, FINISHED = "verdict", "finished"
DONE = "data: [DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One attempt. `key` names it and nothing else; `arrival` is the request as the router sees it.

    `slo_id` is empty where nobody asked for a promise. `num_parts`: of how many choices the engine will tell the
    end in time.
    """

    key: str
    arrival: Arrival
    slo_id: str = ""
    slo_class: str = ""
    tenant: str = ""
    best_effort: bool = False
    num_parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a replica says about a request: its verdict, or how it ended.

    `record` is the replica's own record of the request, as `http.hub.Hub.find` returns it.
    """

    kind: str
    replica_id: str
    record: Mapping[str, Any] = field(default_factory=dict)


def is_refusal(record: Mapping[str, Any] | None) -> bool:
    """Tell whether a record says that no promise is given, for a reason another replica may not have."""
    return record is not None and record.get("verdict") == "best-effort" and record.get("reason") in REFUSALS


def is_last(item: Any) -> bool:
    """Tell whether an item ends its stream, or is a whole answer."""
    if isinstance(item, list):
        return any(isinstance(one, str) and DONE in one for one in item)
    return not isinstance(item, str)
