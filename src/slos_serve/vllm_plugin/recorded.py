"""What a record says of an engine and of a request, beside steps and plans (see `record`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import vllm

from slos_serve.config import short
from slos_serve.vllm_plugin.engine.said import CLAIMS

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.vllm_plugin.engine.tracking import Tracker
    from slos_serve.vllm_plugin.parts import Parts

NAMES = ("tenant", "session")  # of people: recorded only where the operator asks for them


def engine_facts(parts: Parts, *, is_async: bool) -> dict[str, Any]:
    """Return the `engine` line: all that a replay needs to know beside what it is served. No keys, no tenants."""
    settings, config = parts.settings, parts.scheduler.vllm_config
    classes = settings.config.to_json()
    return {
        "vllm": str(vllm.__version__),
        "model": str(config.model_config.model),
        **parts.standing.modes.to_json(),
        "limits": asdict(parts.limits),
        "policy": str(config.scheduler_config.policy),
        "is_async": is_async,
        "planner": settings.planner,
        "planner_options": dict(settings.planner_options),
        "config": {key: value for key, value in classes.items() if key not in ("tenants", "models", "api_keys")},
    }


def request_facts(tracker: Tracker, requests: Iterable[Request]) -> dict[str, dict[str, Any]]:
    """Return by id what is known of requests that end now, while the tracker still holds them. Times in seconds."""
    facts: dict[str, dict[str, Any]] = {}
    for request in requests:
        live = tracker.live.get(request.request_id)
        if live is None:
            continue
        row = tracker.table.rows[tracker.table.index(live.request_id)] if live.has_row else None
        facts[short(live.request_id)] = {
            "arrival_s": round(live.arrival_s, 6),
            "added_s": round(live.added_s, 6),
            "first_token_s": round(live.first_token_s, 6) if live.has_begun else None,
            "said": {key: value for key, value in live.args.items() if key in CLAIMS},
            "slo": {name: value for name, value in live.slo.items() if value is not None},
            "weight": live.weight,
            "thinks": live.thinks,
            "max_output_tokens": request.max_tokens if row is None else int(row["max_output_tokens"]),
            "num_cached_tokens": 0 if row is None else int(row["num_cached_tokens"]),
            "num_thinking_tokens": live.num_thinking_tokens,
            "verdict": live.verdict or live.would_be,
            "reason": live.reason,
        }
    return facts


def request_line(facts: Mapping[str, Any], end: Mapping[str, Any], *, names: bool, enforced: bool) -> dict[str, Any]:
    """Return the `request` line of one that ended; without its tenant and session unless `names`."""
    left_out = () if names else NAMES
    return {key: value for key, value in {**facts, **end, "enforced": enforced}.items() if key not in left_out}
