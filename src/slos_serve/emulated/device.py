"""The device's clock: a queue of one, and what disturbs it. Pure: time is an argument.

A batch starts when it is handed over or when the one before it ends, whichever is later, so two batches in flight
overlap with the host as they do on a GPU. Seconds on one clock throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slos_serve.core.perf import PerfModel
from slos_serve.emulated.emulation import Switches


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one batch computes, in the performance model's terms (see `core.perf`)."""

    num_tokens: int
    num_requests: int
    context_tokens: int = 0
    draft_steps: int = 0
    attention_pairs: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """When one batch was handed over, started and ended."""

    handed_s: float
    start_s: float
    end_s: float


class Device:
    """Run batches one after the other, each as long as the performance model and the switches say."""

    def __init__(self, perf_model: PerfModel, switches: Switches, *, now_s: float) -> None:
        self._model = perf_model
        self._switches = switches
        self._random = np.random.default_rng(switches.seed)
        self._began_s = now_s
        self._free_s = now_s
        self._num_stalls = 0

    def submit(self, batch: Batch, now_s: float) -> Run:
        """Take a batch handed over now; return when it starts and ends."""
        start_s = max(now_s, self._free_s)
        self._free_s = start_s + self.seconds(batch, start_s)
        return Run(handed_s=now_s, start_s=start_s, end_s=self._free_s)

    def seconds(self, batch: Batch, start_s: float) -> float:
        """Return how long a batch that starts then takes; draws noise, and takes a stall that is due."""
        seconds = self._switches.slower * self._model.seconds(
            batch.num_tokens,
            batch.num_requests,
            context_tokens=batch.context_tokens,
            draft_steps=batch.draft_steps,
            attention_pairs=batch.attention_pairs,
        )
        noise = self._switches.noise
        if noise:  # a median of one, so that the file stays what a step usually takes
            seconds *= math.exp(noise * self._random.standard_normal())
        since_s = start_s - self._began_s
        return seconds * self._slowness(since_s) + self._stall(since_s)

    def _slowness(self, since_s: float) -> float:
        if not self._switches.slow:
            return 1.0
        every_s, for_s, times = self._switches.slow
        into_s = since_s % every_s
        return times if since_s >= every_s and into_s < for_s else 1.0

    def _stall(self, since_s: float) -> float:
        if not self._switches.stall:
            return 0.0
        every_s, for_s = self._switches.stall
        due = int(since_s / every_s)
        missed, self._num_stalls = due - self._num_stalls, max(due, self._num_stalls)
        return for_s if missed > 0 else 0.0
