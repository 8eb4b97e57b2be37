"""What a request says about its SLO, as far as the engine believes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slos_serve.config import MAX_TEXT, OVERRIDES
from slos_serve.http import seal

UNREADABLE = "(unreadable)"
CLAIMS = ("slo_class", "slo_stage", *("slo_" + key for key in OVERRIDES))  # what any client may say


def said(extra: Mapping[str, Any], *, edge_only: bool = False) -> dict[str, Any]:
    """Return the `slo_*` values of a request's extra arguments that count.

    Id, arrival and tenant count where an edge of this start has sealed them. The class and the numbers count from
    clients too, unless there is an edge (`edge_only`): what it did not write came by a route that it does not read.
    What is neither a number nor a short text becomes a text that means nothing.
    """
    is_sealed = seal.is_sealed(extra)
    if edge_only and not is_sealed:
        return {}
    keys = (*CLAIMS, *seal.SEALED) if is_sealed else CLAIMS
    return {key: extra[key] if _is_small(extra[key]) else UNREADABLE for key in keys if key in extra}


def _is_small(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_TEXT)
