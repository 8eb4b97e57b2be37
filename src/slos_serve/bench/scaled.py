"""A published workload at the size of the engine at hand: lengths, promises, budgets and rates from its profile.

The demo's engine is a small model on one CPU core. What makes SLOs hard is kept the same as on a GPU:

- *Promises.* One unloaded decode step of a 7B model on an A100 takes 12.5 ms, so that 50 and 100 ms per
  token are 4 and 8 steps. Here they are 4 and 8 of this engine's own steps; the floor and the allowance of
  TTFT are stretched by the same factor, and its slowdowns (3x, 5x of the unloaded prefill) stay.
- *Lengths* follow the medians of Azure's 2023 conversation and code traces and of arXiv summarization: prompts a
  sixteenth, outputs a third or a quarter (code's are short already), so that half a minute holds many requests.
- *Arrivals* come in bursts: gamma gaps whose standard deviation is twice their mean (Poisson: once).
- *Rates* are shares of what the engine could serve if every step were full and as long as the tightest promise
  allows (`service_capacity_rps`), which the profile alone decides.

On an emulated device (`slos_serve.emulated`) nothing is scaled: published lengths, the classes as they are shipped.

Everything here is fixed before any system is measured under load, and is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slos_serve.bench.client import BenchRequest
from slos_serve.bench.workload import Lengths, build_requests, synthetic_trace
from slos_serve.config import SloClass, SloConfig, default_classes
from slos_serve.emulated.emulation import notice
from slos_serve.records.profile import Profile

GPU_DECODE_STEP_S = 0.0125  # 7B, A100-80G, one request: the engine on which 50 and 100 ms are tight and loose
MIX = {"chat": 0.5, "coding": 0.3, "summarization": 0.2}
LENGTHS = {
    "chat": Lengths(
        prompt_median=64, prompt_sigma=0.8, prompt_range=(8, 256),
        output_median=43, output_sigma=0.8, output_range=(4, 160), max_tokens=256,
    ),
    "coding": Lengths(
        prompt_median=92, prompt_sigma=0.8, prompt_range=(16, 400),
        output_median=16, output_sigma=0.8, output_range=(4, 80), max_tokens=256,
    ),
    "summarization": Lengths(
        prompt_median=171, prompt_sigma=0.5, prompt_range=(50, 400),
        output_median=42, output_sigma=0.6, output_range=(8, 128), max_tokens=256,
    ),
}  # fmt: skip
# As published, up to what every hardware file's context holds.
FULL_PROMPT, FULL_OUTPUT, LONGEST_PROMPT = 16, {"chat": 3, "coding": 1, "summarization": 4}, 3000
FULL_LENGTHS = {
    name: replace(
        one,
        prompt_median=one.prompt_median * FULL_PROMPT,
        prompt_range=(one.prompt_range[0] * FULL_PROMPT, min(LONGEST_PROMPT, one.prompt_range[1] * FULL_PROMPT)),
        output_median=one.output_median * FULL_OUTPUT[name],
        output_range=(one.output_range[0], one.output_range[1] * FULL_OUTPUT[name]),
        max_tokens=4 * one.max_tokens,
    )
    for name, one in LENGTHS.items()
}
ARRIVALS = "gamma:2"
TIGHTEST_STEPS, LOOSEST_STEPS = 4, 8
VLLM_DEFAULT_BUDGET = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A workload fitted to one profile: the classes of `mix` with the lengths of each."""

    profile: Profile
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)
    lengths: Mapping[str, Lengths] = field(default_factory=lambda: LENGTHS)
    is_full_size: bool = False

    @property
    def factor(self) -> float:
        """How much longer promises are: as a decode step here on the GPU that the classes are written for; full: 1."""
        return 1.0 if self.is_full_size else self.profile.decode_step_s / GPU_DECODE_STEP_S

    @property
    def config(self) -> SloConfig:
        """The shipped classes of the mix with their milliseconds stretched."""
        shipped = default_classes()
        classes = {name: self._stretched(shipped[name]) for name in self.mix} | {"best-effort": shipped["best-effort"]}
        base = SloConfig()
        return SloConfig(
            classes=classes,
            ttft_floor_ms=base.ttft_floor_ms * self.factor,
            ttft_allowance_ms=base.ttft_allowance_ms * self.factor,
        )

    def _stretched(self, slo_class: SloClass) -> SloClass:
        names = ("tpot_ms", "final_tpot_ms", "thinking_tpot_ms")
        given = {name: getattr(slo_class, name) for name in names}
        return replace(slo_class, **{name: ms * self.factor for name, ms in given.items() if ms is not None})

    @property
    def tightest_tpot_s(self) -> float:
        """The tightest promise per token, in seconds."""
        return TIGHTEST_STEPS * GPU_DECODE_STEP_S * self.factor

    @property
    def budgets(self) -> tuple[int, int, int]:
        """Token budgets for stock vLLM: its default, and those whose full step takes the loosest and tightest TPOT."""
        loosest = LOOSEST_STEPS * GPU_DECODE_STEP_S * self.factor
        fitted = (max(32, self.profile.largest_chunk_tokens(tpot)) for tpot in (loosest, self.tightest_tpot_s))
        middle, small = (round(tokens / 16) * 16 for tokens in fitted)
        return VLLM_DEFAULT_BUDGET, middle, small

    @property
    def service_capacity_rps(self) -> float:
        """Requests per second if every step were full and as long as the tightest promise allows."""
        model, step_s = self.profile.perf_model, self.tightest_tpot_s
        num_decodes = 8
        base = model.seconds(num_decodes, num_decodes, context_tokens=num_decodes * 256)
        chunk = self.profile.largest_chunk_tokens(step_s, num_decodes=num_decodes)
        prefill_token_s = max(step_s - base, 1e-9) / max(chunk, 1)
        decode_token_s = (base - model.seconds(1, 1, context_tokens=256)) / (num_decodes - 1)
        work_s = 0.0
        for name, share in self.mix.items():
            prompt, output = self.lengths[name].mean_tokens()
            work_s += share * (prompt * prefill_token_s + output * decode_token_s)
        fixed_share = (base - num_decodes * decode_token_s) / step_s
        return max(0.0, 1 - fixed_share) / work_s

    def requests(self, *, rate_rps: float, duration_s: float, seed: int) -> list[BenchRequest]:
        """Return the requests of one run; the same for every system."""
        rng = np.random.default_rng(seed)
        trace = synthetic_trace(
            self.lengths, self.mix, process=ARRIVALS, rate_rps=rate_rps, duration_s=duration_s, rng=rng
        )
        limits = {name: lengths.max_tokens for name, lengths in self.lengths.items()}
        return build_requests(
            trace, config=self.config, reference=self.profile.reference_s, rng=rng, limits=limits, id_prefix=f"s{seed}-"
        )

    def describe(self) -> dict[str, Any]:
        """Return the facts of the workload for a report."""
        return {
            "arrivals": ARRIVALS,
            "mix": dict(self.mix),
            "mean_tokens": {
                name: [round(x, 1) for x in lengths.mean_tokens()] for name, lengths in self.lengths.items()
            },
            "decode_step_s": self.profile.decode_step_s,
            "gpu_decode_step_s": GPU_DECODE_STEP_S,
            "slo_stretch": self.factor,
            "classes": _described(self.config),
            "ttft_floor_ms": self.config.ttft_floor_ms,
            "ttft_allowance_ms": self.config.ttft_allowance_ms,
            "service_capacity_rps": self.service_capacity_rps,
        }


def fitted(profile: Profile) -> Scaled:
    """Return the workload for a profile: at the size of a small engine, or as published on an emulated device."""
    if not notice(profile.document.get("key")):
        return Scaled(profile=profile)
    return Scaled(profile=profile, lengths=FULL_LENGTHS, is_full_size=True)


def _described(config: SloConfig) -> Mapping[str, Any]:
    return {name: slo_class.to_json() for name, slo_class in config.classes.items() if slo_class.promises}
