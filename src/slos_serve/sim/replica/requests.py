"""What the simulator knows of a request beside what the planner may see, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slos_serve.core.slo.deadlines import Grade, StreamGrader, due_s, outcome
from slos_serve.core.slo.summary import GradedRequest
from slos_serve.core.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    """A request with the truth that no planner sees. Token counts.

    `num_thinking_tokens` are the first of `num_output_tokens`. `num_cached_tokens`: prefix the cache
    could hold; with a `session_id` it must still be there. `session_id` "" keeps nothing for later. `transit_s`:
    seconds from arrival until the engine has it.
    """

    request: Request
    num_output_tokens: int
    num_thinking_tokens: int = 0
    num_cached_tokens: int = 0
    session_id: str = ""
    transit_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_output_tokens <= self.request.max_output_tokens:
            limit = self.request.max_output_tokens
            raise ValueError(f"SimRequest.num_output_tokens = {self.num_output_tokens}: expected 1 to {limit}")
        if not 0 <= self.num_thinking_tokens <= self.num_output_tokens:
            raise ValueError(f"SimRequest.num_thinking_tokens = {self.num_thinking_tokens}: expected within the output")
        if not 0 <= self.num_cached_tokens <= self.request.num_prompt_tokens:
            raise ValueError(f"SimRequest.num_cached_tokens = {self.num_cached_tokens}: expected within the prompt")


class Record:
    """One live request: its truth, its grader, and when it was promised (`inf` if it was not)."""

    __slots__ = ("grader", "promised_s", "sim")

    def __init__(self, sim: SimRequest) -> None:
        request = sim.request
        self.sim = sim
        self.grader = StreamGrader(request.arrival_s, request.slo, request.thinks)
        self.promised_s = math.inf

    def feed(self, now_s: float, num_output_tokens: int) -> None:
        """Tell the grader that `num_output_tokens` are out now."""
        thinking, before = self.sim.num_thinking_tokens, self.grader.num_output_tokens
        new_thinking = min(num_output_tokens, thinking) - min(before, thinking)
        self.grader.feed(now_s, num_output_tokens - before, new_thinking)

    @property
    def promised(self) -> bool:
        """Tell whether a promise was given before the first token."""
        return self.promised_s < self.grader.first_token_s

    def finish(self, now_s: float, *, makes_promises: bool) -> GradedRequest:
        """Grade the request that ran to its end at `now_s`."""
        return self._graded(self.grader.finish(now_s), now_s, makes_promises=makes_promises)

    def fail(self, *, rejected: bool = False) -> GradedRequest:
        """Grade a request that did not run to its end: it could not, its replica died, or it was turned away."""
        request = self.sim.request
        return GradedRequest(
            slo_class=request.slo_class,
            outcome=outcome(None, has_slo=not request.slo.is_empty, promised=self.promised, rejected=rejected),
            promised=self.promised,
            arrival_s=request.arrival_s,
            num_prompt_tokens=request.num_prompt_tokens,
        )

    def _graded(self, grade: Grade, finish_s: float, *, makes_promises: bool) -> GradedRequest:
        request = self.sim.request
        slo = request.slo
        first_s = self.grader.first_token_s if self.grader.num_output_tokens else request.arrival_s
        last_due_s = due_s(self.sim.num_output_tokens, request.arrival_s, first_s, slo, self.sim.num_thinking_tokens)
        if slo.e2e_s is not None:
            last_due_s = min(last_due_s, request.arrival_s + slo.e2e_s)
        return GradedRequest(
            slo_class=request.slo_class,
            outcome=outcome(grade, has_slo=not slo.is_empty, promised=self.promised or not makes_promises),
            promised=self.promised,
            met_mean_tpot=grade.met_mean_tpot,
            met_window=grade.met_window,
            ttft_s=grade.ttft_s if math.isfinite(grade.ttft_s) else None,
            tpot_s=grade.tpot_s if grade.num_output_tokens > 1 else None,
            arrival_s=request.arrival_s,
            finish_s=finish_s,
            last_due_s=last_due_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=self.grader.num_output_tokens,
            promise_lead_s=request.arrival_s + slo.ttft_s - self.promised_s if self.promised and slo.ttft_s else None,
        )
