"""How live requests and steps went on, as pictures of them need it: coarse, bounded, off the path of every token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.engine.live import Live
    from slos_serve.vllm_plugin.pipeline import InFlight

MAX_POINTS = 48
SPARE = 64


class TokenTimes:
    """How many tokens each live request had at what time, looked at whenever a snapshot is taken."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[float, int]]] = {}

    def note(self, live: Iterable[Live], now_s: float) -> None:
        """Look at the live requests; of one that lasts long every second point is kept, then every fourth, ..."""
        live = list(live)
        if len(self._points) > len(live) + SPARE:  # of some the end was never told
            self._points = {one.request_id: self._points.get(one.request_id, []) for one in live}
        for one in live:
            if one.grader is None or not one.has_begun:
                continue
            count = one.request.num_output_tokens
            points = self._points.setdefault(one.request_id, [])
            if not points or points[-1][1] != count:
                points.append((round((now_s - one.arrival_s) * 1e3, 1), count))
            if len(points) > MAX_POINTS:
                del points[1::2]

    def take(self, live: Live) -> list[tuple[float, int]]:
        """Return the points of a request that ends, in ms after its arrival, and forget them."""
        return self._points.pop(live.request_id, [])


def step_row(entry: InFlight, seconds: float) -> tuple[Any, ...]:
    """Return a step as the channel carries it: see `http.history.Step`."""
    shape, drafts = entry.shape, entry.output.scheduled_spec_decode_tokens
    return (
        round(seconds, 6),
        None if entry.predicted_s is None else round(entry.predicted_s, 6),
        None if entry.planned_s is None else round(entry.planned_s, 6),
        shape.num_tokens,
        shape.num_prompt_tokens,
        sum(map(len, drafts.values())) if drafts else 0,
        shape.num_requests,
    )
