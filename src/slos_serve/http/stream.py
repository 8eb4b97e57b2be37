"""Write a few keys into the last message of a response, and touch nothing else of it.

A streamed response is a sequence of server-sent events, `data: {...}` and an empty line each, the last
one `data: [DONE]`. Which event is the last before it shows only when `[DONE]` comes, so events are held
back one by one once every choice has finished, and not before: until then bytes pass as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

END = b"\n\n"
DONE = b"data: [DONE]"
FINISHED = (b'"finish_reason":"', b'"finish_reason": "')

Extra = Callable[[], Mapping[str, Any]]


def write_into(document: bytes, extra: Mapping[str, Any]) -> bytes:
    """Return a JSON object with `extra` keys set; anything else comes back as it was."""
    try:
        values = json.loads(document)
    except ValueError:
        return document
    if not isinstance(values, dict):
        return document
    values.update(extra)
    try:
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a token can be
        return json.dumps(values, separators=(",", ":")).encode()


def append_member(document: bytes, key: str, value: Mapping[str, Any]) -> bytes:
    """Append `"key": value` to the text of a non-empty UTF-8 JSON object, leaving every other byte alone.

    The last of two equal keys counts for every JSON reader in use here, so this also replaces.
    """
    body = document.rstrip(b" \t\r\n")
    return b"%s,%s:%s}" % (body[:-1], json.dumps(key).encode(), json.dumps(value).encode())


class StreamTail:
    """Pass a stream through and write `extra()` into its last data event.

    `num_choices` is how many choices finish before the tail begins. `feed` takes bytes however they were
    cut and returns what may go out now; `close` returns the rest.
    """

    def __init__(self, extra: Extra, num_choices: int = 1) -> None:
        self._extra = extra
        self._num_open = num_choices
        self._pending = b""
        self._held = b""
        self._is_foreign = False

    @staticmethod
    def ends_in(data: bytes) -> bool:
        """Tell whether the end of the stream is in these bytes, so that everything has to be known now."""
        return data.startswith(DONE) or b"\n" + DONE in data  # within a text a line's end is escaped

    def feed(self, data: bytes) -> bytes:
        """Take bytes in, give bytes out."""
        if self._is_foreign:
            return data
        if not self._pending and self._num_open > 0 and data.endswith(END) and not _num_finished(data):
            return data
        data = self._pending + data
        end = data.rfind(END)
        if end < 0:
            self._pending = data
            if b"\r\n\r\n" in data:  # not vLLM's way of ending an event: hands off
                self._is_foreign, self._pending = True, b""
                return data
            return b""
        end += len(END)
        self._pending = data[end:]
        return b"".join([self._event(event + END) for event in data[:end].split(END)[:-1]])

    def close(self) -> bytes:
        """End the stream."""
        held, self._held = self._held, b""
        pending, self._pending = self._pending, b""
        return (self._annotated(held) if held else b"") + pending

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event
        held = self._held
        if event.startswith(DONE):
            self._held = b""
            return (self._annotated(held) if held else b"") + event
        if self._num_open > 0:
            self._num_open -= _num_finished(event)
            if self._num_open > 0:
                return event
        self._held = event
        return held

    def _annotated(self, event: bytes) -> bytes:
        return b"data: " + write_into(event[len(b"data:") :].strip(), self._extra()) + END


class EventTail:
    """The same for a stream of named events: `last` is the name of the one that carries the keys.

    They go into the object `inside` of its data ("" for the data itself).
    """

    def __init__(self, extra: Extra, last: str, inside: str = "") -> None:
        self._extra = extra
        self._last = f"event: {last}\n".encode()
        self._inside = inside
        self._pending = b""

    def ends_in(self, data: bytes) -> bool:
        """Tell whether the last event begins in these bytes."""
        return data.startswith(self._last) or b"\n" + self._last in data

    def feed(self, data: bytes) -> bytes:
        """Take bytes in, give bytes out; nothing is held back but the end of an event that was cut."""
        if not self._pending and data.endswith(END) and not self.ends_in(data):
            return data
        data = self._pending + data
        end = data.rfind(END) + len(END) if END in data else 0
        self._pending = data[end:]
        return b"".join([self._event(event + END) for event in data[:end].split(END)[:-1]])

    def close(self) -> bytes:
        """End the stream."""
        pending, self._pending = self._pending, b""
        return pending

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(self._last):
            return event
        name, _, data = event.partition(b"\ndata: ")
        if not self._inside:
            return name + b"\ndata: " + write_into(data.strip(), self._extra()) + END
        try:
            values = json.loads(data)
        except ValueError:
            return event
        inner = values.get(self._inside) if isinstance(values, dict) else None
        if not isinstance(inner, dict):
            return event
        return name + b"\ndata: " + write_into(data, {self._inside: {**inner, **self._extra()}}) + END


def _num_finished(data: bytes) -> int:
    return sum(data.count(pattern) for pattern in FINISHED)
