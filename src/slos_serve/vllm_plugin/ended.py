"""Steps that have ended: what the model, the rules of safety and the reports learn from them, several at a time.

Code that runs once a step finds the caches cold, and takes many times as long as the same code run again at once. So
what nobody needs before the model changes is kept until then.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from slos_serve.core.fit import STALL_FACTOR
from slos_serve.vllm_plugin.progress import step_row
from slos_serve.vllm_plugin.report import Ring
from slos_serve.vllm_plugin.safety.stalls import Spent, Stalls

if TYPE_CHECKING:
    from slos_serve.records.writer import StepRecorder
    from slos_serve.vllm_plugin.learning.learner import Learner
    from slos_serve.vllm_plugin.pipeline import InFlight
    from slos_serve.vllm_plugin.safety.rules import StepDown
    from slos_serve.vllm_plugin.safety.work_limit import WorkLimit

logger = logging.getLogger("vllm.slos_serve")

MOST = 16  # steps kept
SAY_EVERY_S = 10.0  # a stall in the log at most
STALL_S = 0.1  # a step that took so much longer than predicted, and many times as long, is a stall


class Ended:
    """Take steps that have ended. `rows`: those learnt from that are not told yet, as the channel has them."""

    def __init__(self, learner: Learner, safety: StepDown, work_limit: WorkLimit, recorder: StepRecorder) -> None:
        self.overheads, self.delays, self.clock_errors = Ring(), Ring(), Ring()
        self.rows: list[tuple[Any, ...]] = []
        self._learner = learner
        self._safety = safety
        self._work_limit = work_limit
        self._recorder = recorder
        self._kept: list[tuple[InFlight, float, float, float]] = []
        self.stalls = Stalls()
        self._say_at_s = 0.0

    def add(
        self, entry: InFlight, seconds: float, delay_s: float, clock_error_s: float, *, step: int, now_s: float
    ) -> None:
        """Take a step of so many `seconds`, before which the device waited for us for `delay_s`."""
        self._kept.append((entry, seconds, delay_s, clock_error_s))
        spent = self._take_stall(entry, seconds, now_s) if _is_stall(seconds, entry.predicted_s) else None
        if self._recorder.is_open:
            times = seconds, entry.planned_s, entry.predicted_s
            self._recorder.add(
                step, now_s, entry.shape, *times, entry.plan_age, stall=None if spent is None else spent._asdict()
            )
        if len(self._kept) >= min(MOST, self._learner.num_steady):
            self.learn()

    def learn(self) -> None:
        """Learn from the steps that were kept."""
        kept, self._kept = self._kept, []
        learner, safety = self._learner, self._safety
        for entry, seconds, delay_s, clock_error_s in kept:
            learner.observe(entry.shape, seconds, entry.predicted_s)
            self._work_limit.earn(seconds)
            self.overheads.add(entry.cost_s)
            self.delays.add(delay_s)
            self.clock_errors.add(clock_error_s)
            safety.add_clock_error(clock_error_s)
            safety.add_step(seconds, delay_s)
            self._work_limit.adapt(safety.time_share, safety.limits.max_time_share)
            self.rows.append(step_row(entry, seconds))
        safety.set_coverage(learner.coverage, int(learner.num_errors))
        self.stalls.mark()

    def _take_stall(self, entry: InFlight, seconds: float, now_s: float) -> Spent:
        """Count a stalled step, and say what held it up."""
        self._safety.add_stall(now_s)
        spent = self.stalls.since(entry.cost_s)
        if now_s >= self._say_at_s:
            self._say_at_s = now_s + SAY_EVERY_S
            took_ms, expected_ms = 1000 * seconds, 1000 * (entry.predicted_s or 0.0)
            logger.warning("SLO scheduler: a step took %.0f ms, not %.0f: %s", took_ms, expected_ms, spent.text())
        return spent

    def take_rows(self) -> list[tuple[Any, ...]]:
        """Return `rows`, which is empty then."""
        taken, self.rows = self.rows, []
        return taken


def _is_stall(seconds: float, predicted_s: float | None) -> bool:
    return predicted_s is not None and seconds > max(STALL_FACTOR * predicted_s, predicted_s + STALL_S)
