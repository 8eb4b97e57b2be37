"""The last hour in coarse buckets, for the live page: load, steps and outcomes, from what the metrics are made of.

A bucket is plain JSON: what happened in `bucket_s` seconds, `t` being its beginning as a Unix time. Counts add up over
buckets; a number of live requests is the most there were at once. What did not happen is not in it, and a stretch of
which nothing was heard has no buckets at all. The same buckets are made of records and of what runs leave in files.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slos_serve.core.slo.deadlines import STAGES
from slos_serve.core.words import Outcome

BUCKET_S, NUM_BUCKETS = 10.0, 360
LIVE = ("num_promised", "num_best_effort", "num_pending", "num_running", "num_waiting")
COUNTED = frozenset(Outcome) - {Outcome.NONE, Outcome.CANCELLED}  # what attainment is a share of

Bucket = dict[str, Any]
Step = Sequence[Any]  # seconds, predicted_s, planned_s (None: unknown), tokens, prompt tokens, draft tokens, requests


class History:
    """Buckets of the last `num_buckets` times `bucket_s`, and `totals` by class since the start. Safe on any thread."""

    def __init__(self, *, bucket_s: float = BUCKET_S, num_buckets: int = NUM_BUCKETS) -> None:
        self.bucket_s = bucket_s
        self._num_buckets = num_buckets
        self._buckets: OrderedDict[int, Bucket] = OrderedDict()
        self._totals: dict[str, Bucket] = {}
        self._step_sums: Bucket = {}
        self._lock = threading.Lock()

    def take_load(self, at_s: float, snapshot: Mapping[str, Any]) -> None:
        """Note what an engine holds, and how it is steered."""
        with self._lock:
            bucket = self._at(at_s)
            load = bucket.setdefault("load", {})
            for key in LIVE:
                if snapshot.get(key) is not None:
                    load[key] = max(load.get(key, 0), snapshot[key])
            if blocks := snapshot.get("num_kv_blocks"):
                used = 1.0 - (snapshot.get("free_kv_blocks") or 0) / blocks
                load["kv_used"] = max(load.get("kv_used", 0.0), round(used, 4))
            bucket["mode"], bucket["reason"] = snapshot.get("effective_mode"), snapshot.get("reason") or ""
            if lengths := snapshot.get("draft_lengths"):
                bucket["draft_lengths"] = dict(lengths)

    def take_steps(self, at_s: float, steps: Iterable[Step]) -> None:
        """Add steps that have ended: how long they took and were to take, and what their batches held."""
        with self._lock:
            for step in steps:
                for sums in (self._at(at_s).setdefault("steps", {}), self._step_sums):
                    _add_step(sums, step)

    def take_step_sums(self, at_s: float, grown: Mapping[str, float]) -> None:
        """Add what the `step_sums` of another history have grown by."""
        with self._lock:
            sums = self._at(at_s).setdefault("steps", {})
            for key, value in grown.items():
                _add(sums, key, value)

    def take_end(self, at_s: float, slo_class: str, end: Mapping[str, Any]) -> None:
        """Count a request that has ended, one whose client asked for nothing not at all."""
        if end["outcome"] == Outcome.NONE:
            return
        with self._lock:
            for classes in (self._at(at_s).setdefault("classes", {}), self._totals):
                _add_end(classes.setdefault(slo_class, {}), end)

    def since(self, at_s: float = -math.inf) -> list[Bucket]:
        """Return the buckets that end after `at_s`, the oldest first."""
        with self._lock:
            return [_copy(one) for one in self._buckets.values() if one["t"] + self.bucket_s > at_s]

    def totals(self) -> dict[str, Bucket]:
        """Return the counts of each class since the start."""
        with self._lock:
            return {name: _copy(counts) for name, counts in self._totals.items()}

    def step_sums(self) -> Bucket:
        """Return the sums over all steps since the start."""
        with self._lock:
            return dict(self._step_sums)

    def _at(self, at_s: float) -> Bucket:
        number = math.floor(at_s / self.bucket_s)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {"t": round(number * self.bucket_s, 6)}
            while len(self._buckets) > self._num_buckets:
                self._buckets.popitem(last=False)
        return bucket


def _add_step(sums: Bucket, step: Step) -> None:
    seconds, predicted_s, planned_s, tokens, prompt, drafts, requests = step
    _add(sums, "n", 1)
    _add(sums, "seconds", seconds)
    _add(sums, "prompt_tokens", prompt)
    _add(sums, "draft_tokens", drafts)
    _add(sums, "decode_tokens", tokens - prompt - drafts)
    _add(sums, "requests", requests)
    if predicted_s is not None:
        _add(sums, "foretold", 1)
        _add(sums, "foretold_s", seconds)
        _add(sums, "predicted_s", predicted_s)
        _add(sums, "error_s", abs(seconds - predicted_s))
    if planned_s is not None:
        _add(sums, "late", int(seconds > planned_s))


def _add_end(counts: Bucket, end: Mapping[str, Any]) -> None:
    outcome = end["outcome"]
    _add(counts, str(outcome), 1)
    _add(counts, "counted", int(outcome in COUNTED))
    if end.get("promised") and outcome != Outcome.CANCELLED:
        _add(counts, "kept" if outcome == Outcome.MET else "broken", 1)
    for stage, result in (end.get("stages") or {}).items():
        if result:
            _add(counts, f"{stage} {result}", 1)
    due, came = (end.get("asked") or {}).get("ttft_ms"), end.get("ttft_ms")
    if due is not None and came is not None:
        _add(counts, "slack_n", 1)
        _add(counts, "slack_ms", due - came)
        _least(counts, "least_slack_ms", due - came)
    if later := [ms for stage, ms in (end.get("least_slack_ms") or {}).items() if stage != STAGES[0]]:
        _add(counts, "later_n", 1)
        _add(counts, "later_ms", min(later))
        _least(counts, "least_later_ms", min(later))


def _add(sums: Bucket, key: str, value: float) -> None:
    if value:
        sums[key] = round(sums.get(key, 0) + value, 6)


def _least(counts: Bucket, key: str, value: float) -> None:
    counts[key] = round(min(counts.get(key, math.inf), value), 1)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
