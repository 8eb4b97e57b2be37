"""`/v1/slo/requests/ID/explanation`: a request's story, why it was not promised, and the picture of its tokens.

The engine that had the request plans its moment again, which takes it a second; see `vllm_plugin.explaining`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slos_serve.core.story import TROUBLE, state_of, story
from slos_serve.http.answers import told
from slos_serve.http.picture import picture
from slos_serve.http.records import Record

LONGEST_WAIT_S, ASK_EVERY_S = 8.0, 0.25
FOR_OPERATORS = frozenset({"without", "num_at_risk"})  # they tell of other people's requests

Control = Callable[[dict[str, Any]], Mapping[str, Any]]


async def explanation(record: Record, controls: Iterable[Control], *, whole: bool) -> dict[str, Any]:
    """Return the document about a request; `whole`: with what it says of others, for operators."""
    found, note = None, ""
    if state_of(record) in TROUBLE and record.get("request_id"):
        found, note = await _found(list(controls), str(record["request_id"]))
    if found is not None and not whole:
        found = {key: value for key, value in found.items() if key not in FOR_OPERATORS}
    record = told(record)
    return {
        "object": "slo.explanation",
        "state": state_of(record),
        "request": record,
        "explanation": found,
        "note": note,
        "story": story(record, found),
        "picture": picture(record),
    }


async def _found(controls: list[Control], request_id: str) -> tuple[dict[str, Any] | None, str]:
    """Return what an engine found, and why nothing was."""
    until_s = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < until_s:
        answer = await asyncio.to_thread(first_answer, controls, {"explain": request_id})
        found = answer.get("explanation")
        if found is not None and "error" not in found:
            return dict(found), ""
        if not answer.get("pending"):
            return None, str((found or answer).get("error") or "no engine that plans is behind this server")
        await asyncio.sleep(ASK_EVERY_S)
    return None, "the engine is still at it: ask again"


def first_answer(controls: Iterable[Control], order: dict[str, Any]) -> dict[str, Any]:
    """Ask engines one after the other; return the first answer that is no error, else the last error."""
    return first_known(_asked(control, order) for control in controls)


def first_known(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first answer that is no error, else the last one."""
    answer: Mapping[str, Any] = {}
    for answer in answers:
        if "error" not in answer:
            break
    return dict(answer)


def _asked(control: Control, order: dict[str, Any]) -> Mapping[str, Any]:
    try:
        return control(order)
    except (TimeoutError, OSError) as error:
        return {"error": str(error)}
