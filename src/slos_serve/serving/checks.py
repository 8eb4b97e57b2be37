"""What a verification concludes from what was measured; no server is asked here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from slos_serve.serving.verification import FAIL, PASS, SKIPPED, Check

MIN_COVERAGE = 0.90
MIN_KEPT = 0.95
MIN_EXACT = 0.99
MAX_TIME_SHARE = 0.05
MIN_THROUGHPUT, MIN_THROUGHPUT_QUICK = 0.95, 0.90
CONFIDENCE = 0.90
OUTPUT_ALLOWANCE = 0.25
MAX_SIZE_RATIO, MIN_SIZE_STEPS = 1.5, 5


def _check(name: str, *, good: bool, detail: str, **values: Any) -> Check:
    return Check(name=name, status=PASS if good else FAIL, detail=detail, values=values)


def skipped(name: str, why: str) -> Check:
    """Return a check that could not be made."""
    return Check(name=name, status=SKIPPED, detail=why)


def hook(snapshot: Mapping[str, Any]) -> Check:
    """Check that this vLLM and this engine's configuration can be steered."""
    reason = str(snapshot.get("reason") or "")
    good = not reason.startswith("unsupported")
    return _check("hook", good=good, detail="this engine can be steered" if good else reason)


def enforcing(snapshot: Mapping[str, Any]) -> Check:
    """Check that plans were carried out to the end, without stepping down."""
    mode, downs = snapshot.get("effective_mode"), snapshot.get("step_downs") or 0
    good = mode == "enforce" and not downs
    detail = "plans were carried out" if good else f"mode {mode}, {downs} step-downs: {snapshot.get('reason') or '-'}"
    return _check("enforcing", good=good, detail=detail, step_downs=downs)


def margin_coverage(profile: Mapping[str, Any] | None, snapshot: Mapping[str, Any]) -> Check:
    """Check that steps held out of the fit, and live ones, end within predicted time and margin."""
    heldout = (profile or snapshot.get("profile") or {}).get("margin_coverage")
    live = snapshot.get("margin_coverage")
    known = [share for share in (heldout, live) if share is not None]
    if not known:
        return skipped("margin-coverage", "no step was predicted")
    text = ", ".join(f"{100 * s:.1f} % {n}" for s, n in ((heldout, "held out"), (live, "live")) if s is not None)
    return _check("margin-coverage", good=min(known) >= MIN_COVERAGE, detail=text, heldout=heldout, live=live)


def faults(snapshot: Mapping[str, Any]) -> Check:
    """Check that the planner never failed."""
    counts = dict(snapshot.get("planner_faults") or {})
    detail = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or f"none in {snapshot.get('steps')} steps"
    return _check("faults", good=not sum(counts.values()), detail=detail, **counts)


def promises(entry: Mapping[str, Any]) -> Check:
    """Check that promises under a moderate load were given and kept."""
    promised, kept = entry["promised"], entry["kept"]
    if not promised:
        return _check("promises", good=False, detail="none was given under a moderate load")
    good = kept >= MIN_KEPT * promised
    detail = f"kept {kept} of {promised}, of {entry['num_requests']} requests"
    return _check("promises", good=good, detail=detail, attainment=entry["attainment"], kept=kept, promised=promised)


def plans(replayed: Mapping[str, Any]) -> Check:
    """Check that recorded plans come out the same again and that the engine ran them."""
    if not replayed["num_steered"]:
        return _check("plans", good=False, detail="no recorded plan was carried out")
    good = replayed["num_same"] == replayed["num_plans"] and replayed["share_exact"] >= MIN_EXACT
    detail = f"{replayed['num_same']} of {replayed['num_plans']} the same again, "
    detail += f"{100 * replayed['share_exact']:.1f} % of {replayed['num_steered']} run exactly as planned"
    return _check("plans", good=good, detail=detail, divergences=replayed["divergences"])


def overhead(snapshot: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Check:
    """Check that planning takes a small part of a step."""
    ours = (snapshot.get("overhead_s") or {}).get("p50")
    if ours is None or not steps:
        return skipped("overhead", "no step was recorded")
    step_s = median(step["seconds"] for step in steps)
    detail = f"{ours * 1e3:.2f} ms beside steps of {step_s * 1e3:.1f} ms"
    return _check("overhead", good=ours <= MAX_TIME_SHARE * step_s, detail=detail, overhead_s=ours, step_s=step_s)


def graph_sizes(steps: Sequence[Mapping[str, Any]], *, has_graphs: bool) -> Check:
    """Check that no decode batch size is far slower than the others, as one outside captured graphs would be."""
    if not has_graphs:
        return skipped("graph-sizes", "no graphs are captured (a CPU, or --enforce-eager)")
    ratios: dict[int, list[float]] = {}
    for step in steps:
        if not step["has_prefill"] and step.get("predicted_s"):
            ratios.setdefault(step["num_requests"], []).append(step["seconds"] / step["predicted_s"])
    known = {size: median(values) for size, values in ratios.items() if len(values) >= MIN_SIZE_STEPS}
    if not known:
        return skipped("graph-sizes", "too few decode steps")
    usual = median(known.values())
    known = {size: ratio / usual for size, ratio in known.items()}
    worst = max(known, key=lambda size: known[size])
    detail = f"{len(known)} decode batch sizes; {worst} takes {known[worst]:.2f} times what the others say, the most"
    by_size = {str(size): round(ratio, 3) for size, ratio in sorted(known.items())}
    return _check("graph-sizes", good=known[worst] <= MAX_SIZE_RATIO, detail=detail, by_size=by_size)


def drafts(steps: Sequence[Mapping[str, Any]], *, has_drafter: bool) -> Check:
    """Check that draft lengths were switched where there is a drafter."""
    if not has_drafter:
        return skipped("drafts", "no drafter is configured")
    lengths = sorted({int(step["draft_steps"]) for step in steps})
    return _check("drafts", good=bool(lengths), detail=f"lengths {lengths} were run", lengths=lengths)


def throughput(pairs: Sequence[tuple[float, float]], *, quick: bool) -> Check:
    """Check that requests without SLOs are served as fast as by vLLM alone.

    `pairs`: output tokens per second of ours and of vLLM alone, by block. The median of their ratios decides.
    """
    least = least_throughput(quick=quick)
    ratio, low, high = ratio_of(pairs)
    detail = f"{100 * ratio:.0f} % of vLLM alone ({100 * low:.0f} to {100 * high:.0f} %, {len(pairs)} blocks)"
    if ratio < least <= high:
        detail += ": undecided, so ask again on a machine that does nothing else"
    values = {"ratio": ratio, "low": low, "high": high, "least": least}
    ours, stock = ([pair[i] for pair in pairs] for i in range(2))
    return _check("throughput", good=ratio >= least, detail=detail, ours=ours, stock=stock, **values)


def least_throughput(*, quick: bool) -> float:
    """Return the share of vLLM's throughput that is asked for."""
    return MIN_THROUGHPUT_QUICK if quick else MIN_THROUGHPUT


def ratio_of(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median ratio and what holds it with 90 % confidence, by ranks: no burst counts for its size."""
    ratios = sorted(ours / stock for ours, stock in pairs)
    rank, outside = 0, 0.5 ** len(ratios)
    while outside <= (1 - CONFIDENCE) / 2:
        rank += 1
        outside += math.comb(len(ratios), rank) * 0.5 ** len(ratios)
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (0.0, math.inf)
    return median(ratios), low, high


def is_decided(pairs: Sequence[tuple[float, float]], *, quick: bool) -> bool:
    """Tell whether more blocks would hardly change what `throughput` concludes."""
    _, low, high = ratio_of(pairs)
    return low >= least_throughput(quick=quick) or high < least_throughput(quick=quick)


def outputs(ours: Sequence[str], stock: Sequence[str], stock_batched: Sequence[str]) -> Check:
    """Check that greedy outputs under steering agree with vLLM's, as far as vLLM's own do across batch sizes."""
    same = sum(a == b for a, b in zip(ours, stock, strict=True)) / len(stock)
    itself = sum(a == b for a, b in zip(stock_batched, stock, strict=True)) / len(stock)
    detail = f"{100 * same:.0f} % equal to vLLM's; vLLM's own across batch sizes {100 * itself:.0f} %"
    return _check("outputs", good=same >= itself - OUTPUT_ALLOWANCE, detail=detail, same=same, stock_itself=itself)
