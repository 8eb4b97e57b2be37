"""What comes out of a step: tokens, accepted drafts, grades, ends; the truth that no planner sees.

`loops` does it for all requests of a batch. Python touches single ones only when they start, finish, or
outrun their predicted length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from slos_serve.core.lengths import length_quantile
from slos_serve.core.planning.columns import predicted_until
from slos_serve.sim.replica import loops
from slos_serve.sim.replica.requests import Record, SimRequest

if TYPE_CHECKING:
    from slos_serve.core.lengths import LengthModel
    from slos_serve.core.types import IntArray, RequestTable, Rows
    from slos_serve.sim.replica.engine import FloatArray, Step

ACCEPTANCE_PRIOR = 50.0  # draft tokens behind the acceptance a run starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How outputs come about and what is known of them.

    `acceptance`: true chance that a draft token is accepted, by class ("" for the others).
    `length_quantile`: of predicted output lengths. `known_lengths`: predictions are the truth (labelled
    runs only). `length_error` multiplies predicted lengths; `acceptance_drift` is added to the true chance every 100 s.
    """

    acceptance: Mapping[str, float] = field(default_factory=dict)
    acceptance_drift: float = 0.0
    length_quantile: float = 0.9
    length_error: float = 1.0
    known_lengths: bool = False


def predicted_length(
    lengths: LengthModel, sim: SimRequest, options: OutputOptions, produced: int = 0, quantile: float | None = None
) -> float:
    """Return the output length that a planner or a router is told, in tokens; at the options' quantile unless told."""
    if options.known_lengths:
        return float(sim.num_output_tokens)
    request = sim.request
    tokens = lengths.predict(
        request.slo_class,
        request.num_prompt_tokens,
        request.max_output_tokens,
        produced=produced,
        quantile=options.length_quantile if quantile is None else quantile,
    )
    if options.length_error == 1.0:
        return tokens
    return min(max(tokens * options.length_error, produced + 1.0), float(request.max_output_tokens))


class Outputs:
    """The records of live requests, row by row as in the table."""

    def __init__(
        self, table: RequestTable, lengths: LengthModel, rng: np.random.Generator, options: OutputOptions
    ) -> None:
        self.table = table
        self.lengths = lengths
        self.options = options
        self.records: list[Record] = []
        self.live: Rows = np.zeros(64, loops.LIVE_DTYPE)
        self._rng = rng
        self._drafted: dict[str, list[float]] = {}  # accepted and tested draft tokens by class
        self._measured: dict[str, float] = {}

    def add(self, sim: SimRequest, index: int, record: Record | None = None) -> None:
        """Follow a request that has just got row `index`, the last one; `record` is its past elsewhere."""
        if index == len(self.live):
            self.live = np.concatenate([self.live, np.zeros_like(self.live)])
        record = record or Record(sim)
        self.live[index] = (*record.grader.state, sim.num_output_tokens, sim.num_thinking_tokens)
        self.table.rows["missed"][index] = record.grader.missed
        self.records.append(record)
        self._predict(index)

    def _predict(self, index: int, produced: int | None = None) -> None:
        """Write what the planner is told of the output length."""
        row, sim = self.table.rows[index], self.records[index].sim
        if produced is None:
            produced = int(row["num_output_tokens"])
        predicted = predicted_length(self.lengths, sim, self.options, produced)
        drawn = predicted_length(self.lengths, sim, self.options, produced, length_quantile(int(row["seq"]), produced))
        row["predicted_output_tokens"], row["drawn_output_tokens"] = predicted, drawn

    def remove(self, index: int) -> Record:
        """Forget a request, here and in the table, and mirror how the table fills the hole."""
        record = self.records[index]
        record.grader.state = self.live[index].item()[:-2]
        last = len(self.table) - 1
        self.table.remove(record.sim.request.request_id)
        self.live[index] = self.live[last]
        self.records[index] = self.records[last]
        self.records.pop()
        return record

    def foretell(self, step: Step, ends_s: float) -> None:
        """Write when the tokens of a step under way are expected, as a plan that is made meanwhile is told."""
        rows, emits = self.table.rows, step.rows[step.batch[loops.EMITS] > 0]
        rows["last_token_s"][emits] = ends_s
        rows["first_token_s"][emits] = np.minimum(rows["first_token_s"][emits], ends_s)

    def emit(self, step: Step, now_s: float) -> list[int]:
        """Let a step's tokens out at `now_s`; return the rows that have ended, the highest first."""
        accepted = self._accept(step, now_s)
        flags = loops.emit_rows(step.rows, step.batch, accepted, self.table.rows, self.live, now_s)
        return self._ended(step.rows, flags, self._predict)

    def foresee(self, chosen: IntArray, lines: FloatArray, room: IntArray, now_s: float) -> tuple[FloatArray, ...]:
        """Return ends and durations of the steps of a batch of decodes until one of them ends; see `loops.foresee`."""
        return loops.foresee(chosen, self.table.rows, self.live, lines, room, now_s)

    def repeat(self, chosen: IntArray, block_size: int, ends: FloatArray) -> tuple[int, list[int]]:
        """Run a batch of decodes to each of `ends`; return KV blocks taken, and rows as `emit` does."""
        num_blocks, flags = loops.repeat(chosen, self.table.rows, self.live, block_size, ends)
        return num_blocks, self._ended(chosen, flags, self._predict_by_token)

    def _ended(self, chosen: IntArray, flags: IntArray, predict: Callable[[int], None]) -> list[int]:
        """Predict again what outran its prediction; return what has ended."""
        if not flags.any():
            return []
        if not self.options.known_lengths:
            for index in chosen[flags == loops.OUTRUN].tolist():
                predict(index)
        return sorted(chosen[flags & loops.FINISHED > 0].tolist(), reverse=True)

    def _predict_by_token(self, index: int) -> None:
        """Predict at each token that reached the prediction before it, as single steps do."""
        rows, at = self.table.rows, 0
        produced = int(rows["num_output_tokens"][index])
        while produced >= (told := predicted_until(rows, index)) and at < produced:
            at = max(math.ceil(told), at + 1)
            self._predict(index, at)

    def measured_acceptance(self) -> dict[str, float]:
        """Return accepted over tested draft tokens by class, starting from the configured figure."""
        if len(self._measured) != len(self.table.classes):
            for name in self.table.classes:
                accepted, tested = self._drafted.get(name, (0.0, 0.0))
                prior = ACCEPTANCE_PRIOR * self._acceptance(name)
                self._measured[name] = (accepted + prior) / (tested + ACCEPTANCE_PRIOR)
        return self._measured

    def _acceptance(self, name: str, now_s: float = 0.0) -> float:
        """Return the true chance at a time; at 0 it is what was measured before the run."""
        chance = self.options.acceptance.get(name, self.options.acceptance.get("", 0.0))
        return min(max(chance + self.options.acceptance_drift * now_s / 100.0, 0.0), 1.0)

    def _accept(self, step: Step, now_s: float) -> IntArray:
        """Return the draft tokens accepted before the first rejection, by request of the batch."""
        accepted = np.zeros(len(step.rows), np.int64)
        if not step.totals[loops.MOST_DRAFTS]:
            return accepted
        emits = step.batch[loops.EMITS] > 0
        drafts = step.batch[loops.DRAFTS, emits]
        classes = self.table.rows["class_index"][step.rows[emits]]
        chances = np.array([self._acceptance(name, now_s) for name in self.table.classes])[classes]
        with np.errstate(divide="ignore"):
            runs = np.log(self._rng.random(len(drafts))) / np.log(chances)
        taken = np.minimum(np.floor(np.minimum(runs, 1e9)), drafts).astype(np.int64)
        tested = np.minimum(taken + 1, drafts)
        for class_index in np.unique(classes[drafts > 0]).tolist():
            counts = self._drafted.setdefault(self.table.classes[class_index], [0.0, 0.0])
            counts[0] += float(taken[classes == class_index].sum())
            counts[1] += float(tested[classes == class_index].sum())
        self._measured = {}
        accepted[emits] = taken
        return accepted
