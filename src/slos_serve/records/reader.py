"""Read what `serve --record FILE` wrote (see `records.writer`).

A file may hold several runs of a server, one after the other; the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Planner, ReplicaState
from slos_serve.errors import ConfigError
from slos_serve.named import make

SCHEMA = "slos-serve-record/1"
KINDS = ("engine", "model", "request", "plan")
OURS = "slos_serve.core."


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPlan:
    """One line of kind `plan`; `where` names it for people."""

    where: str
    document: Mapping[str, Any]

    def state(self) -> ReplicaState:
        """Return the planner's input; `ConfigError` where this version cannot read it."""
        try:
            return ReplicaState.from_json(self.document["state"])
        except (ValueError, KeyError, TypeError) as error:
            expected = f"a planner input of this version ({error})"
            raise ConfigError(where=self.where, key="state", value="...", expected=expected) from error


@dataclass(slots=True, kw_only=True)
class Recording:
    """The last run in a record. Steps, requests and plans are documents as they were written.

    `num_skipped` counts lines of the file that are no JSON object.
    `trusts_planner`: a planner that is not this package's may be imported, which runs its module.
    """

    path: Path
    engine: Mapping[str, Any]
    trusts_planner: bool = False
    model: Mapping[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    plans: list[RecordedPlan] = field(default_factory=list)
    num_skipped: int = 0

    def warning(self) -> str:
        """Return what to tell people of lines that were left out; "" where there are none."""
        return f"{self.path}: {self.num_skipped} lines are no JSON and were left out" if self.num_skipped else ""

    def reference(self) -> tuple[PerfModel, int]:
        """Return the pinned performance model and its token budget; `ConfigError` where none was recorded."""
        where = str(self.path)
        if self.model is None:
            expected = "a server that had a performance profile"
            raise ConfigError(where=where, key="model", value=None, expected=expected)
        try:
            return PerfModel.from_json(self.model["perf_model"]), int(self.model["max_num_batched_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            expected = f"a performance model ({error!r})"
            raise ConfigError(where=where, key="model", value="...", expected=expected) from error

    def find_request(self, request_id: str) -> str | None:
        """Return the engine's id of a request, given by that, by ours or by the client's; None where unknown.

        The engine's id is the client's with something appended.
        """
        known: dict[str, str | None] = {line["request_id"]: line.get("slo_id") for line in self.requests}
        for recorded in self.plans:
            known.update(dict.fromkeys(recorded.document["state"]["requests"]["request_ids"]) | known)
        for name, slo_id in known.items():
            if request_id in {name, slo_id}:
                return name
        return next((name for name in known if name.startswith(f"{request_id}-")), None)

    def plan_about(self, request_id: str) -> RecordedPlan | None:
        """Return the last plan with a verdict on a request, else the last one that knew it, by the engine's id."""
        about: RecordedPlan | None = None
        for recorded in self.plans:
            if any(verdict["request_id"] == request_id for verdict in recorded.document["plan"]["verdicts"]):
                about = recorded
        known = (p for p in reversed(self.plans) if request_id in p.document["state"]["requests"]["request_ids"])
        return about or next(known, None)

    def planner(self) -> Planner:
        """Construct the planner that made the plans; only this package's are imported, unless `trusts_planner`."""
        name = str(self.engine.get("planner"))
        if not (name.startswith(OURS) or self.trusts_planner):
            expected = f"a planner below {OURS[:-1]} (--trust-planner imports any other)"
            raise ConfigError(where=str(self.path), key="planner", value=name, expected=expected)
        planner: Planner = make(name, where=str(self.path), key="planner", **self.engine.get("planner_options", {}))
        return planner


def read_recording(path: Path, *, trusts_planner: bool = False) -> Recording:
    """Read the last run of a record; `ConfigError` names the line that does not fit.

    A line that was cut short, by a server that was killed or a full disk, is left out and counted.
    """
    recording: Recording | None = None
    bad: list[str] = []
    for where, line in _lines(path, bad):
        kind = line.get("kind")
        if kind is None and "num_tokens" in line and "seconds" in line:
            if recording is not None:
                recording.steps.append(line)
            continue
        if kind not in KINDS:
            raise ConfigError(where=where, key="kind", value=kind, expected=f"a step or one of {', '.join(KINDS)}")
        if kind == "engine":
            if line.get("schema") != SCHEMA:
                raise ConfigError(where=where, key="schema", value=line.get("schema"), expected=SCHEMA)
            recording = Recording(path=path, engine=line, trusts_planner=trusts_planner)
        elif recording is None:
            raise ConfigError(where=where, key="kind", value=kind, expected="an engine line before it")
        elif kind == "model":
            recording.model = line
        elif kind == "request":
            recording.requests.append(line)
        else:
            recording.plans.append(RecordedPlan(where=where, document=line))
    if recording is None and bad:
        raise ConfigError(where=bad[0], key="line", value="...", expected="a JSON object, and an engine line somewhere")
    if recording is None:
        expected = f"a record of serve --record of this version ({SCHEMA}); none of its lines describes an engine"
        raise ConfigError(where="arguments", key="RECORD", value=str(path), expected=expected)
    recording.num_skipped = len(bad)
    return recording


def _lines(path: Path, bad: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, document) of each line; where those are that hold none goes to `bad`."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                line = _document(raw)
                if line is not None:
                    yield where, line
                elif raw.strip():
                    bad.append(where)
    except OSError as error:
        expected = f"a file that serve --record wrote ({error.strerror})"
        raise ConfigError(where="arguments", key="RECORD", value=str(path), expected=expected) from None


def _document(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None
