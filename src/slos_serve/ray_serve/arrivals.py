"""What the router is told of a request: its promises as deadlines, and guesses of its two lengths.

Only the engine knows how long a text is in tokens and what its promises come to. The router needs a good
guess: promises are resolved as the engine resolves them, prompts of text are measured in characters per
token and outputs by class, both learnt from requests that have ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from slos_serve.config import BEST_EFFORT, OVERRIDES, SloConfig
from slos_serve.core.lengths import LengthModel
from slos_serve.core.perf import PerfModel
from slos_serve.core.routing.routers import Arrival
from slos_serve.core.types import Request, Slo
from slos_serve.ray_serve.fleet import Fleet

CHARS_PER_TOKEN = 4.0
LEARNING_RATE = 0.05
DEFAULT_OUTPUT_TOKENS = 1024
MAX_OUTPUT_TOKENS = 1 << 31  # no context is longer
TOKENS_PER_MESSAGE = 4


class Estimator:
    """Turn requests into `Arrival`s and learn from how they ended. `profile` is the pinned profile document."""

    def __init__(self, config: SloConfig, profile: Mapping[str, Any] | None = None) -> None:
        self._config = config
        hints = {name: one.output_tokens_hint for name, one in config.classes.items()}
        self._lengths = LengthModel({name: float(hint) for name, hint in hints.items() if hint})
        self._chars_per_token = CHARS_PER_TOKEN
        self._reference: Callable[[int], float] | None = None
        if profile:
            model, budget = PerfModel.from_json(profile["perf_model"]), profile.get("max_num_batched_tokens")
            if budget:
                self._reference = lambda tokens: model.prefill_seconds(tokens, int(budget))

    def arrival(
        self, body: Any, fleet: Fleet, *, request_id: str, slo_class: str = BEST_EFFORT, session_id: str = ""
    ) -> Arrival:
        """Return the request as the router sees it; without promises where they cannot be resolved."""
        asked = getattr(body, "vllm_xargs", None) or {}
        tokens = self.prompt_tokens(body)
        hidden = asked.get("hidden_max_tokens")
        limit = hidden if isinstance(hidden, int) and 0 < hidden < MAX_OUTPUT_TOKENS else None
        limit = limit or getattr(body, "max_completion_tokens", None) or getattr(body, "max_tokens", None)
        limit = limit or DEFAULT_OUTPUT_TOKENS
        slo, weight, thinks = self._promises(asked, tokens, fleet)
        arrived_s = asked.get("slo_arrival_s")
        request = Request(
            request_id=request_id,
            arrival_s=float(arrived_s) if isinstance(arrived_s, int | float) else time.time(),
            num_prompt_tokens=tokens,
            max_output_tokens=max(1, int(limit)),
            slo=slo,
            slo_class=slo_class,
            weight=weight,
            thinks=thinks,
        )
        predicted = self._lengths.predict(slo_class, tokens, request.max_output_tokens)
        return Arrival.of(request, predicted_output_tokens=predicted, session_id=session_id)

    def prompt_tokens(self, body: Any) -> int:
        """Return the prompt's length: exact for token ids, a guess for text."""
        ids, chars, num_messages = _size(body)
        return max(1, ids + round(chars / self._chars_per_token) + TOKENS_PER_MESSAGE * num_messages)

    def learn(self, body: Any, record: Mapping[str, Any]) -> None:
        """Take a request's real lengths, from the record of one that has ended."""
        prompt, output = record.get("num_prompt_tokens"), record.get("num_output_tokens")
        if not prompt or not output or record.get("outcome") in {"failed", "cancelled"}:
            return
        self._lengths.observe(str(record.get("class") or BEST_EFFORT), int(prompt), int(output))
        ids, chars, num_messages = _size(body)
        text_tokens = prompt - ids - TOKENS_PER_MESSAGE * num_messages
        if chars and text_tokens > 0:
            found = min(max(chars / text_tokens, 0.5), 16.0)
            self._chars_per_token += LEARNING_RATE * (found - self._chars_per_token)

    def _promises(self, asked: Mapping[str, Any], tokens: int, fleet: Fleet) -> tuple[Slo, float, bool]:
        name = asked.get("slo_class")
        overrides = {key: asked["slo_" + key] for key in (*OVERRIDES, "stage") if asked.get("slo_" + key) is not None}
        if name is None and not overrides:
            return Slo(), 1.0, False
        try:
            return self._config.resolve(name, overrides, tokens, self._reference or partial(_reference_s, fleet))
        except (ValueError, KeyError, TypeError):
            return Slo(), 1.0, False  # the engine says what is wrong with it


def _reference_s(fleet: Fleet, tokens: int) -> float:
    """Return the prefill time of any replica; raises `ValueError` where none has told its model."""
    for report in fleet.reports().values():
        if report.snapshot is not None:
            return report.snapshot.perf_model.prefill_seconds(tokens, report.snapshot.limits.max_num_batched_tokens)
    raise ValueError("no performance model is known yet")


def _size(body: Any) -> tuple[int, int, int]:
    """Return (token ids, characters, messages) of a request's prompts."""
    messages = getattr(body, "messages", None)
    if messages is not None:
        tools = getattr(body, "tools", None) or ()
        return 0, sum(map(_chars, messages)) + sum(len(json.dumps(one, default=str)) for one in tools), len(messages)
    prompt = getattr(body, "prompt", None)
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt or ""]
    ids = sum(len(one) for one in prompts if isinstance(one, list))
    return ids, sum(len(one) for one in prompts if isinstance(one, str)), 0


def _chars(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else getattr(message, "content", None)
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    return sum(len(part["text"]) for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
