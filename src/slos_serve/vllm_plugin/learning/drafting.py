"""How often draft tokens are accepted, by class, and what draft length each class has now.

A verified draft of k tokens of which j are accepted tests min(j + 1, k) of them. A decode that was to have
drafts and got none (an n-gram drafter finds no match) counts as one refused token: to a planner that pays
for a length it is the same. Evidence fades and what is missing is filled by a prior, so that a class whose
drafts were given up is tried again after a while.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slos_serve.core.types import BatchPlan, RequestTable

PRIOR = 0.6
PRIOR_TOKENS = 20.0
FADE = 1.0 - 1.0 / 500.0  # by step


class DraftWatch:
    """Measure acceptance; hosts without speculation never construct it."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}
        self.next_length: int | None = None
        self._held: frozenset[str] = frozenset()
        self._accepted: dict[str, float] = {}
        self._tested: dict[str, float] = {}

    @property
    def acceptance(self) -> dict[str, float]:
        """The chance that a draft token is accepted, by class."""
        return {
            name: (self._accepted[name] + PRIOR * PRIOR_TOKENS) / (tested + PRIOR_TOKENS)
            for name, tested in self._tested.items()
        }

    def to_json(self) -> dict[str, list[float]]:
        """Return the evidence by class, (accepted, tested) tokens."""
        return {name: [self._accepted[name], tested] for name, tested in self._tested.items()}

    def restore(self, evidence: Mapping[str, Sequence[float]]) -> None:
        """Go on from `to_json`; `ValueError` for impossible counts, then nothing is changed."""
        if not all(0 <= accepted <= tested < math.inf for accepted, tested in evidence.values()):
            raise ValueError("acceptance: expected accepted tokens among tested ones")
        self._accepted = {name: float(accepted) for name, (accepted, _) in evidence.items()}
        self._tested = {name: float(tested) for name, (_, tested) in evidence.items()}

    def known(self, names: Iterable[str]) -> dict[str, float]:
        """Return the acceptance of the given classes, the prior where nothing was measured."""
        return {**dict.fromkeys(names, PRIOR), **self.acceptance}

    def fade(self) -> None:
        """Let evidence age by one step."""
        for counts in (self._accepted, self._tested):
            for name in counts:
                counts[name] *= FADE

    def observe(self, slo_class: str, num_drafts: int, num_new_tokens: int) -> None:
        """Take the outcome of one decode that was to verify drafts and got `num_drafts` of them."""
        accepted = min(max(num_new_tokens - 1, 0), num_drafts)
        tested = min(accepted + 1, num_drafts) if num_drafts else 1
        self._accepted[slo_class] = self._accepted.get(slo_class, 0.0) + accepted
        self._tested[slo_class] = self._tested.get(slo_class, 0.0) + tested

    def state(self, classes: Sequence[str], longest: int) -> dict[str, dict[str, Any]]:
        """Return what the planner is told: acceptance and present draft length by class."""
        lengths = {name: self.lengths.get(name, longest) for name in classes}
        return {"acceptance": self.known(classes), "draft_lengths": lengths}

    def take_plan(self, batch: BatchPlan, table: RequestTable) -> int | None:
        """Note a plan's draft lengths; return the length to draft for the next step, None for the engine's own."""
        index = [table.index(request_id) for request_id in batch.request_ids]
        classes = table.rows["class_index"][index].tolist()
        decodes = (table.rows["num_output_tokens"][index] > 0).tolist()
        lengths: dict[str, int] = {}
        for decode, class_index, length in zip(decodes, classes, batch.draft_lengths.tolist(), strict=True):
            if decode:
                name = table.classes[class_index]
                lengths[name] = max(length, lengths.get(name, 0))
        self.note_plan(lengths)
        return self.next_length

    def note_plan(self, lengths: Mapping[str, int]) -> None:
        """Remember the draft lengths that a plan gave to decodes, by class; empty where it had none."""
        if lengths:
            self.lengths.update(lengths)
            self.next_length = max(lengths.values())

    def without(self, scheduled: Mapping[str, int], held: Iterable[str]) -> frozenset[str]:
        """Return who of a step that was just scheduled could have no drafts, for they were `held` the step before."""
        returned = self._held.intersection(scheduled)
        self._held = frozenset(held)
        return returned

    def observe_outputs(
        self,
        live: Mapping[str, Any],
        drafts: Mapping[str, list[int]],
        outputs: Iterable[Any],
        without: frozenset[str] = frozenset(),
    ) -> None:
        """Take a step's outputs; `drafts` are the scheduled draft tokens by request; `without` is no evidence."""
        self.fade()
        if self.next_length == 0 and not drafts:
            return
        for output in outputs:
            one = live.get(output.request_id)
            if one is None or output.request_id in without:
                continue
            if one.has_begun and output.new_token_ids:
                count = len(drafts.get(output.request_id, ()))
                self.observe(one.slo_class, count, len(output.new_token_ids))
