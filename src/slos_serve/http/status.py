"""What an engine says of itself in numbers: each of them once, with what becomes of several engines' and its metric.

A number that people should see is a line here and one where it is made (`vllm_plugin.snapshot`): servers with several
engines, clusters, reports of replicas and `/metrics` go by this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One number of an engine's status.

    `join` makes one number of several engines'; `chosen` does where a router picks the engine (None: as `join`).
    `counts`: it only grows while an engine lives. `needs_all`: unknown for all where one engine does not tell it.
    `metric`: name and help text on `/metrics`, a counter for what counts, else a gauge.
    """

    key: str
    join: Callable[[Iterable[Any]], Any] = sum
    chosen: Callable[[Iterable[Any]], Any] | None = None
    counts: bool = False
    needs_all: bool = False
    metric: tuple[str, str] | None = None


FIELDS = (
    Field(key="num_promised", metric=("slos_serve_promised_requests", "Live requests that hold a promise.")),
    Field(key="num_best_effort", metric=("slos_serve_best_effort_requests", "Live best-effort requests.")),
    Field(key="num_pending", metric=("slos_serve_pending_requests", "Live requests without a verdict yet.")),
    Field(key="num_running"),
    Field(key="num_waiting"),
    Field(key="free_kv_blocks"),
    Field(key="num_kv_blocks"),
    Field(
        key="headroom_tokens_per_s",
        needs_all=True,
        metric=("slos_serve_prefill_headroom_tokens_per_second", "Prefill rate not yet promised away."),
    ),
    Field(key="drain_s", join=max, chosen=min),
    Field(
        key="margin_coverage",
        join=min,
        metric=("slos_serve_margin_coverage", "Share of steps within the predicted time."),
    ),
    Field(
        key="device_time_lost",
        join=max,
        metric=("slos_serve_device_wait_ratio", "Share of the device's time for which it waited for the scheduler."),
    ),
    Field(key="steps", counts=True),
    Field(key="invalid", counts=True),
    Field(key="expired", counts=True),
    Field(
        key="best_effort_preemptions",
        counts=True,
        metric=("slos_serve_best_effort_preemptions_total", "Best-effort requests preempted."),
    ),
    Field(
        key="step_downs",
        counts=True,
        metric=("slos_serve_step_downs_total", "Times that steering stopped by itself, for the engine's own order."),
    ),
)
KEYS = tuple(field.key for field in FIELDS)


def joined(every: Sequence[Mapping[str, Any]], *, is_routed: bool = False) -> dict[str, Any]:
    """Return one status for several engines': each number joined, None where nobody tells it.

    `is_routed`: somebody sends each request to the engine that suits it. Then the whole enforces where one engine does;
    else only where all do, and `reason` is that of one which does not. `device` is there where one of them is emulated.
    """
    whole: dict[str, Any] = {}
    for field in FIELDS:
        values = [one[field.key] for one in every if one.get(field.key) is not None]
        join = field.chosen or field.join if is_routed else field.join
        is_known = len(values) == len(every) if field.needs_all else True
        whole[field.key] = join(values) if values and is_known else None
    enforcing = [one for one in every if one.get("effective_mode") == "enforce"]
    held_back = [one for one in every if one.get("effective_mode") != "enforce"]
    speakers = enforcing or held_back if is_routed else held_back or enforcing
    speaker: Mapping[str, Any] = speakers[0] if speakers else {}
    emulated = [one["device"] for one in every if one.get("device")]
    said = {"effective_mode": speaker.get("effective_mode"), "reason": speaker.get("reason")}
    return {**whole, **said, **({"device": emulated[0]} if emulated else {})}
