"""One summary for every graded run, simulated or measured on a live engine.

A run is a list of `GradedRequest`, one for each offered request. The six outcomes of requests that have
an SLO add up to `num_requests`; requests without any SLO are counted in `no_slo` only. A `cancelled`
request is outside the denominator of attainment. A `declined` request is a miss under every rule, even
where it happened to be in time.

`drain_s` is how long after its own last deadline the last accepted request finished (0 where it was in
time): a system whose backlog grows without end shows it here. Accepted means promised where the system
makes promises, and every served request where it makes none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

OUTCOMES = ("met", "missed", "declined", "rejected", "failed", "cancelled")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedRequest:
    """What became of one offered request. Times in seconds on the run's clock.

    `outcome` is one of `OUTCOMES`, or "none" for a request without any SLO. `met_mean_tpot` and
    `met_window` are the secondary rules. `ttft_s` is None before a first token, `tpot_s` (mean, after
    the first token) is None for fewer than two. `finish_s` and `last_due_s` (deadline of its last token,
    inf without one) are None where it did not finish. `promise_lead_s`: how long before its first
    deadline the promise was given.
    """

    slo_class: str
    outcome: str
    promised: bool = False
    met_mean_tpot: bool = False
    met_window: bool = False
    ttft_s: float | None = None
    tpot_s: float | None = None
    arrival_s: float = 0.0
    finish_s: float | None = None
    last_due_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    promise_lead_s: float | None = None

    def __post_init__(self) -> None:
        if self.outcome not in (*OUTCOMES, "none"):
            raise ValueError(f"GradedRequest.outcome = {self.outcome!r}: expected one of {OUTCOMES} or 'none'")


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """Return {"p50", "p90", "p99"} of the values that are known, None where none is."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return {f"p{rank}": None for rank in PERCENTILES}
    return {
        f"p{rank}": float(value) for rank, value in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)
    }


def drain_seconds(graded: Sequence[GradedRequest]) -> float:
    """Return `drain_s`, in seconds; see the module's text."""
    served = [
        (request.finish_s, request.last_due_s, request.promised)
        for request in graded
        if request.finish_s is not None and request.last_due_s is not None and math.isfinite(request.last_due_s)
    ]
    accepted = [entry for entry in served if entry[2]] or served
    if not accepted:
        return 0.0
    finish_s, last_due_s, _ = max(accepted)
    return max(0.0, finish_s - last_due_s)


def summarize_group(graded: Sequence[GradedRequest], *, duration_s: float) -> dict[str, Any]:
    """Summarise requests of one class, or of all. `duration_s`: length of the offered window."""
    if not duration_s > 0:
        raise ValueError(f"duration_s = {duration_s!r}: expected a positive number of seconds")
    judged = [request for request in graded if request.outcome != "none"]
    counts = {outcome: sum(request.outcome == outcome for request in judged) for outcome in OUTCOMES}
    denominator = len(judged) - counts["cancelled"]
    promised = [request for request in judged if request.promised and request.outcome != "cancelled"]

    def share(number: int) -> float | None:
        return number / denominator if denominator else None

    served = [request for request in judged if request.outcome in ("met", "missed")]
    return {
        "rate_rps": len(graded) / duration_s,
        "num_requests": len(judged),
        **counts,
        "no_slo": len(graded) - len(judged),
        "promised": len(promised),
        "kept": sum(request.outcome == "met" for request in promised),
        "attainment": share(counts["met"]),
        "attainment_mean_tpot": share(sum(request.met_mean_tpot for request in served)),
        "attainment_window": share(sum(request.met_window for request in served)),
        "goodput_rps": counts["met"] / duration_s,
        "ttft_s": percentiles(request.ttft_s for request in graded),
        "tpot_s": percentiles(request.tpot_s for request in graded),
        "drain_s": drain_seconds(graded),
    }


def summarize(
    graded: Sequence[GradedRequest],
    *,
    system: str,
    scenario: str,
    duration_s: float,
    rate_rps: float | None = None,
) -> dict[str, Any]:
    """Return the answer of `simulate --json` and of each system in `bench --json`.

    `rate_rps` is the offered rate, by default requests over `duration_s`, the offered window in seconds.
    """
    entry = {"system": system, "scenario": scenario, **summarize_group(graded, duration_s=duration_s)}
    if rate_rps is not None:
        entry["rate_rps"] = rate_rps
    classes = sorted({request.slo_class for request in graded})
    entry["by_class"] = {
        name: summarize_group([r for r in graded if r.slo_class == name], duration_s=duration_s) for name in classes
    }
    return entry
