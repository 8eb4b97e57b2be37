"""One JSON question to a server that runs, proxies left aside; for the commands that need no more of a client."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from slos_serve.errors import SlosServeError

TIMEOUT_S = 300.0


class NotFoundError(SlosServeError):
    """Say that the server has nothing at that address."""


def get_json(url: str, api_key: str | None = None, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """GET a JSON object, or POST `body` for one; `SlosServeError` in one line where there is none."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {**headers, "content-type": "application/json"})  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            document = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.NOT_FOUND:
            raise NotFoundError(f"{url}: not found") from None
        raise SlosServeError(f"{url} answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SlosServeError(f"{url} does not answer ({reason}): is the server up?") from None
    if not isinstance(document, dict):
        raise SlosServeError(f"{url} does not answer like a server of slos-serve")
    return document
