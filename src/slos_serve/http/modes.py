"""`/v1/slo/mode`: what an operator may ask of the mode, checked, and what the engines said to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from slos_serve.config import SloConfig
from slos_serve.errors import ConfigError
from slos_serve.http import replies
from slos_serve.http.hub import Hub
from slos_serve.http.identity import Caller, RequestError

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

    All engines are asked at once, on threads of their own, so that a silent one holds up nobody else.
    """
    try:
        order = read_mode(body, hub.config)
    except RequestError as problem:
        return replies.bad_request(problem)
    if not hub.controls:
        return replies.error(HTTPStatus.SERVICE_UNAVAILABLE, "no engine that plans is behind this server")
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(min(MAX_ENGINES, len(hub.controls)), thread_name_prefix="slos-serve-mode")
    try:
        asked = [loop.run_in_executor(threads, control, order) for control in hub.controls]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        threads.shutdown(wait=False)
    return _answer(answers)


def _answer(answers: list[Mapping[str, Any] | BaseException]) -> Response:
    taken = [one for one in answers if isinstance(one, Mapping) and "error" not in one]
    for one in answers:
        if isinstance(one, BaseException) and not isinstance(one, TimeoutError):
            raise one
    said = [str(one) if isinstance(one, BaseException) else str(one["error"]) for one in answers if one not in taken]
    if not said:
        return replies.Json({"object": "slo.mode", **replies.mode(taken[-1])})
    status = (
        HTTPStatus.SERVICE_UNAVAILABLE
        if any(isinstance(one, BaseException) for one in answers)
        else (HTTPStatus.BAD_REQUEST)
    )
    done = f" ({len(taken)} of {len(answers)} engines have switched)" if taken else ""
    return replies.error(status, said[0] + done)
