"""A recorded run on the virtual clock: the same requests, the steps as long as they were measured.

The engine of the replay is fitted to the record's own steps. How much faster or slower than that fit the machine was
at each moment of the record is kept: what happened is known, so nothing is drawn again. Requests reach the engine as
long after their arrival as they did. Limits are the recorded ones, and the scheduler is what ran: vLLM's order where
plans were only made, the SLO planner where they were carried out. What cannot be replayed is refused by name, never
approximated in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.config import OVERRIDES, SloConfig
from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.fit import fit_perf_model, from_records, predicted_s
from slos_serve.core.types import Request, Slo
from slos_serve.errors import ConfigError
from slos_serve.sim.hardware import Hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.replica.requests import SimRequest
from slos_serve.sim.systems import system_with
from slos_serve.sim.workloads.workload import Workload

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.core.slo.summary import GradedRequest
    from slos_serve.core.types import IntArray, Planner
    from slos_serve.records.reader import Recording

UNGRADED = ("cancelled", "failed", "none")
MIN_STEPS = 200
FOREVER_S = 1e7
IDLE_GAP_S = 1e-3  # from the end of a step to the start of the next one: longer, and the engine had nothing to do
INSET_S = 3e-3  # how far from the ends of a step a request is taken to come, where it may have come at any time of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A recorded run, ready to be replayed. `own_numbers` requests brought promises of their own in numbers.

    `attainment[slo_class]` and `num_by_class[slo_class]` are what was really observed of graded requests.
    """

    recording: Recording
    hardware: Hardware
    pace: Pace
    is_enforced: bool
    attainment: Mapping[str, float]
    num_by_class: Mapping[str, int]
    own_numbers: int

    @classmethod
    def of(cls, recording: Recording) -> Observed:
        """Judge a recording; `ConfigError` where it cannot be replayed."""
        where, engine = str(recording.path), recording.engine
        if engine.get("policy") != "fcfs":
            expected = "fcfs: other policies cannot be replayed"
            raise ConfigError(where=where, key="policy", value=engine.get("policy"), expected=expected)
        requests = _requests(recording)
        graded = [line for line in requests if line["outcome"] not in UNGRADED]
        if not graded:
            raise ConfigError(where=where, key="request", value="none", expected="finished requests with an SLO")
        enforced = Counter(bool(line.get("enforced")) for line in graded)
        if len(enforced) > 1:
            value = f"{enforced[True]} of {len(graded)} requests enforced"
            raise ConfigError(where=where, key="mode", value=value, expected="one mode for the whole record")
        hardware, pace = _hardware(recording)
        num = Counter(line["slo_class"] for line in graded)
        met = Counter(line["slo_class"] for line in graded if line["outcome"] == "met")
        own = sum(any(f"slo_{name}" in line["said"] for name in OVERRIDES) for line in graded)
        return cls(
            recording=recording,
            hardware=hardware,
            pace=pace,
            is_enforced=enforced[True] > 0,
            attainment={name: met[name] / count for name, count in sorted(num.items())},
            num_by_class=dict(sorted(num.items())),
            own_numbers=own,
        )

    def workload(self, config: SloConfig | None = None) -> Workload:
        """Return the recorded requests, with their own promises or those of another configuration.

        What a client said in numbers stays; what was cancelled or failed is load that nobody grades.
        """
        lines = _requests(self.recording)
        start = min(line["arrival_s"] for line in lines)
        transits = _transits(self.recording, lines)
        arrivals = [
            self._request(line, start, transit_s, config)
            for line, transit_s in zip(lines, transits, strict=True)
            if line["num_output_tokens"]
        ]
        span = max(sim.request.arrival_s for sim in arrivals)
        classes = (config or SloConfig.from_json(self.recording.engine["config"])).classes.values()
        hints = {one.name: float(one.output_tokens_hint) for one in classes if one.output_tokens_hint}
        return Workload(
            name=self.recording.path.name,
            arrivals=arrivals,
            duration_s=max(span, 1e-3),
            num_dropped=len(lines) - len(arrivals),
            hints=hints,
        )

    def _request(self, line: Mapping[str, Any], start: float, transit_s: float, config: SloConfig | None) -> SimRequest:
        slo, weight, label, thinks = Slo(**line["slo"]), line["weight"], line["slo_class"], line["thinks"]
        if config is not None and line["outcome"] not in UNGRADED:
            said = {name.removeprefix("slo_"): value for name, value in line["said"].items()}
            name = said.pop("class", None)
            numbers = {key: value for key, value in said.items() if key in (*OVERRIDES, "stage")}
            slo, weight, thinks = config.resolve(name, numbers, line["num_prompt_tokens"], self.reference_s)
            label = config.label(name, numbers)
        if line["outcome"] in UNGRADED:
            slo = Slo()
        return SimRequest(
            request=Request(
                request_id=line["request_id"],
                arrival_s=line["arrival_s"] - start,
                num_prompt_tokens=line["num_prompt_tokens"],
                max_output_tokens=max(line["max_output_tokens"], line["num_output_tokens"]),
                slo=slo,
                slo_class=label,
                weight=weight,
                thinks=thinks,
            ),
            num_output_tokens=line["num_output_tokens"],
            num_thinking_tokens=min(line["num_thinking_tokens"], line["num_output_tokens"]) if thinks else 0,
            num_cached_tokens=min(line["num_cached_tokens"], line["num_prompt_tokens"]),
            transit_s=transit_s,
        )

    def reference_s(self, prompt_tokens: int) -> float:
        """Return the pinned unloaded prefill time in seconds."""
        model, budget = self.recording.reference()
        return model.prefill_seconds(prompt_tokens, budget)

    @property
    def has_drafts(self) -> bool:
        """Tell whether drafts are verified, whose acceptance is drawn."""
        return bool(self.recording.engine["limits"].get("max_draft_length"))

    def planner(self, *, enforced: bool) -> Planner:
        """Return what decides: the recorded planner, or vLLM's own order."""
        limits = self.recording.engine["limits"]
        if enforced:
            return self.recording.planner()
        return VllmPlanner(
            token_budget=limits["max_num_batched_tokens"], draft_length=int(limits.get("max_draft_length", 0))
        )

    def run(self, workload: Workload, *, enforced: bool, seed: int) -> list[GradedRequest]:
        """Serve the workload once and return the grades."""
        limits = self.recording.engine["limits"]
        options = ReplicaOptions(
            async_lag=bool(self.recording.engine.get("is_async")),
            pace=self.pace,
            acceptance=_acceptance(self.recording),
        )
        system = system_with(self.planner(enforced=enforced), max_draft_length=int(limits.get("max_draft_length", 0)))
        return system.serve(workload, self.hardware, engine=options, seed=seed).graded


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How far the machine had come at each moment of a record: `work_s` seconds of predicted step time by `times_s`."""

    times_s: FloatArray
    work_s: FloatArray

    @classmethod
    def of(cls, ended_s: FloatArray, measured_s: FloatArray, predicted: FloatArray) -> Pace:
        """Take the pace of each step while it ran, and the average between steps and after them.

        What no model can be fitted to, a step of no time or of unknown size, is left out here too.
        """
        usable = (measured_s > 0) & np.isfinite(predicted)
        ended_s, measured_s, predicted = ended_s[usable], measured_s[usable], predicted[usable]
        average = predicted.sum() / measured_s.sum()
        ends = np.maximum.accumulate(ended_s)
        begins = np.maximum(ends - measured_s, np.concatenate([[-math.inf], ends[:-1]]))
        idle = begins - np.concatenate([begins[:1], ends[:-1]])
        work = np.cumsum(np.stack([idle * average, (ends - begins) * predicted / measured_s], axis=1))
        times = np.stack([begins, ends], axis=1).ravel()
        return cls(
            times_s=np.concatenate([times, times[-1:] + FOREVER_S]),
            work_s=np.concatenate([work, work[-1:] + FOREVER_S * average]),
        )

    def __call__(self, now_s: float, seconds: float) -> float:
        """Return how long a step takes that starts then and is predicted to take `seconds`."""
        done = np.interp(now_s, self.times_s, self.work_s)
        return float(np.interp(done + seconds, self.work_s, self.times_s)) - now_s


def attainment(graded: Sequence[GradedRequest]) -> dict[str, float]:
    """Return the share of graded requests that met every promise, by class."""
    num: Counter[str] = Counter()
    met: Counter[str] = Counter()
    for one in graded:
        if one.outcome not in UNGRADED:
            num[one.slo_class] += 1
            met[one.slo_class] += one.outcome == "met"
    return {name: met[name] / count for name, count in sorted(num.items())}


def _requests(recording: Recording) -> list[dict[str, Any]]:
    """Return the requests from the first one with promises on, in order of arrival."""
    first = min((line["arrival_s"] for line in recording.requests if line["slo"]), default=math.inf)
    return sorted((line for line in recording.requests if line["t"] >= first), key=lambda line: line["arrival_s"])


def _hardware(recording: Recording) -> tuple[Hardware, Pace]:
    """Return the engine that the record's steps describe, and its pace by time."""
    lines = _requests(recording)
    first, last = min(line["arrival_s"] for line in lines), max(line["t"] for line in lines)
    steps = [step for step in recording.steps if first <= step["t"] <= last]
    if len(steps) < MIN_STEPS:
        steps = recording.steps
    try:
        samples = from_records(steps)
        model = fit_perf_model(samples, rng=np.random.default_rng(0)).model
        limits = recording.engine["limits"]
        hardware = Hardware(
            name=recording.path.name,
            perf_model=model,
            kv_tokens=limits["num_kv_blocks"] * limits["block_size"],
            max_model_len=limits["max_model_len"],
            max_num_batched_tokens=limits["max_num_batched_tokens"],
            max_num_seqs=limits["max_num_seqs"],
            block_size=limits["block_size"],
        )
    except (ValueError, KeyError, TypeError) as error:
        expected = f"steps that can be fitted and the engine's limits ({error})"
        raise ConfigError(where=str(recording.path), key="steps", value=len(steps), expected=expected) from error
    terms = np.array([[*sample[:5], 1.0] for sample in samples])
    ended = np.array([step["t"] for step in steps])
    measured = np.array([sample.seconds for sample in samples])
    if not any(line.get("enforced") for line in lines):
        # vLLM's order never waits: where it had work and the next step began late, the step before is taken to last.
        gap = np.maximum(ended[1:] - measured[1:] - ended[:-1], 0.0) * (_num_live(lines, ended[:-1]) > 0)
        ended[:-1] += gap
        measured[:-1] += gap
    return hardware, Pace.of(ended - first, measured, predicted_s(model, terms))


def _num_live(lines: Sequence[Mapping[str, Any]], times_s: FloatArray) -> IntArray:
    """Return how many requests the engine had right after each time."""
    added = np.sort([line.get("added_s", line["arrival_s"]) for line in lines])
    ended = np.sort([line["t"] for line in lines])
    count: IntArray = np.searchsorted(added, times_s, side="right") - np.searchsorted(ended, times_s, side="right")
    return count


def _transits(recording: Recording, lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the seconds from each request's arrival until the engine had it; 0 where the record does not say.

    A busy engine takes requests only between steps: one came during the step before, as soon after its arrival as
    requests reach an idle engine.
    """
    if not recording.steps or any("added_s" not in line for line in lines):
        return [0.0] * len(lines)
    ends = np.array([step["t"] for step in recording.steps])
    begins = ends - np.array([step["seconds"] for step in recording.steps])
    arrivals, added = (np.array([line[key] for line in lines]) for key in ("arrival_s", "added_s"))
    after = np.searchsorted(ends, added, side="right")  # the first step that can hold the request
    before, after = np.maximum(after - 1, 0), np.minimum(after, len(ends) - 1)
    is_idle = (begins[after] - ends[before] > IDLE_GAP_S) & (_num_live(lines, ends[before]) == 0)
    is_idle |= before == after
    usual = float(np.median((added - arrivals)[is_idle])) if is_idle.any() else float((added - arrivals).min())
    earliest = np.where(is_idle, added, np.maximum(arrivals, begins[before]))
    latest = np.where(is_idle, added, np.maximum(ends[before], begins[after]))
    inset = np.clip((latest - earliest) / 2, 0.0, INSET_S)
    known = np.clip(arrivals + usual, earliest + inset, latest - inset)
    return list(np.maximum(known - arrivals, 0.0).tolist())


def _acceptance(recording: Recording) -> dict[str, float]:
    """Return the last measured chance that a draft token is accepted, by class."""
    last = recording.plans[-1].document["state"].get("acceptance", {}) if recording.plans else {}
    return {name: float(value) for name, value in last.items()}
