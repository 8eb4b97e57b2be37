"""What lets an engine believe who sent a request and when it came: a seal that only its HTTP edge can write.

A client may put anything into `vllm_xargs`, on whatever route a server has. So id, arrival and tenant count only
where they carry a message authentication code under a secret that edge and engine share, made anew at each start:
it is in the environment that the engine's process inherits from the server's. Where the two do not share it, the
engine takes a request as it would from a client.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from typing import Any

ENVIRONMENT = "SLOS_SERVE_EDGE_SECRET"
SEALED = ("slo_id", "slo_arrival_s", "slo_tenant")
SEAL = "slo_seal"


def prepare() -> None:
    """Make this start's secret, unless the process was given one; vLLM calls it as a plug-in, in every process."""
    os.environ.setdefault(ENVIRONMENT, secrets.token_hex(32))


def start_name() -> str:
    """Return a name of this start: the same in all of its processes, and in nobody else's."""
    prepare()
    return hmac.digest(os.environ[ENVIRONMENT].encode(), b"start", "sha256").hex()[:16]


def sealed(xargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's `slo_*` values with the seal on those that only an edge may say."""
    return {**xargs, SEAL: _code(xargs)}


def is_sealed(xargs: Mapping[str, Any]) -> bool:
    """Tell whether an edge of this start wrote id, arrival and tenant as they are."""
    seal = xargs.get(SEAL)
    return isinstance(seal, str) and seal.isascii() and hmac.compare_digest(seal, _code(xargs))


def _code(xargs: Mapping[str, Any]) -> str:
    prepare()
    said = repr([xargs.get(key) for key in SEALED])
    return hmac.digest(os.environ[ENVIRONMENT].encode(), said.encode("utf-8", "surrogatepass"), "sha256").hex()
