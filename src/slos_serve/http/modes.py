"""`/v1/slo/mode`: what an operator may ask of the mode, checked, and what the engines said to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeGuard

from starlette.responses import Response

from slos_serve.config import SloConfig
from slos_serve.errors import ConfigError
from slos_serve.http import replies
from slos_serve.http.hub import Hub
from slos_serve.http.identity import Caller, RequestError

Control = Callable[[dict[str, Any]], Mapping[str, Any]]
MODES = ("observe", "enforce")
KEYS = ("mode", "class")
MAX_ENGINES = 64


def read_mode(body: bytes, config: SloConfig) -> dict[str, str | None]:
    """Return the order for the engine; `RequestError` names what is wrong with it.

    `mode` alone is for the whole engine; with a `class` it is for that class, and null means "as the engine".
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise RequestError(
            param="body", value=body[:40].decode("latin-1"), expected='a JSON object such as {"mode": "observe"}'
        )
    for key, value in document.items():
        if key not in KEYS:
            raise RequestError(param=key[:64], value=value, expected=f"one of the keys {', '.join(KEYS)}")
    slo_class, mode = document.get("class"), document.get("mode")
    if mode not in MODES and not (mode is None and "mode" in document and slo_class is not None):
        raise RequestError(
            param="mode", value=mode, expected=f"one of {', '.join(MODES)} (null for a class: as the engine)"
        )
    if slo_class is not None:
        try:
            config.check_promising(slo_class)
        except ConfigError as error:
            raise RequestError(param="class", value=slo_class, expected=error.expected) from error
    return {"mode": mode, "class": slo_class}


def refusal(hub: Hub, caller: Caller, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
    """Return why a caller may not switch, None where it may.

    An operator's API key says who may; without one it is whoever is on this machine. A form that some page makes a
    browser post is nobody's order, so JSON alone is taken, which browsers ask permission for.
    """
    if hub.config.pages == "off":
        return replies.error(HTTPStatus.NOT_FOUND, "Not Found")
    if not hub.operator.identities.may_operate(caller):
        message = "the mode is switched with the API key of an admin (api_keys: NAME: {key: ..., admin: true})"
        if not hub.operator.identities.has_admin:
            message += "; while there is none, from this machine alone, not through a browser or a proxy"
        return replies.error(HTTPStatus.FORBIDDEN, message)
    kind = dict(headers).get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        return replies.error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body has to be application/json")
    return None


async def switch(hub: Hub, body: bytes) -> Response:
    """Answer a POST: 200 once every engine has taken the order up, 400 for a bad one, 503 where one is silent.

    Where one does not take it up, those that did are asked to go back to what was before.
    """
    try:
        order = read_mode(body, hub.config)
    except RequestError as problem:
        return replies.bad_request(problem)
    if not hub.controls:
        return replies.error(HTTPStatus.SERVICE_UNAVAILABLE, "no engine that plans is behind this server")
    way_back = _way_back(hub)
    answers = await _ask(hub.controls, order)
    switched = [control for control, one in zip(hub.controls, answers, strict=True) if _is_taken(one)]
    if len(switched) < len(answers):
        for step in way_back if switched else ():
            await _ask(switched, step)
        return _failure(
            answers, "" if not switched or way_back else f" ({len(switched)} of {len(answers)} engines have switched)"
        )
    return replies.Json({"object": "slo.mode", **replies.mode(next(filter(_is_taken, answers)))})


def _way_back(hub: Hub) -> list[dict[str, str | None]]:
    """Return the orders that lead back to what holds now, as the engines last said; none where nobody has."""
    now = hub.snapshot or {}
    if now.get("mode") not in MODES:
        return []
    classes = now.get("class_modes") or {}
    return [{"mode": now["mode"], "class": None}, *({"mode": mode, "class": name} for name, mode in classes.items())]


async def _ask(controls: Sequence[Control], order: dict[str, str | None]) -> list[Mapping[str, Any] | BaseException]:
    """Give an order to engines, all at once, on threads of their own, so that a silent one holds up nobody else."""
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(min(MAX_ENGINES, len(controls)), thread_name_prefix="slos-serve-mode")
    try:
        asked = [loop.run_in_executor(threads, control, order) for control in controls]
        return await asyncio.gather(*asked, return_exceptions=True)
    finally:
        threads.shutdown(wait=False)


def _is_taken(answer: Mapping[str, Any] | BaseException) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(answer, Mapping) and "error" not in answer


def _failure(answers: Sequence[Mapping[str, Any] | BaseException], left: str) -> Response:
    """Return what the engines said that did not take an order up; raises what is a fault of ours."""
    failed = [one for one in answers if not _is_taken(one)]
    for one in failed:
        if isinstance(one, BaseException) and not isinstance(one, TimeoutError):
            raise one
    is_silent = any(isinstance(one, BaseException) for one in failed)
    said = str(failed[0]) if isinstance(failed[0], BaseException) else str(failed[0]["error"])
    return replies.error(HTTPStatus.SERVICE_UNAVAILABLE if is_silent else HTTPStatus.BAD_REQUEST, said + left)
