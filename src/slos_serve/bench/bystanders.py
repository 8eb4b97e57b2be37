"""How much of the machine went to others while something was measured (Linux)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from slos_serve.bench.engines import Engine

if TYPE_CHECKING:
    from typing import Self


class Bystanders:
    """Measure which share of the machine went to anything but this process and the servers."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self.share = 0.0
        self._sessions = {engine.process.pid for engine in engines}  # each server leads a session

    def __enter__(self) -> Self:
        self._before = self._ticks()
        return self

    def __exit__(self, *_: object) -> None:
        others, available = (after - before for after, before in zip(self._ticks(), self._before, strict=True))
        self.share = max(0.0, others / max(available, 1))

    def _ticks(self) -> tuple[int, int]:
        """Return the ticks that others have used and that there were, all cores together."""
        line = Path("/proc/stat").read_text("ascii").splitlines()[0]
        user, nice, system, idle, iowait, *rest = map(int, line.split()[1:9])
        busy = user + nice + system + sum(rest)
        return busy - self._own_ticks(), busy + idle + iowait

    def _own_ticks(self) -> int:
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
                if int(fields[3]) in self._sessions or path.parent.name == str(os.getpid()):
                    total += int(fields[11]) + int(fields[12])
        return total
