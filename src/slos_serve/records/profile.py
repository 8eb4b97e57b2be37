"""A measured profile as a file: the performance model, how good it is, and what it was measured on.

The same file configures the engine and is the frozen reference that both sides of a comparison are graded
with: a slowdown SLO is a multiple of `Profile.reference_s(prompt_tokens)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.core.fit import FitReport
from slos_serve.core.perf import PerfModel
from slos_serve.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self

SCHEMA = "slos-serve-profile/1"
DEFAULT_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A performance model and the token budget of the engine it was measured on."""

    perf_model: PerfModel
    max_num_batched_tokens: int
    document: Mapping[str, Any]

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, where: str) -> Self:
        """Read a profile document; `ConfigError` names what does not fit."""
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, Mapping) else document
            raise ConfigError(where=where, key="schema", value=found, expected=SCHEMA)
        try:
            model = PerfModel.from_json(document["perf_model"])
            budget = int(document.get("max_num_batched_tokens") or DEFAULT_BATCHED_TOKENS)
        except (KeyError, TypeError, ValueError) as error:
            expected = f"what `slos-serve profile` writes ({error!r})"
            raise ConfigError(
                where=where, key="perf_model", value=document.get("perf_model"), expected=expected
            ) from error
        return cls(perf_model=model, max_num_batched_tokens=budget, document=document)

    @classmethod
    def load(cls, path: Path, *, remedy: str = "made by `slos-serve profile`") -> Self:
        """Read a profile file; `ConfigError` where it is none, and `remedy` says whence one comes."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            expected = f"a file {remedy} ({error})"
            raise ConfigError(where="arguments", key="--profile", value=str(path), expected=expected) from error
        return cls.from_json(document, where=str(path))

    @property
    def key(self) -> str:
        """What the profile is valid for, as one text: as it stands there, or its JSON with sorted keys."""
        found = self.document.get("key")
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True)

    def reference_s(self, prompt_tokens: int) -> float:
        """Return the unloaded, uncached prefill time of a prompt, in seconds."""
        return self.perf_model.prefill_seconds(prompt_tokens, self.max_num_batched_tokens)

    @property
    def decode_step_s(self) -> float:
        """Seconds of an unloaded decode step: one request with 256 tokens of context."""
        return self.perf_model.seconds(1, 1, context_tokens=256)

    def largest_chunk_tokens(self, seconds: float, *, num_decodes: int = 0) -> int:
        """Return the most prompt tokens of one step that ends within `seconds` beside `num_decodes` decodes."""
        low, high = 0, 1 << 20
        while low < high:
            middle = (low + high + 1) // 2
            step_s = self.perf_model.seconds(
                middle + num_decodes,
                1 + num_decodes,
                context_tokens=256 * num_decodes,
                attention_pairs=middle * middle / 2,
            )
            low, high = (middle, high) if step_s <= seconds else (low, middle - 1)
        return low


def profile_document(
    report: FitReport, *, key: Mapping[str, Any] | str, max_num_batched_tokens: int | None = None
) -> dict[str, Any]:
    """Return the profile of a fit as a JSON document; `max_num_batched_tokens` None: of an engine that is not told."""
    return {
        "schema": SCHEMA,
        "key": dict(key) if isinstance(key, Mapping) else key,
        "perf_model": report.model.to_json(),
        "r2": report.r2,
        "mape_heldout": report.mape_heldout,
        "margin_coverage": report.margin_coverage,
        "num_steps": report.num_steps,
        "num_heldout": report.num_heldout,
        "num_stalls": report.num_stalls,
        "terms": list(report.terms),
        "longest_context": report.longest_context,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "max_num_batched_tokens": max_num_batched_tokens,
    }


def read_records(path: Path, *, start: int = 0) -> list[dict[str, Any]]:
    """Read step records from byte `start` on; a line still being written is left out. `ValueError` names a bad one."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read: {error.strerror}: expected step records, one JSON object a line"
        ) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "kind" in record:
            continue  # what the planner was asked, and the like
        if not isinstance(record, dict) or "seconds" not in record or "num_tokens" not in record:
            raise ValueError(f"{path}:{number}: expected a step record such as serve --record writes")
        records.append(record)
    return records
