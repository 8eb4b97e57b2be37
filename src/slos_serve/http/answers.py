"""What an answer says of its request in its headers, in its body and on the page about it: all from one record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slos_serve.config import PROMISES
from slos_serve.core.words import Outcome, Said
from slos_serve.http.records import Record

PROMISED = frozenset({Said.PROMISED, Said.PROMOTED})
SIMPLE_HEADERS = {"x-slo-verdict": "verdict", "x-slo-reason": "reason", "x-slo-class": "class", "x-slo-id": "id"}
EXPOSED_HEADERS = (
    *SIMPLE_HEADERS,
    *("x-slo-predicted-ttft-ms", "x-slo-hops", "x-slo-first-token-deadline-s", "x-slo-last-token-deadline-s"),
    *("x-slo-" + key.replace("_", "-") for key in PROMISES),
    "retry-after",
)


def told(record: Record) -> dict[str, Any]:
    """Return a record with what follows from it: `promise` (or `asked`) in milliseconds, `deadlines` as Unix times."""
    asked = record.get("asked") or {}
    if record["verdict"] not in PROMISED or not asked:
        return record
    arrival_s = record.get("arrival_s")
    due = {"first_token_s": asked.get("ttft_ms"), "last_token_s": asked.get("e2e_ms")}
    deadlines = (
        {} if arrival_s is None else {key: round(arrival_s + ms / 1000, 3) for key, ms in due.items() if ms is not None}
    )
    rest = {key: value for key, value in record.items() if key != "asked"}
    return {**rest, "promise": asked, **({"deadlines": deadlines} if deadlines else {})}


def annotation(record: Record, *, tier: str | None, has_tier: bool = True) -> dict[str, Any]:
    """Return the members that a body gets: `slo`, and where it has one the service tier that was used."""
    record = told(record)
    keys = ["id", "class", "verdict", "reason", "promise", "asked", "deadlines", "predicted_ttft_ms", "hops"]
    if record["verdict"] in PROMISED:
        keys.append("slack_ms")
    if record.get("outcome") not in {None, Outcome.NONE}:
        keys.append("outcome")
    slo = {key: record[key] for key in keys if _is_known(record.get(key))}
    measured = {key: record[key] for key in ("ttft_ms", "tpot_ms") if _is_known(record.get(key))}
    if measured:
        slo["measured"] = measured
    extra: dict[str, Any] = {"slo": slo}
    if has_tier and record["verdict"] == Said.BEST_EFFORT:
        extra["service_tier"] = "flex"
    elif has_tier and record["verdict"] != Said.PENDING:
        extra["service_tier"] = "priority" if tier == "priority" else "default"
    return extra


def headers(record: Record) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer."""
    record = told(record)
    said: dict[str, Any] = {header: record.get(key) for header, key in SIMPLE_HEADERS.items()}
    said["x-slo-predicted-ttft-ms"] = _whole(record.get("predicted_ttft_ms"))
    said["x-slo-hops"] = record.get("hops")
    for key, value in record.get("promise", {}).items():
        said["x-slo-" + key.replace("_", "-")] = f"{value:g}"
    for key, value in record.get("deadlines", {}).items():
        said[f"x-slo-{key.removesuffix('_s').replace('_', '-')}-deadline-s"] = f"{value:.3f}"
    return [(name.encode(), str(value).encode()) for name, value in said.items() if value not in {None, ""}]


def finite(value: Any) -> Any:
    """Return JSON values with null for what JSON cannot say: infinite and undefined numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_known(value: object) -> bool:
    return value is not None and value != {} and not (isinstance(value, float) and not math.isfinite(value))


def _whole(number: float | None) -> int | None:
    return None if number is None or not math.isfinite(number) else round(number)
