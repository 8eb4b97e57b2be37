"""When steering must stop: the rules under which enforcing steps down to the engine's own order.

Measured all the time: promises kept, margin coverage (share of steps that took no longer than predicted with
margin), planner faults by step, device time lost because of us, and how far the planner's clock is from the wall clock.
One of them over its limit, on enough evidence, steps down; so do, at once, a plan that had to be cut off and a
clock that was set back. The evidence is then forgotten. Steering resumes when the hold time has passed and
what is still measured is better than its limit by `RELIEF`; every further step-down doubles the hold, up to an
hour, until steering has held up for `FORGIVEN` times the last hold.

What happens once is no evidence. A step counts for at most `USUAL` times the usual one, so that a pause of the
interpreter does not trip the rule about cost. A *stall*, a step that took many times as long as predicted (a kernel is
compiled, a page comes in), excuses the promises of those who were there; where stalls are not rare they excuse nothing.

A promise that an output longer than predicted broke is nobody's evidence (see `promises`). And nobody alone decides:
where others have ended enough requests, the tenant with the most broken promises is left out.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass

RELIEF = 0.8  # of a tolerated share: what must be reached before steering resumes
MAX_HOLD_S = 3600.0
FORGIVEN = 10.0
USUAL = 2.0  # times the mean step time: what one step can count for in the rule about cost
RARE_STALLS = 3.5  # within what is remembered
_FADE = 1.0 - 1.0 / 2000.0  # faults, stalls and times are remembered over about 2000 steps
_PROMISES = 1000
_OTHERS = 50  # promises of other tenants that say enough without the worst one's


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyLimits:
    """Limits of the rules, as shares, and the evidence each one needs. Times in seconds.

    `max_plan_s`: when a plan is cut off. `max_clock_step_s`: how far the clock may be set back unnoticed.
    `max_clock_error_s`: how far the time that plans are made for may be from the time at which their batches start,
    in `num_clock_errors` steps in a row.
    """

    min_promises_kept: float = 0.95
    num_promises: int = 200
    min_coverage: float = 0.90
    num_covered_steps: int = 512
    max_fault_share: float = 0.001
    num_faults: int = 5
    max_time_share: float = 0.05
    num_timed_steps: int = 200
    max_plan_s: float = 30.0
    max_clock_step_s: float = 0.1
    max_clock_error_s: float = 0.25
    num_clock_errors: int = 64
    hold_s: float = 60.0
    is_enabled: bool = True


class StepDown:
    """Watch the measurements; `is_down` says that vLLM's own order must run, `reason` why.

    `is_resting`: the planner must not even be asked beside it: what it does is what is wrong.
    """

    def __init__(self, limits: SafetyLimits | None = None) -> None:
        self.limits = limits or SafetyLimits()
        self.is_down = False
        self.is_resting = False
        self.reason = ""
        self.num_step_downs = 0
        self._promises: deque[tuple[bool, str]] = deque()
        self._given: Counter[str] = Counter()  # of `_promises`, by tenant
        self._broken: Counter[str] = Counter()
        self._steps = 0.0
        self._faults = 0.0
        self._timed_steps = 0
        self._weight = 0.0
        self._step_s = 0.0
        self._delay_s = 0.0
        self._stalls = 0.0
        self._stalled_s = -math.inf
        self._coverage: float | None = None
        self._clock_step_s = 0.0
        self._num_clock_errors = 0
        self._num_hung = 0
        self._resume_s = 0.0
        self._hold_s = 0.0

    def add_promise(self, kept: bool, tenant: str = "", *, arrival_s: float = math.inf) -> None:
        """Count a promised request that ended, and whose it was; a broken one is excused if it was there in a stall."""
        if not kept and arrival_s <= self._stalled_s:
            return
        self._promises.append((kept, tenant))
        self._count(kept, tenant, 1)
        if len(self._promises) > _PROMISES:
            self._count(*self._promises.popleft(), -1)

    def _count(self, kept: bool, tenant: str, change: int) -> None:
        for counts in (self._given,) if kept else (self._given, self._broken):
            counts[tenant] += change
            if not counts[tenant]:
                del counts[tenant]

    def add_step(self, step_s: float, delay_s: float) -> None:
        """Count the time of a step with tokens, and for how long the device waited for us before it, in seconds."""
        self._timed_steps += 1
        usual_s = USUAL * (self._step_s + step_s) / (self._weight + 1.0)
        self._weight = self._weight * _FADE + 1.0
        self._step_s = self._step_s * _FADE + step_s
        self._delay_s = self._delay_s * _FADE + min(delay_s, usual_s)
        self._stalls *= _FADE

    def add_stall(self, now_s: float) -> None:
        """Take the end of a step that took many times as long as predicted."""
        self._stalls += 1.0
        if self._stalls < RARE_STALLS:
            self._stalled_s = now_s

    def add_clock_step(self, seconds: float) -> None:
        """Take a step of the clock backwards; 0 for none."""
        self._clock_step_s = max(self._clock_step_s, seconds)

    def add_clock_error(self, seconds: float) -> None:
        """Take how much later a batch was expected to start than it did."""
        is_off = abs(seconds) > self.limits.max_clock_error_s
        self._num_clock_errors = self._num_clock_errors + 1 if is_off else 0

    def add_plan(self, faulty: bool, *, hung: bool = False) -> None:
        """Count one attempt to plan; `hung`: it had to be cut off."""
        self._num_hung += hung
        self._steps = self._steps * _FADE + 1
        self._faults = self._faults * _FADE + faulty

    def set_coverage(self, coverage: float | None, num_steps: int) -> None:
        """Tell the newest margin coverage and how many steps stand behind it."""
        self._coverage = coverage if num_steps >= self.limits.num_covered_steps else None

    @property
    def time_share(self) -> float:
        """The share of the device's time for which it waited for us."""
        return self._delay_s / self._step_s if self._step_s > 0 else 0.0

    def check(self, now_s: float) -> bool:
        """Step down or up where due; tell whether that changed."""
        if not self.limits.is_enabled:
            return False
        if self.is_down:
            if now_s < self._resume_s or self._violation(RELIEF):
                return False
            self.is_down, self.is_resting, self.reason = False, False, ""
            return True
        reason = self._violation(1.0)
        if not reason:
            return False
        if self._hold_s and now_s > self._resume_s + FORGIVEN * self._hold_s:
            self._hold_s = 0.0
        self._hold_s = min(max(2.0 * self._hold_s, self.limits.hold_s), MAX_HOLD_S)
        self.is_down, self.reason, self._resume_s = True, reason, now_s + self._hold_s
        self.num_step_downs += 1
        # planning beside would go on to cost what it costs, or to hang
        self.is_resting = self._num_hung > 0 or self._is_too_slow(1.0)
        for evidence in (self._promises, self._given, self._broken):
            evidence.clear()
        self._steps = self._faults = 0.0
        self._timed_steps = self._num_hung = self._num_clock_errors = 0
        self._weight = self._step_s = self._delay_s = self._clock_step_s = 0.0
        return True

    def _judged(self) -> tuple[int, int]:
        """Return how many promises were broken, of how many; without the worst tenant where the others are enough."""
        if not self._broken:
            return 0, len(self._promises)
        broken, count = self._broken.total(), len(self._promises)
        for tenant, most in self._broken.most_common(1):
            if count - self._given[tenant] >= _OTHERS:
                return broken - most, count - self._given[tenant]
        return broken, count

    def _violation(self, strictness: float) -> str:
        """Return the first rule that is broken, its tolerance multiplied by `strictness`; "" for none."""
        limits = self.limits
        if self._num_hung:
            return f"a plan was cut off after {limits.max_plan_s:g} s"
        if self._clock_step_s > limits.max_clock_step_s:
            return f"the clock was set back by {self._clock_step_s:.3g} s"
        if self._num_clock_errors >= limits.num_clock_errors:
            return f"plans are made for a time that is off by more than {limits.max_clock_error_s:g} s"
        if len(self._promises) >= limits.num_promises:
            broken, count = self._judged()
            if broken > (1 - limits.min_promises_kept) * strictness * count:
                return f"promises kept {1 - broken / count:.1%} of {count} (limit {limits.min_promises_kept:.0%})"
        if self._coverage is not None and 1 - self._coverage > (1 - limits.min_coverage) * strictness:
            return f"margin coverage {self._coverage:.1%} (limit {limits.min_coverage:.0%})"
        if self._faults > limits.num_faults - 0.5 and self._faults > limits.max_fault_share * strictness * self._steps:
            share = self._faults / self._steps
            return f"planner faults in {share:.2%} of steps (limit {limits.max_fault_share:.2%})"
        if self._is_too_slow(strictness):
            return f"planning takes {self.time_share:.1%} of the device's time (limit {limits.max_time_share:.0%})"
        return ""

    def _is_too_slow(self, strictness: float) -> bool:
        limits = self.limits
        return self._timed_steps >= limits.num_timed_steps and self.time_share > limits.max_time_share * strictness
