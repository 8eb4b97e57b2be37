"""What we know about one request that vLLM does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slos_serve.config import short
from slos_serve.core.types import Slo

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.core.slo.deadlines import StreamGrader

NO_SLO = Slo()


@dataclass(slots=True, eq=False)
class Live:
    """One request that vLLM holds: what it asks for, what it was told, and how it does.

    `grader`, `num_output_tokens` and `last_token_s` are brought up to date when it ends (see `outputs`).
    """

    request: Request
    args: Mapping[str, Any]
    stamped_s: float  # its arrival as Unix time
    arrival_s: float
    added_s: float  # when the engine took it up
    slo: Slo = NO_SLO
    slo_class: str = "best-effort"
    weight: float = 1.0
    thinks: bool = False
    is_thinking: bool = False
    is_resolved: bool = True
    reason: str = ""
    grader: StreamGrader | None = None
    is_stock: bool = False
    has_row: bool = False
    missed: bool = False
    missed_at: int = 0  # output tokens when that became known
    promised_tokens: float = math.inf  # the predicted output length when the promise was given
    num_output_tokens: int = 0
    num_thinking_tokens: int = 0
    first_token_s: float = math.inf
    last_token_s: float = math.inf
    verdict: str = ""  # promised, promoted, best-effort; "" while pending
    was_promised: bool = False
    is_declined: bool = False
    promise_lead_s: float | None = None
    would_be: str = ""  # the verdict in observe mode
    is_set_aside: bool = False  # its class only observes, others are steered: it is planned as best-effort work
    is_over_share: bool = False  # its tenant has all the promises that it may have
    is_expired: bool = False

    @property
    def request_id(self) -> str:
        """The engine's id of the request."""
        return str(self.request.request_id)

    @property
    def slo_id(self) -> str | None:
        """The id that the HTTP edge gave it; None on a bare server."""
        value = self.args.get("slo_id")
        return None if value is None else str(value)

    @property
    def tenant(self) -> str:
        """Who it is counted for."""
        return str(self.args.get("slo_tenant") or "")

    @property
    def session(self) -> str | None:
        """The session it belongs to, as the client names it."""
        value = self.request.session_id
        return None if value is None else short(str(value))

    @property
    def has_slo(self) -> bool:
        """Tell whether the client asked for anything."""
        return not self.slo.is_empty

    @property
    def has_begun(self) -> bool:
        """Tell whether its first token is out."""
        return self.first_token_s < math.inf

    @property
    def has_outrun(self) -> bool:
        """Tell whether its SLO was missed by an output longer than predicted when the promise was given."""
        return (self.missed_at or self.num_output_tokens) > self.promised_tokens

    @property
    def planned_slo(self) -> Slo:
        """What plans are made for."""
        return NO_SLO if self.is_set_aside else self.slo
