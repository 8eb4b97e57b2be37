"""Our own faults: counted by kind, the first of each kind logged with a state that replays it."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from slos_serve.places import open_new, private_folder, writable

if TYPE_CHECKING:
    from slos_serve.core.types import ReplicaState

logger = logging.getLogger("vllm.slos_serve")

MAX_DUMPS = 5


class Faults:
    """Count faults; never raises."""

    def __init__(self, folder: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._num_dumps = 0

    def add(self, kind: str, error: Exception, state: ReplicaState | None = None) -> None:
        """Count one fault; log the first of its kind and write the planner's whole input to a file."""
        self.counts[kind] += 1
        if self.counts[kind] > 1 or self._num_dumps >= MAX_DUMPS:
            return
        self._num_dumps += 1
        where = "none" if state is None else self._dump(kind, state)
        logger.error("SLO scheduler fault (%s): vLLM's own order goes on; state: %s", kind, where, exc_info=error)

    def _dump(self, kind: str, state: ReplicaState) -> str:
        """Write a state; return the file, or why there is none."""
        try:
            folder = writable(self._folder) if self._folder else private_folder("faults")
            path = folder / f"slos-serve-fault-{os.getpid()}-{self._num_dumps}-{kind}.json"
            with open_new(path) as file:
                file.write(json.dumps(state.to_json()))
        except Exception as error:  # noqa: BLE001 - a dump is a convenience
            return f"not written ({error})"
        return str(path)
