"""What is offered: a trace or synthetic arrivals, given classes, promises, prompts and limits.

Everything follows from the seed, so that two systems are offered the same requests at the same times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slos_serve.bench.client import BenchRequest, random_prompt
from slos_serve.config import SloConfig
from slos_serve.core.types import Slo
from slos_serve.traces.trace import IntArray, Trace, synthetic_arrivals

Reference = Callable[[int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the requests of a class are: lognormal around medians, clipped. Token counts.

    `max_tokens` is the limit that a client of the class would set.
    """

    prompt_median: float
    prompt_sigma: float
    prompt_range: tuple[int, int]
    output_median: float
    output_sigma: float
    output_range: tuple[int, int]
    max_tokens: int

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Return prompt and output lengths of `count` requests."""
        prompt = _lognormal(self.prompt_median, self.prompt_sigma, self.prompt_range, count, rng)
        return prompt, _lognormal(self.output_median, self.output_sigma, self.output_range, count, rng)

    def mean_tokens(self) -> tuple[float, float]:
        """Return the mean prompt and output length, by drawing many."""
        prompt, output = self.draw(20_000, np.random.default_rng(0))
        return float(prompt.mean()), float(output.mean())


def _lognormal(median: float, sigma: float, bounds: tuple[int, int], count: int, rng: np.random.Generator) -> IntArray:
    values = np.exp(rng.normal(math.log(median), sigma, count))
    return np.clip(values, *bounds).astype(np.int64)


def parse_goodput(text: str) -> Slo:
    """Parse `ttft:400,tpot:50` (milliseconds; also e2el, e2e, ttlt) into promises."""
    names = {"ttft": "ttft_s", "tpot": "tpot_s", **dict.fromkeys(("e2e", "e2el", "ttlt"), "e2e_s")}
    values: dict[str, float] = {}
    for part in text.replace(" ", ",").split(","):
        name, _, number = part.partition(":")
        try:
            values[names[name]] = float(number) / 1e3
        except (KeyError, ValueError):
            raise ValueError(f"--goodput {text!r}: {part!r}: expected ttft:MS, tpot:MS or e2el:MS") from None
    return Slo(**values)


def synthetic_trace(
    lengths: Mapping[str, Lengths],
    mix: Mapping[str, float],
    *,
    process: str,
    rate_rps: float,
    duration_s: float,
    rng: np.random.Generator,
) -> Trace:
    """Return `rate_rps * duration_s` requests spread over exactly `duration_s` by `process`.

    The number of requests is fixed, so that every seed offers the same load; gaps are scaled to fit.
    """
    count = max(1, round(rate_rps * duration_s))
    times = synthetic_arrivals(process, rate_rps, count + 1, rng)
    times = (times[:-1] - times[0]) * (duration_s / (times[-1] - times[0]))
    classes = rng.choice(list(mix), count, p=list(mix.values()))
    prompt, output = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for name in mix:
        rows = classes == name
        prompt[rows], output[rows] = lengths[name].draw(int(rows.sum()), rng)
    return Trace.build(
        arrived_at_s=times,
        prompt_tokens=prompt,
        output_tokens=output,
        slo_class=classes,
        span_s=duration_s,
        source=f"synthetic {process}",
    )


def class_limits(trace: Trace) -> dict[str, int]:
    """Return, by class, a limit such as its clients would set: the next power of two of its longest output."""
    return {
        str(name): 1 << int(max(1, trace.output_tokens[trace.slo_class == name].max()) - 1).bit_length()
        for name in np.unique(trace.slo_class)
    }


def build_requests(
    trace: Trace,
    *,
    config: SloConfig,
    reference: Reference | None,
    rng: np.random.Generator,
    limits: Mapping[str, int] | None = None,
    slo: Slo | None = None,
    id_prefix: str = "r",
) -> list[BenchRequest]:
    """Return the requests of a trace. `slo` overrides what the classes promise.

    `reference(prompt_tokens)` is the frozen unloaded prefill time, needed where a class promises TTFT as
    a slowdown. Turns of one session share their prompts' beginning. Prompts of 0 tokens get 1, as do outputs.
    """
    limits = class_limits(trace) if limits is None else limits
    sessions: dict[str, list[int]] = {}
    requests = []
    for i in range(len(trace)):
        name = str(trace.slo_class[i])
        prompt_tokens, output_tokens = max(1, int(trace.prompt_tokens[i])), max(1, int(trace.output_tokens[i]))
        promised = slo
        if promised is None:
            promised, _, _ = config.resolve(name or None, {}, prompt_tokens, reference or _no_reference(name))
        requests.append(
            BenchRequest(
                request_id=f"{id_prefix}{i}",
                offset_s=float(trace.arrived_at_s[i]),
                prompt_token_ids=_prompt(str(trace.session_id[i]), prompt_tokens, sessions, rng),
                output_tokens=output_tokens,
                hidden_max_tokens=max(limits.get(name, 0), output_tokens),
                slo=promised,
                slo_class=name or config.default_class,
                thinking_tokens=int(trace.thinking_tokens[i]),
            )
        )
    return requests


def _prompt(session: str, num_tokens: int, sessions: dict[str, list[int]], rng: np.random.Generator) -> Sequence[int]:
    if not session:
        return random_prompt(num_tokens, rng)
    stream = sessions.setdefault(session, [])
    stream += random_prompt(max(0, num_tokens - len(stream)), rng)
    return stream[:num_tokens]


def _no_reference(name: str) -> Reference:
    def refuse(_: int) -> float:
        raise ValueError(
            f"class {name!r} promises TTFT as a multiple of the unloaded prefill time: "
            "expected --profile FILE (made by slos-serve profile) to grade by, or --goodput, or absolute ttft_ms"
        )

    return refuse
