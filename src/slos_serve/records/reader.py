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

    `trusts_planner`: a planner that is not this package's may be imported, which runs its module.
    """

    path: Path
    engine: Mapping[str, Any]
    trusts_planner: bool = False
    model: Mapping[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    plans: list[RecordedPlan] = field(default_factory=list)

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

    A last line without its end, from a server that was killed, is left out.
    """
    recording: Recording | None = None
    for where, line in _lines(path):
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
    if recording is None:
        expected = f"a record of serve --record of this version ({SCHEMA}); none of its lines describes an engine"
        raise ConfigError(where="arguments", key="RECORD", value=str(path), expected=expected)
    return recording


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    line = json.loads(raw)
                except ValueError:
                    if raw.endswith(b"\n"):
                        raise ConfigError(
                            where=where, key="line", value=raw[:40].decode(errors="replace"), expected="a JSON object"
                        ) from None
                    return
                if not isinstance(line, dict):
                    raise ConfigError(where=where, key="line", value=line, expected="a JSON object")
                yield where, line
    except OSError as error:
        expected = f"a file that serve --record wrote ({error.strerror})"
        raise ConfigError(where="arguments", key="RECORD", value=str(path), expected=expected) from None
