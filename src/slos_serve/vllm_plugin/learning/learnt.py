"""What was learnt from live steps, kept across restarts in a file beside the profile.

The correction of the performance model with its margins, output lengths and acceptance of drafts. The file
belongs to one profile: to its key, and to the very model in it. What cannot be used is a warning and a fresh
start; writing is atomic, so that a crash leaves the old file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.core.fit import OnlineCorrection
from slos_serve.core.lengths import LengthModel

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.engine.tracking import Tracker
    from slos_serve.vllm_plugin.learning.drafting import DraftWatch
    from slos_serve.vllm_plugin.learning.learner import Learner

logger = logging.getLogger("vllm.slos_serve")

SCHEMA = "slos-serve-learnt/1"
ATTEMPTS = 5


class Learnt:
    """Save and restore what `learner`, `tracker` and `drafts` have learnt; `path` None keeps nothing.

    `begin` and `restore` belong to the scheduler's thread. `save` may run on another: it only reads, and tries again
    where a step changed a table under it.
    """

    def __init__(self, path: Path | None, learner: Learner, tracker: Tracker, drafts: DraftWatch | None) -> None:
        self.path = path
        self._learner = learner
        self._tracker = tracker
        self._drafts = drafts
        self._saved_steps = 0

    def begin(self, max_num_batched_tokens: int) -> dict[str, Any]:
        """Take up the model that has come: pin the reference, so that slowdown SLOs mean something, and restore.

        Returns what a record says of the model. The budget (tokens) that the profile was measured with defines the
        reference, because graders read the same document; `max_num_batched_tokens` is taken where it names none.
        """
        reference, profile = self._learner.reference, self._learner.profile
        assert reference is not None
        known = {} if profile is None else profile.document
        budget = int(known.get("max_num_batched_tokens") or max_num_batched_tokens)
        for live in self._tracker.set_reference(lambda tokens: reference.prefill_seconds(tokens, budget)):
            live.verdict = ""
        self.restore()
        return {"perf_model": reference.to_json(), "max_num_batched_tokens": budget}

    def restore(self) -> bool:
        """Go on from the file, all of it or nothing; tell whether there was one to go on from."""
        if self.path is None:
            return False
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            self._apply(document)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("slos-serve: %s is not used, learning starts afresh: %s", self.path, error)
            return False
        logger.info("slos-serve: goes on from %d steps learnt before (%s)", self._saved_steps, self.path)
        return True

    def _apply(self, document: Mapping[str, Any]) -> None:
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema = {document['schema']!r}: expected {SCHEMA!r}")
        if document["key"] != self._learner.full_key:
            raise ValueError(f"it was learnt on {document['key']!r}, this engine is {self._learner.full_key!r}")
        correction = OnlineCorrection.from_json(document["correction"])
        if correction.base != self._learner.reference:
            raise ValueError("its performance model is not the profile's")
        hints = self._tracker.lengths.hints  # the operator's present ones
        lengths = LengthModel.from_json({**document["lengths"], "hints": hints})
        if self._drafts is not None:
            self._drafts.restore(document["acceptance"])
        self._learner.correction, self._tracker.lengths = correction, lengths
        self._saved_steps = correction.num_steps

    def save(self) -> None:
        """Write what is new to the file; a disk that refuses is a warning."""
        correction = self._learner.correction
        if self.path is None or correction is None or correction.num_steps == self._saved_steps:
            return
        document = self._document(correction)
        if document is None:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            partial.write_text(json.dumps(document), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            logger.warning("slos-serve: what was learnt cannot be kept in %s: %s", self.path, error)
            self.path = None
        self._saved_steps = correction.num_steps

    def _document(self, correction: OnlineCorrection) -> dict[str, Any] | None:
        for _ in range(ATTEMPTS):
            try:
                return {
                    "schema": SCHEMA,
                    "key": self._learner.full_key,
                    "correction": correction.to_json(),
                    "lengths": self._tracker.lengths.to_json(),
                    "acceptance": {} if self._drafts is None else self._drafts.to_json(),
                }
            except RuntimeError:  # a table changed its size while it was read
                continue
        return None
