"""A replica that takes many steps at once, where they run one batch again and again.

Where a plan says that it repeats, or the planner says how often it would make it again, the ends of the steps are
worked out at once, and the steps are let out when the last of them ends or when something is to change, in the middle
of a step or between two. What comes of it is, to the bit, what steps taken one by one come to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slos_serve.core.fit import StepSample
from slos_serve.core.types import ReplicaState, Status, Tier
from slos_serve.sim.replica.kernel import Priority
from slos_serve.sim.replica.replica import Replica

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Plan
    from slos_serve.sim.replica.engine import FloatArray


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that run one batch again and again: rows of the table, and ends and durations in seconds."""

    plan: Plan
    rows: IntArray
    ends: FloatArray
    seconds: FloatArray

    def first(self, count: int) -> Stretch:
        """Return its first steps."""
        return replace(self, ends=self.ends[:count], seconds=self.seconds[:count])


class FastReplica(Replica):
    """A replica that foresees the steps that repeat, and lets them out together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A planner that can tell how often a plan of its own is made again.
        self._count_steps: Callable[[ReplicaState, Plan, FloatArray], int] | None = getattr(
            self.planner, "count_steps", None
        )
        self._stretch: Stretch | None = None

    def begin(self, plan: Plan) -> None:
        """Carry out a plan, for many steps where it goes on."""
        stretch = None if self.is_step_by_step else self._foresee(plan)
        if stretch is None:
            super().begin(plan)
        else:
            self._start(stretch)

    def _foresee(self, plan: Plan) -> Stretch | None:
        """Work out when the steps of a plan that goes on will end; None where it is not worth it."""
        count_steps = self._count_steps
        if count_steps and not self._may_go_on(plan):
            count_steps = None
        if not (plan.repeats or count_steps):
            return None
        now_s, correction, notify_at_s = self.kernel.now_s, self.correction, self.notify_at_s
        rows = self.table.find(plan.batch.request_ids)
        ends, seconds = self.outputs.foresee(rows, self.lines, self.engine.room(), now_s)
        if count_steps:
            notify_at_s = min(notify_at_s, self.ageing.next_look_s)
            ends = ends if correction is None else ends[: correction.num_steady]
        ends = ends[: bisect_left(ends, notify_at_s) + 1]
        if count_steps and len(ends) > 1:
            ends = ends[: count_steps(self.state(now_s), plan, ends)]
        return None if len(ends) < 2 else Stretch(plan, rows, ends, seconds[: len(ends)])

    def _may_go_on(self, plan: Plan) -> bool:
        """Tell whether a plan is worth asking about: all hold promises of their own and decode, one token each."""
        table, aged = self.table, self.ageing.chosen
        if len(plan.batch.request_ids) != len(table) or self.limits.max_draft_length or plan.at_risk:
            return False
        rows = table.rows
        decoding = (rows["num_output_tokens"] > 0) & (
            rows["num_computed_tokens"] == rows["num_prompt_tokens"] + rows["num_output_tokens"] - 1
        )
        return bool(
            (decoding & (rows["tier"] == Tier.PROMISED)).all()
            and (rows["status"] == Status.RUNNING).all()
            and (aged is None or aged not in table)
        )

    def _start(self, stretch: Stretch) -> None:
        self._stretch = stretch
        self.kernel.schedule(float(stretch.ends[-1]), Priority.STEP_END, lambda: self._arrive(stretch))

    def cut_short(self) -> None:
        """Let the step under way be the last one of a stretch."""
        stretch, now_s = self._stretch, self.kernel.now_s
        if stretch is None:
            return
        done = bisect_right(stretch.ends, now_s)
        between = done > 0 and stretch.ends[done - 1] == now_s
        if between or self.engine.pool.num_cached:  # whose prefixes steps that are done may have taken
            self.settle()
        elif done + 1 < len(stretch.ends):
            self._start(stretch.first(done + 1))

    def settle(self) -> None:
        """Bring what a stretch has done so far into the table; a step under way ends when it was to end."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            return
        now_s = self.kernel.now_s
        done = min(bisect_right(stretch.ends, now_s), len(stretch.ends) - 1)
        self._let_out(stretch.first(done))
        if done and stretch.ends[done - 1] == now_s:
            self.go_on()
        else:
            self.run(stretch.plan, float(stretch.ends[done]))

    def _arrive(self, stretch: Stretch) -> None:
        """Let out all steps of a stretch that nothing has come between."""
        if self._stretch is stretch:
            self._stretch = None
            self._let_out(stretch)
            self.go_on()

    def _let_out(self, stretch: Stretch) -> None:
        """Let out all steps of a stretch; finish requests."""
        done, count = len(stretch.ends), len(stretch.rows)
        if not done:
            return
        self.num_steps += done
        self.tokens_computed += done * count
        context = int(self.table.rows["num_computed_tokens"][stretch.rows].sum())
        num_blocks, ended = self.outputs.repeat(stretch.rows, self.limits.block_size, stretch.ends)
        self.engine.take(num_blocks)
        if self.correction is not None:
            for k, seconds in enumerate(stretch.seconds.tolist()):
                self.correction.observe(StepSample(count, count, context + k * count, 0, 0.0, 0, seconds))
        for index in ended:
            self.finish(index)
