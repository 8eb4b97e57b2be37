"""Requests to simulate: a trace, or one of the scenarios, with classes, sessions and rounds.

A workload is a list of first arrivals and, for sessions, the round that follows each request: it arrives
when the one before it ended plus a delay (the tool's time), with the conversation so far as a prefix the
cache may still hold. Rounds that are never issued, because a run stopped, are misses.

`history` holds (class, prompt, output) lengths from outside the window, which a deployment would have
seen before: the length model starts from them, never from the window itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.lengths import LengthModel
from slos_serve.core.types import Request
from slos_serve.sim.replica.requests import SimRequest
from slos_serve.traces.rows import TOO_LONG
from slos_serve.traces.trace import first_of

if TYPE_CHECKING:
    from slos_serve.config import SloConfig
    from slos_serve.traces.trace import Trace

History = Sequence[tuple[str, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is offered in one run.

    `duration_s`: length of the offered window. `following[request_id]` is (delay in seconds, next round).
    `num_dropped` requests were longer than the context and are not offered. `hints`: typical output
    tokens by class, where the operator gave any. `left_out`: rows of the trace that are not offered, by reason.
    """

    name: str
    arrivals: Sequence[SimRequest]
    duration_s: float
    following: Mapping[str, tuple[float, SimRequest]] = field(default_factory=dict)
    history: History = ()
    hints: Mapping[str, float] = field(default_factory=dict)
    num_dropped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.arrivals:
            raise ValueError(f"workload {self.name!r}: no requests: expected at least one")
        if not self.duration_s > 0:
            raise ValueError(f"workload {self.name!r}: duration_s = {self.duration_s!r}: expected a positive time")

    @property
    def num_requests(self) -> int:
        """Requests offered, later rounds included."""
        return len(self.arrivals) + len(self.following)

    def num_by_class(self) -> Counter[str]:
        """Return offered requests by class, later rounds included."""
        counts = Counter(sim.request.slo_class for sim in self.arrivals)
        counts.update(sim.request.slo_class for _, sim in self.following.values())
        return counts

    @property
    def rate_rps(self) -> float:
        """Offered requests per second, later rounds included."""
        return self.num_requests / self.duration_s

    def after(self, sim: SimRequest, now_s: float) -> SimRequest | None:
        """Return the round that follows a request that ended now, None after the last."""
        following = self.following.get(sim.request.request_id)
        if following is None:
            return None
        delay_s, round_ = following
        return replace(round_, request=replace(round_.request, arrival_s=now_s + delay_s))

    def length_model(self) -> LengthModel:
        """Return a length model that knows the hints and has seen the history."""
        model = LengthModel(self.hints)
        for slo_class, prompt_tokens, output_tokens in self.history:
            model.observe(slo_class, prompt_tokens, output_tokens)
        return model


class RequestFactory:
    """Build requests of one deployment: its classes, its reference prefill times, its context length."""

    def __init__(self, slo_config: SloConfig, reference_s: Callable[[int], float], max_model_len: int) -> None:
        self._config = slo_config
        self._reference_s = reference_s
        self._max_model_len = max_model_len

    @property
    def hints(self) -> dict[str, float]:
        """Typical output tokens by class, as the operator wrote them."""
        classes = self._config.classes.values()
        return {one.name: float(one.output_tokens_hint) for one in classes if one.output_tokens_hint is not None}

    def build(
        self,
        request_id: str,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        slo_class: str,
        *,
        thinking_tokens: int = 0,
        cached_tokens: int = 0,
        session_id: str = "",
        stage: str = "loop",
    ) -> SimRequest:
        """Return a request whose client allows as many output tokens as fit the context."""
        slo, weight, thinks = self._config.resolve(slo_class, {"stage": stage}, prompt_tokens, self._reference_s)
        return SimRequest(
            request=Request(
                request_id=request_id,
                arrival_s=arrival_s,
                num_prompt_tokens=prompt_tokens,
                max_output_tokens=self._max_model_len - prompt_tokens,
                slo=slo,
                slo_class=slo_class,
                weight=weight,
                thinks=thinks,
            ),
            num_output_tokens=output_tokens,
            num_thinking_tokens=thinking_tokens if thinks else 0,
            num_cached_tokens=min(cached_tokens, prompt_tokens),
            session_id=session_id,
        )


def trace_workload(
    trace: Trace,
    factory: RequestFactory,
    *,
    max_model_len: int,
    default_class: str,
    rate_rps: float | None = None,
    max_requests: int | None = None,
    name: str | None = None,
    history: History = (),
) -> Workload:
    """Offer every row of a trace that fits the context, at its own times or stretched to `rate_rps`.

    A row's `slo_class` counts where the trace has one, else `default_class`. Prefix hits are the trace's.
    `max_requests`: only so many from the start, over the time until the next one. What is too long for the
    context is dropped and counted, with what was left out for that when the trace was read.
    """
    fitting, dropped = trace.limited_to(max_model_len)
    kept = first_of(fitting, max_requests)
    if len(kept) < len(fitting):  # only those before the first that is cut off
        fits = trace.prompt_tokens + trace.output_tokens <= max_model_len
        dropped = int(np.flatnonzero(fits)[len(kept)]) - len(kept)
    if rate_rps is not None:
        kept = kept.at_rate(rate_rps)
    columns = (
        kept.arrived_at_s.tolist(),
        kept.prompt_tokens.tolist(),
        kept.output_tokens.tolist(),
        kept.thinking_tokens.tolist(),
        kept.cached_tokens.tolist(),
        kept.slo_class.tolist(),
    )
    arrivals = [
        factory.build(
            f"r{i}",
            arrived,
            max(1, prompt),
            max(1, output),
            slo_class or default_class,
            thinking_tokens=min(thinking, max(1, output)),
            cached_tokens=cached,
        )
        for i, (arrived, prompt, output, thinking, cached, slo_class) in enumerate(zip(*columns, strict=True))
    ]
    span_s = kept.span_s if kept.span_s > 0 else 1.0
    return Workload(
        name=name or kept.source,
        arrivals=arrivals,
        duration_s=span_s,
        left_out=trace.origin.left_out,
        num_dropped=dropped + trace.origin.left_out.get(TOO_LONG, 0),
        history=history,
        hints=factory.hints,
    )
