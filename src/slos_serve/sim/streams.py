"""What comes out of a step: tokens, accepted drafts, grades, ends; the truth that no planner sees.

Columns of the table are updated with index arrays. Python touches single requests only when they start,
finish, outrun their predicted length, or reach a token count that the grading rule looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.sim import inner
from slos_serve.sim.records import Record, SimRequest

if TYPE_CHECKING:
    from slos_serve.core.lengths import LengthModel
    from slos_serve.core.types import IntArray, RequestTable
    from slos_serve.sim.engine import Step

ACCEPTANCE_PRIOR = 50.0  # draft tokens behind the acceptance a run starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How outputs come about and what is known of them.

    `acceptance`: true chance that a draft token is accepted, by class ("" for the others).
    `length_quantile`: of predicted output lengths. `known_lengths`: predictions are the truth (labelled
    runs only). `exact_windows`: grade the window rule on every token (the primary rule needs no such thing).
    `length_error` multiplies predicted lengths; `acceptance_drift` is added to the true chance every 100 s.
    """

    acceptance: Mapping[str, float] = field(default_factory=dict)
    acceptance_drift: float = 0.0
    length_quantile: float = 0.9
    length_error: float = 1.0
    known_lengths: bool = False
    exact_windows: bool = True


def predicted_length(lengths: LengthModel, sim: SimRequest, options: StreamOptions, produced: int = 0) -> float:
    """Return the output length that a planner or a router is told, in tokens."""
    if options.known_lengths:
        return float(sim.num_output_tokens)
    request = sim.request
    tokens = lengths.predict(
        request.slo_class,
        request.num_prompt_tokens,
        request.max_output_tokens,
        produced=produced,
        quantile=options.length_quantile,
    )
    if options.length_error == 1.0:
        return tokens
    return min(max(tokens * options.length_error, produced + 1.0), float(request.max_output_tokens))


class Streams:
    """The records of live requests, row by row as in the table."""

    def __init__(
        self, table: RequestTable, lengths: LengthModel, rng: np.random.Generator, options: StreamOptions
    ) -> None:
        self.table = table
        self.lengths = lengths
        self.options = options
        self.records: list[Record] = []
        self._rng = rng
        self._truth: IntArray = np.zeros((64, 2), np.int64)  # output and thinking tokens
        self._drafted: dict[str, list[float]] = {}  # accepted and tested draft tokens by class
        self._thinks = False

    def predict(self, sim: SimRequest, produced: int = 0) -> float:
        """Return the output length that the planner is told."""
        return predicted_length(self.lengths, sim, self.options, produced)

    def add(self, sim: SimRequest, index: int, record: Record | None = None) -> None:
        """Follow a request that has just got row `index`, the last one; `record` is its past elsewhere."""
        if index == len(self._truth):
            self._truth = np.concatenate([self._truth, np.zeros_like(self._truth)])
        self._truth[index] = sim.num_output_tokens, sim.num_thinking_tokens
        self.records.append(record or Record(sim))
        self._thinks = self._thinks or sim.request.thinks

    def remove(self, index: int) -> Record:
        """Forget a request, here and in the table, and mirror how the table fills the hole."""
        record = self.records[index]
        last = len(self.table) - 1
        self.table.remove(record.sim.request.request_id)
        self._truth[index] = self._truth[last]
        self.records[index] = self.records[last]
        self.records.pop()
        return record

    def emit(self, step: Step, now_s: float) -> list[int]:
        """Let a step's tokens out at `now_s`; return the rows that have ended, the highest first."""
        emitting = step.rows[step.emits]
        if not len(emitting):
            return []
        rows = self.table.rows
        before = step.outputs_before[step.emits]
        new = self._accept(emitting, step.drafts[step.emits], now_s)
        after, flags = inner.emit_rows(
            emitting,
            before,
            new,
            self._truth,
            rows["num_output_tokens"],
            rows["num_computed_tokens"],
            rows["first_token_s"],
            rows["last_token_s"],
            rows["num_thinking_tokens"],
            rows["is_thinking"],
            rows["predicted_output_tokens"],
            rows["max_gap_s"],
            now_s,
            self._thinks,
        )
        if not flags.any() and not self.options.exact_windows:
            return []
        looked_at = np.full(len(flags), fill_value=True) if self.options.exact_windows else flags & inner.LOOKED_AT > 0
        self._grade(emitting[looked_at], after[looked_at], now_s)
        if not self.options.known_lengths:
            outrun = flags & inner.OUTRUN > 0
            for index, produced in zip(emitting[outrun].tolist(), after[outrun].tolist(), strict=True):
                rows["predicted_output_tokens"][index] = self.predict(self.records[index].sim, produced)
        return sorted(emitting[flags & inner.FINISHED > 0].tolist(), reverse=True)

    def measured_acceptance(self) -> dict[str, float]:
        """Return accepted over tested draft tokens by class, starting from the configured figure."""
        measured = {}
        for name in self.table.classes:
            accepted, tested = self._drafted.get(name, (0.0, 0.0))
            prior = ACCEPTANCE_PRIOR * self._acceptance(name)
            measured[name] = (accepted + prior) / (tested + ACCEPTANCE_PRIOR)
        return measured

    def _acceptance(self, name: str, now_s: float = 0.0) -> float:
        """Return the true chance at a time; at 0 it is what was measured before the run."""
        chance = self.options.acceptance.get(name, self.options.acceptance.get("", 0.0))
        return min(max(chance + self.options.acceptance_drift * now_s / 100.0, 0.0), 1.0)

    def _accept(self, emitting: IntArray, drafts: IntArray, now_s: float) -> IntArray:
        """Return new output tokens: one, and the draft tokens accepted before the first rejection."""
        new = np.ones(len(emitting), np.int64)
        if not drafts.any():
            return new
        classes = self.table.rows["class_index"][emitting]
        chances = np.array([self._acceptance(name, now_s) for name in self.table.classes])[classes]
        with np.errstate(divide="ignore"):
            runs = np.log(self._rng.random(len(emitting))) / np.log(chances)
        accepted = np.minimum(np.floor(np.minimum(runs, 1e9)), drafts).astype(np.int64)
        tested = np.minimum(accepted + 1, drafts)
        for class_index in np.unique(classes[drafts > 0]).tolist():
            counts = self._drafted.setdefault(self.table.classes[class_index], [0.0, 0.0])
            counts[0] += float(accepted[classes == class_index].sum())
            counts[1] += float(tested[classes == class_index].sum())
        new += accepted
        return new

    def _grade(self, looked_at: IntArray, after: IntArray, now_s: float) -> None:
        """Feed the graders of the rows whose rule looks at one of these tokens."""
        rows = self.table.rows
        for index, produced in zip(looked_at.tolist(), after.tolist(), strict=True):
            record = self.records[index]
            record.feed(now_s, produced)
            if record.grader.missed:
                rows["missed"][index] = 1
