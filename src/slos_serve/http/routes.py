"""The routes of vLLM's server that generate text, and what of an SLO can be said on each.

What is not listed here passes untouched. It cannot claim anything either: the engine believes only what the edge has
sealed (see `seal`), so a route that a newer vLLM adds serves best-effort until it has a line here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slos_serve.http.stream import EventTail, Extra, StreamTail, append_member, write_into

VLLM_XARGS = ("vllm_xargs",)
MAX_PARTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One route. `place`: where in the body the engine's arguments are, () where a body carries none.

    `last_event`: the event that ends its streams, "" for the `[DONE]` of chat completions; `inside`: the object in it
    that answers are annotated in. `has_tier`: its answers have a `service_tier`.
    """

    place: tuple[str, ...] = VLLM_XARGS
    last_event: str = ""
    inside: str = ""
    has_tier: bool = True

    def arguments(self, body: Mapping[str, Any]) -> Any:
        """Return what a client says to the engine itself; None for nothing."""
        found: Any = body
        for key in self.place:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if self.place else None

    def written(self, raw: bytes, body: Mapping[str, Any], xargs: Mapping[str, Any]) -> bytes:
        """Return the body with these arguments for the engine; every other byte stays where that can be."""
        if self.place == VLLM_XARGS and json.detect_encoding(raw) == "utf-8":
            return append_member(raw, self.place[0], xargs)
        value: Mapping[str, Any] = xargs
        for depth in range(len(self.place) - 1, 0, -1):
            parent: Any = body
            for key in self.place[:depth]:
                parent = parent.get(key) if isinstance(parent, Mapping) else None
            value = {**(parent if isinstance(parent, Mapping) else {}), self.place[depth]: value}
        return write_into(raw, {self.place[0]: value})

    def tail(self, extra: Extra, num_parts: int) -> StreamTail | EventTail:
        """Return what annotates a stream of this route."""
        if self.last_event:
            return EventTail(extra, self.last_event, self.inside)
        return StreamTail(extra, num_parts)


CHAT = Endpoint()
RESPONSES = Endpoint(last_event="response.completed", inside="response")
SILENT = Endpoint(place=())  # nothing of an SLO fits into its body

ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/messages": Endpoint(last_event="message_stop", has_tier=False),
    "/v1/chat/completions/batch": CHAT,
    "/invocations": CHAT,
    "/inference/v1/generate": Endpoint(place=("sampling_params", "extra_args"), has_tier=False),
    "/cohere/v2/chat": SILENT,
    "/v1/audio/transcriptions": SILENT,
    "/v1/audio/translations": SILENT,
}


def num_parts(body: Mapping[str, Any]) -> int:
    """Return how many choices an answer has: `n` of them for every prompt, or conversation of a batch."""
    n = body.get("n")
    if n is None and isinstance(params := body.get("sampling_params"), Mapping):
        n = params.get("n")
    prompt, messages = body.get("prompt"), body.get("messages")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        prompts = len(messages)
    return min(MAX_PARTS, prompts * n if isinstance(n, int) and n > 0 else prompts)
