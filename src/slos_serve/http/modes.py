"""`/v1/slo/mode`: what an operator may ask of the mode, checked, and what the engines said to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from slos_serve.config import SloConfig
from slos_serve.errors import ConfigError
from slos_serve.http import replies
from slos_serve.http.hub import Hub
from slos_serve.http.slo import RequestError

MODES = ("observe", "enforce")
KEYS = ("mode", "class")
SAID = ("mode", "class_modes", "effective_mode", "reason")


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


async def switch(hub: Hub, body: bytes) -> Response:
    """Answer a POST: 200 once every engine has taken the order up, 400 for a bad one, 503 where one is silent."""
    try:
        order = read_mode(body, hub.config)
    except RequestError as problem:
        return replies.bad_request(problem)
    if not hub.controls:
        return replies.error(HTTPStatus.SERVICE_UNAVAILABLE, "no engine that plans is behind this server")
    said: Mapping[str, Any] = {}
    for control in hub.controls:
        try:
            said = await asyncio.to_thread(control, order)
        except TimeoutError as error:
            return replies.error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        if "error" in said:
            return replies.error(HTTPStatus.BAD_REQUEST, str(said["error"]))
    return JSONResponse({"object": "slo.mode", **{key: said.get(key) for key in SAID}})


def show(hub: Hub) -> Response:
    """Answer a GET from the last snapshot."""
    snapshot = hub.snapshot or {}
    return JSONResponse({"object": "slo.mode", **{key: snapshot.get(key) for key in SAID}})
