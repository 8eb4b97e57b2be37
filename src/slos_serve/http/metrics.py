"""The Prometheus metrics, on the registry that vLLM's `/metrics` shows.

Attainment is a pair of counters, never a quantile of a histogram. The engine keeps cumulative counts of
its own; they arrive in snapshots and are turned into increments here, so that an engine that restarts
does not make a counter jump back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric

from slos_serve.config import BEST_EFFORT, CUSTOM, SloConfig
from slos_serve.core.slo.deadlines import STAGES
from slos_serve.core.words import Outcome, Reason, Said
from slos_serve.http.status import FIELDS

MAX_TENANTS = 100
OTHER = "other"
MODES = {"observe": 1, "enforce": 2}
PROMISE_RESULTS = ("kept", "broken")
HOPS = ("served", "passed", "lost", "broken", "refused")
FAULT_KINDS = ("sync", "plan", "apply", "add", "scheduled", "update", "finish", "starved", "housekeeping", "warm-up")
VERDICTS = (
    *((Said.PROMISED, Reason.NONE), (Said.PROMOTED, Reason.NONE)),
    *itertools.product((Said.BEST_EFFORT, Said.REJECTED), (Reason.TOO_TIGHT, Reason.COMPUTE, Reason.MEMORY)),
    *itertools.product((Said.BEST_EFFORT, Said.REJECTED), (Reason.DEADLINE_PASSED,)),
    (Said.BEST_EFFORT, Reason.OBSERVE),
)
_TENTHS_OF_MS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.5)
_AROUND = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0)
_MULTIPLES = (*(-one for one in reversed(_AROUND)), 0.0, *_AROUND)


class Slack:
    """The time that promises had to spare, by class and stage: a histogram whose buckets follow the class.

    They are multiples of its TTFT for the prefill (of the shortest that a slowdown gives) and of its TPOT for what
    comes after it; multiples of a second and of a tenth for what has none. As one metric it is a collector of its own,
    since a `Histogram` has the same buckets for all of its labels.
    """

    NAME, TEXT = (
        "slos_serve_slack_seconds",
        "Time to spare at the tightest token of a stage, of promises that were graded.",
    )

    def __init__(self) -> None:
        self._config = SloConfig()
        self._of: dict[tuple[str, str], Histogram] = {}

    def know(self, config: SloConfig) -> None:
        """Take up the classes; a histogram that was begun keeps its buckets."""
        self._config = config
        for name, one in config.classes.items():
            if one.promises:
                self._histogram(name, "prefill")
                self._histogram(name, "answer")

    def observe(self, slo_class: str, stage: str, seconds: float) -> None:
        """Add one stage of one request; `seconds` are negative where it was late."""
        self._histogram(slo_class, stage).observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Return the histograms as one metric."""
        metric = Metric(self.NAME, self.TEXT, "histogram")
        for histogram in list(self._of.values()):
            for one in histogram.collect():
                metric.samples += one.samples
        return [metric]

    def _histogram(self, slo_class: str, stage: str) -> Histogram:
        key = slo_class, stage
        if key not in self._of:
            buckets = [round(self._scale_s(slo_class, stage) * multiple, 6) for multiple in _MULTIPLES]
            labels = ("class", "stage")
            self._of[key] = Histogram(self.NAME, self.TEXT, labels, registry=None, buckets=buckets)
        return self._of[key].labels(*key)

    def _scale_s(self, slo_class: str, stage: str) -> float:
        one = self._config.classes.get(slo_class)
        if stage == "prefill":
            floor_ms = self._config.ttft_floor_ms if one is None or one.floor_ms is None else one.floor_ms
            shortest_ms = floor_ms if one is not None and one.ttft_slowdown is not None else None
            return ((one.ttft_ms if one is not None else None) or shortest_ms or 1000.0) / 1000
        paces = (one.thinking_tpot_ms if stage == "thinking" else None, one.tpot_ms) if one is not None else ()
        return next((pace for pace in paces if pace is not None), 100.0) / 1000


class SloMetrics:
    """Every metric of the contract, and what moves it."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")

        self.requests = counter(
            "slos_serve_requests_total", f"Requests by outcome: {', '.join(Outcome)}.", "class", "tenant", "outcome"
        )
        self.promises = counter("slos_serve_promises_total", "Promises by result: kept or broken.", "class", "result")
        self.stage_slo = counter(
            "slos_serve_stage_slo_total",
            f"Stages ({', '.join(STAGES)}) by outcome: met or missed.",
            "class",
            "stage",
            "outcome",
        )
        self.verdicts = counter(
            "slos_serve_verdicts_total", f"Verdicts given: {', '.join(Said)}; and why.", "class", "verdict", "reason"
        )
        self.would_be = counter(
            "slos_serve_would_be_total",
            "Verdicts that plans would have given while they are not carried out: promised or best-effort.",
            *("class", "verdict"),
        )
        self.numbers: dict[str, Counter | Gauge] = {
            field.key: (counter if field.counts else gauge)(*field.metric) for field in FIELDS if field.metric
        }
        self.numbers["margin_coverage"].set(math.nan)  # type: ignore[union-attr] # unknown is not 0
        self.faults = counter("slos_serve_planner_faults_total", "Steps the planner did not plan.", "kind")
        self.hops = counter(
            "slos_serve_router_hops_total", f"Requests sent to a replica, by what it did: {', '.join(HOPS)}.", "outcome"
        )
        self.slack = Slack()
        registry.register(self.slack)
        self.plan = Histogram(
            "slos_serve_plan_seconds", "Time to plan one step.", registry=registry, buckets=_TENTHS_OF_MS
        )
        self.step_error = Histogram(
            "slos_serve_step_error_seconds",
            "Absolute difference between the predicted and the measured time of a step.",
            registry=registry,
            buckets=_TENTHS_OF_MS,
        )
        self.mode = gauge("slos_serve_mode", "What steers the engine: 0 its own order, 1 observing, 2 enforcing.")
        self.class_mode = gauge(
            "slos_serve_class_mode", "The mode of a class that differs, or did: as slos_serve_mode.", "class"
        )
        self.heard = gauge(
            "slos_serve_engine_heard_timestamp_seconds",
            "When the engine was last heard, as Unix time; of several engines the one that has been silent longest.",
        )
        self.draft_length = gauge("slos_serve_draft_length", "Draft tokens per step.", "class")
        self.emulated = gauge("slos_serve_emulated_device", "1 where no model runs: the device is emulated.")
        self.clock_error = gauge(
            "slos_serve_clock_error_seconds", "When batches were expected to start minus when they did: the median."
        )
        self._differing: set[str] = set()  # classes with a mode of their own, now or before
        self._configured = frozenset({""})
        self._tenants: set[str] = set()
        self._seen: dict[tuple[object, str], float] = {}

    def know(self, config: SloConfig) -> None:
        """Take up the operator's configuration: its tenants have labels of their own, however many others come.

        What can be counted is there from the start, at 0: a series that begins with its first broken promise shows no
        increase.
        """
        self._configured = frozenset(("", *config.api_keys, *config.tenants))
        self.slack.know(config)
        names = [name for name, one in config.classes.items() if one.promises]
        for name in (*names, CUSTOM, BEST_EFFORT):
            for outcome in Outcome:
                self.requests.labels(name, "", outcome)
        for name in (*names, CUSTOM):
            for result in PROMISE_RESULTS:
                self.promises.labels(name, result)
            for stage, result in itertools.product(STAGES, ("met", "missed")):
                self.stage_slo.labels(name, stage, result)
            for verdict, reason in VERDICTS:
                self.verdicts.labels(name, verdict, reason)
            for verdict in (Said.PROMISED, Said.BEST_EFFORT):
                self.would_be.labels(name, verdict)
        for kind in FAULT_KINDS:
            self.faults.labels(kind)

    def tenant(self, name: str) -> str:
        """Return the label of a tenant: itself where the operator names it and for the first hundred, then `other`."""
        if name in self._configured or name in self._tenants:
            return name
        if len(self._tenants) >= MAX_TENANTS:
            return OTHER
        self._tenants.add(name)
        return name

    def count_outcome(self, slo_class: str, tenant: str, outcome: str) -> None:
        """Count one request's end."""
        self.requests.labels(slo_class, self.tenant(tenant), outcome).inc()

    def count_verdict(self, slo_class: str, verdict: str, reason: str) -> None:
        """Count one verdict."""
        self.verdicts.labels(slo_class, verdict, reason).inc()

    def count_promise(self, slo_class: str, outcome: str, least_slack_ms: Mapping[str, float]) -> None:
        """Count a promise as kept or broken, and what it had to spare; one whose client left is neither."""
        if outcome != Outcome.CANCELLED:
            self.promises.labels(slo_class, PROMISE_RESULTS[outcome != Outcome.MET]).inc()
            for stage, milliseconds in least_slack_ms.items():
                self.slack.observe(slo_class, stage, milliseconds / 1000)

    def know_hops(self) -> None:
        """Show a router's counters from the start."""
        for outcome in HOPS:
            self.hops.labels(outcome)

    def count_hop(self, outcome: str) -> None:
        """Count one replica's answer to a request: served, passed, lost, broken or refused."""
        self.hops.labels(outcome).inc()

    def count_stages(self, slo_class: str, stages: Mapping[str, str]) -> None:
        """Count the stages that were graded."""
        for stage, outcome in stages.items():
            if outcome in {"met", "missed"}:
                self.stage_slo.labels(slo_class, stage, outcome).inc()

    def show(self, snapshot: Mapping[str, Any]) -> None:
        """Move the gauges to a snapshot."""
        self.mode.set(MODES.get(str(snapshot.get("effective_mode")), 0))
        self.emulated.set(1 if snapshot.get("device") else 0)
        for key, number in self.numbers.items():
            if isinstance(number, Gauge) and key in snapshot:
                # what is not known now is no number, least of all the last one
                number.set(math.nan if snapshot[key] is None else snapshot[key])
        clock_error = (snapshot.get("clock_error_s") or {}).get("p50")
        if clock_error is not None:
            self.clock_error.set(clock_error)
        for slo_class, length in (snapshot.get("draft_lengths") or {}).items():
            self.draft_length.labels(slo_class).set(length)
        modes = snapshot.get("class_modes") or {}
        self._differing |= modes.keys()
        for slo_class in self._differing:  # several processes share one /metrics, from which no series can be taken
            mode = modes.get(slo_class, snapshot.get("effective_mode"))
            self.class_mode.labels(slo_class).set(MODES.get(str(mode), 0))

    def count(self, snapshot: Mapping[str, Any], engine: object = 0) -> None:
        """Move the counters by what an engine's cumulative counts have grown."""
        for key, number in self.numbers.items():
            if isinstance(number, Counter):
                number.inc(self._increment(engine, key, snapshot.get(key) or 0))
        for slo_class, verdicts in (snapshot.get("would_be_by_class") or {}).items():
            for verdict, count in verdicts.items():
                name = f"would be {slo_class} {verdict}"
                self.would_be.labels(slo_class, verdict).inc(self._increment(engine, name, count))
        for kind, count in (snapshot.get("planner_faults") or {}).items():
            self.faults.labels(kind).inc(self._increment(engine, f"fault {kind}", count))

    def observe(self, histogram: Histogram, seconds: object) -> None:
        """Add a list of samples, as the engine sends them with a step."""
        for value in seconds if isinstance(seconds, list) else ():
            histogram.observe(abs(value))

    def _increment(self, engine: object, name: str, count: float) -> float:
        before = self._seen.get((engine, name), 0)
        self._seen[engine, name] = count
        return count - before if count >= before else count
