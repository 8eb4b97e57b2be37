"""Many steps of one replica at once, where they run one batch again and again.

Where a plan says that it repeats, or the planner says how often it would make it again, the replica coasts: the
ends of its steps are worked out at once, and let out when the last of them ends or when something is to change, in
the middle of a step or between two. What comes of it is, to the bit, what steps taken one by one come to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slos_serve.core.fit import StepSample
from slos_serve.core.types import ReplicaState, Status, Tier
from slos_serve.sim.replica.kernel import Priority

if TYPE_CHECKING:
    from slos_serve.core.types import IntArray, Plan
    from slos_serve.sim.replica.engine import FloatArray
    from slos_serve.sim.replica.replica import Replica


@dataclass(frozen=True, slots=True)
class Coast:
    """Steps that run one batch again and again: rows of the table, and ends and durations in seconds."""

    plan: Plan
    rows: IntArray
    ends: FloatArray
    seconds: FloatArray

    def first(self, count: int) -> Coast:
        """Return its first steps."""
        return replace(self, ends=self.ends[:count], seconds=self.seconds[:count])


class Coasting:
    """Foresee the steps of `replica` that repeat, and let them out.

    `is_possible`: nobody looks at single steps, and how long one takes follows from its batch alone.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        options, hooks = replica.options, replica.hooks
        self.is_possible = not (
            options.async_lag or options.noise_sigma or options.pace or hooks.step or hooks.first_token
        )
        # A planner that can tell how often a plan of its own is made again.
        self._count_steps: Callable[[ReplicaState, Plan, FloatArray], int] | None = getattr(
            replica.planner, "count_steps", None
        )
        self._coast: Coast | None = None

    def set_off(self, plan: Plan, told_s: float) -> bool:
        """Work out when the steps of a plan that goes on will end; tell whether it is worth it.

        `told_s`: when the router wants the next report of the plan (s); fast steps stop there.
        """
        if not self.is_possible:
            return False
        count_steps = self._count_steps
        if count_steps and not self._may_go_on(plan):
            count_steps = None
        if not (plan.repeats or count_steps):
            return False
        replica = self._replica
        now_s, correction = replica.kernel.now_s, replica.correction
        rows = replica.table.find(plan.batch.request_ids)
        ends, seconds = replica.streams.foresee(rows, replica.lines, replica.engine.room(), now_s)
        if count_steps:
            told_s = min(told_s, replica.ageing.next_look_s)
            ends = ends if correction is None else ends[: correction.num_steady]
        ends = ends[: bisect_left(ends, told_s) + 1]
        if count_steps and len(ends) > 1:
            ends = ends[: count_steps(replica.state(now_s), plan, ends)]
        if len(ends) < 2:
            return False
        self._start(Coast(plan, rows, ends, seconds[: len(ends)]))
        return True

    def _may_go_on(self, plan: Plan) -> bool:
        """Tell whether a plan is worth asking about: all hold promises of their own and decode, one token each."""
        replica, batch = self._replica, plan.batch
        table, aged = replica.table, replica.ageing.chosen
        if len(batch.request_ids) != len(table) or replica.limits.max_draft_length or plan.at_risk:
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

    def _start(self, coast: Coast) -> None:
        self._coast = coast
        self._replica.kernel.schedule(float(coast.ends[-1]), Priority.STEP_END, lambda: self._arrive(coast))

    def cut_short(self) -> None:
        """Let the step under way be the last one of a coast."""
        coast, now_s = self._coast, self._replica.kernel.now_s
        if coast is None:
            return
        done = bisect_right(coast.ends, now_s)
        between = done > 0 and coast.ends[done - 1] == now_s
        if between or self._replica.engine.pool.num_cached:  # whose prefixes steps that are done may have taken
            self.settle()
        elif done + 1 < len(coast.ends):
            self._start(coast.first(done + 1))

    def settle(self) -> None:
        """Bring what a coast has done so far into the table; a step under way ends when it was to end."""
        coast, self._coast = self._coast, None
        if coast is None:
            return
        now_s = self._replica.kernel.now_s
        done = min(bisect_right(coast.ends, now_s), len(coast.ends) - 1)
        self._let_out(coast.first(done))
        if done and coast.ends[done - 1] == now_s:
            self._replica.go_on()
        else:
            self._replica.run(coast.plan, float(coast.ends[done]))

    def _arrive(self, coast: Coast) -> None:
        """Let out all steps of a coast that nothing has come between."""
        if self._coast is coast:
            self._coast = None
            self._let_out(coast)
            self._replica.go_on()

    def _let_out(self, coast: Coast) -> None:
        """Let out all steps of a coast; finish requests."""
        replica, done, count = self._replica, len(coast.ends), len(coast.rows)
        if not done:
            return
        replica.num_steps += done
        replica.tokens_computed += done * count
        context = int(replica.table.rows["num_computed_tokens"][coast.rows].sum())
        num_blocks, ended = replica.streams.coast(coast.rows, replica.limits.block_size, coast.ends)
        replica.engine.take(num_blocks)
        if replica.correction is not None:
            for k, seconds in enumerate(coast.seconds.tolist()):
                replica.correction.observe(StepSample(count, count, context + k * count, 0, 0.0, 0, seconds))
        for index in ended:
            replica.finish(index)
