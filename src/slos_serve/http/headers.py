"""Raw headers of ASGI messages: read, put together, and shown to pages of other sites."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Message, Scope, Send

from slos_serve.http import answers

OWN_HEADERS = frozenset({b"content-type", b"content-length", b"content-encoding", b"transfer-encoding"})
EXPOSED = ", ".join(answers.EXPOSED_HEADERS).encode()

RawHeaders = Iterable[tuple[bytes, bytes]]


def peer(scope: Scope) -> str | None:
    """Return the address of the client, None where the server does not know it."""
    client = scope.get("client")
    return client[0] if client else None


def is_json(start: Message) -> bool:
    """Tell whether a response's start announces JSON."""
    kind: bytes = dict(start["headers"]).get(b"content-type", b"")
    return kind.startswith(b"application/json")


def without_length(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """Return headers but for the length of their body."""
    return [header for header in headers if header[0] != b"content-length"]


def length_header(body: bytes) -> tuple[bytes, bytes]:
    """Return the header that says how long a body is."""
    return b"content-length", str(len(body)).encode()


def exposed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Let pages of other sites, which the server inside lets read its answers, read our headers too."""
    if not any(name == b"access-control-allow-origin" for name, _ in headers):
        return headers
    before = [value for name, value in headers if name == b"access-control-expose-headers"]
    others = [header for header in headers if header[0] != b"access-control-expose-headers"]
    return [*others, (b"access-control-expose-headers", b", ".join([*before, EXPOSED]))]


def dress(response: Response, headers: RawHeaders) -> None:
    """Put the headers of the server inside, but for those about its own body, on a response of ours."""
    ours = {name for name, _ in response.raw_headers}
    kept = [header for header in headers if header[0] not in OWN_HEADERS and header[0] not in ours]
    response.raw_headers = exposed([*response.raw_headers, *kept])


def bodiless(send: Send) -> Send:
    """Return a `send` that leaves bodies out, as answers to HEAD do."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_headers
