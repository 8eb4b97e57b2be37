"""What a router was told and what it answered, written down, and asked again without the cluster.

`Recorded` stands around a policy and appends one line of JSON for each thing it is told, each with all that the
policy saw: snapshots, arrivals with the replicas to choose from, ends. `replayed` puts the same questions to a
policy made anew, as the simulator does; a policy that draws no random numbers gives the same answers.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from slos_serve.core.routing.routers import Arrival, ReplicaSnapshot, Route, Router, make_router
from slos_serve.lines import LineFile

logger = logging.getLogger(__name__)

SCHEMA = "slos-serve-decisions/1"
MAX_BYTES = 1 << 30  # on disk, older parts beside the file included
ENDLESS = tuple(one.name for one in fields(Arrival) if one.default == math.inf)  # null in JSON: nothing is promised


class Recorded:
    """A router that passes everything on to `router` and appends it to `file`; see the module's text.

    A disk that refuses ends the record, with one line in the log, and never a request.
    """

    def __init__(self, router: Router, file: LineFile, *, policy: str, options: Mapping[str, Any]) -> None:
        self.hops, self.uses_snapshots = router.hops, router.uses_snapshots
        self.rank = router.rank
        self._router = router
        self._file = file
        self._write("router", schema=SCHEMA, policy=policy, options=dict(options))

    def observe(self, snapshot: ReplicaSnapshot) -> None:
        """Take a replica's newer snapshot."""
        self._write("observe", snapshot=snapshot.to_json())
        self._router.observe(snapshot)

    def forget(self, replica_id: str) -> None:
        """Drop what is known of a replica that has gone."""
        self._write("forget", replica=replica_id)
        self._router.forget(replica_id)

    def ended(self, request_id: str) -> None:
        """Note that a request has ended, or was taken back."""
        self._write("ended", request=request_id)
        self._router.ended(request_id)

    def place(self, arrival: Arrival, replica_id: str, now_s: float) -> None:
        """Count a request as sent to a replica, and nowhere else."""
        self._write("place", arrival=arrival_document(arrival), replica=replica_id, now_s=now_s)
        self._router.place(arrival, replica_id, now_s)

    def choose(self, arrival: Arrival, replica_ids: Sequence[str], now_s: float) -> Route:
        """Rank, and place with the first."""
        route = self._router.choose(arrival, replica_ids, now_s)
        self._write(
            "choose", arrival=arrival_document(arrival), replicas=list(replica_ids), now_s=now_s,
            chosen=route.replica_id, reason=route.reason,
        )  # fmt: skip
        return route

    def _write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values})
        if event == "router":
            self._file.header = [line]
        if not self._file.write([line]):
            logger.warning("the record of routes stops, %s: %s", self._file.path, self._file.problem)


def recorded(router: Router, path: str, *, policy: str, options: Mapping[str, Any]) -> Recorded:
    """Return `router` with a record beside `path`: its name with `-router-PID` added, as each ingress has its own."""
    own = Path(path).with_stem(f"{Path(path).stem}-router-{os.getpid()}")
    return Recorded(router, LineFile(own, max_bytes=MAX_BYTES), policy=policy, options=options)


def replayed(lines: Iterable[str]) -> Iterator[tuple[str | None, str | None]]:
    """Yield (chosen then, chosen now) for every decision of a record; `ValueError` for another file."""
    router: Router | None = None
    for line in lines:
        one = json.loads(line)
        event = one.get("event")
        if event == "router" and one.get("schema") == SCHEMA:
            router = make_router(one["policy"], **one["options"])
        elif router is None:
            raise ValueError(f"{line[:80].strip()!r}: expected the first line of a record, schema {SCHEMA}")
        elif event == "observe":
            router.observe(ReplicaSnapshot.from_json(one["snapshot"]))
        elif event == "forget":
            router.forget(one["replica"])
        elif event == "ended":
            router.ended(one["request"])
        elif event == "place":
            router.place(arrival_of(one["arrival"]), one["replica"], one["now_s"])
        else:
            route = router.choose(arrival_of(one["arrival"]), one["replicas"], one["now_s"])
            yield one["chosen"], route.replica_id


def arrival_document(arrival: Arrival) -> dict[str, Any]:
    """Return an arrival as JSON values."""
    return {name: None if value == math.inf else value for name, value in asdict(arrival).items()}


def arrival_of(document: Mapping[str, Any]) -> Arrival:
    """Rebuild from `arrival_document`."""
    endless = {name: math.inf for name in ENDLESS if document[name] is None}
    values: dict[str, Any] = {**document, "tried": tuple(document["tried"]), **endless}
    return Arrival(**values)
