"""Who else used the processors during a run: on a shared machine, that decides whether the run may count."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from slos_serve.bench.engines import Engine

if TYPE_CHECKING:
    from typing import Self

EVERY_S = 2.0  # what ends between two looks counts as `share`, whatever it was
OURS, YIELDING, OTHER = range(3)
SCHED_IDLE = 5


class Bystanders:
    """Measure which shares of the machine, all cores together, went to anything but this process and the servers.

    `share`: to what competes with them, and to other guests of the host; `yielding`: to processes of the kernel's
    idle class, which give way at once.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        self.share = self.yielding = 0.0
        self._sessions = {engine.process.pid for engine in engines}  # each server leads a session
        self._used = [0, 0, 0]
        self._available = self._busy_before = self._available_before = 0
        self._ticks_before: dict[int, tuple[int, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._used, self._available = [0, 0, 0], 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()
        available = max(self._available, 1)
        self.share, self.yielding = self._used[OTHER] / available, self._used[YIELDING] / available

    def _watch(self) -> None:
        while not self._stopped.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        """Add up what was used since the look before."""
        line = Path("/proc/stat").read_text("ascii").splitlines()[0]
        user, nice, system, idle, iowait, *rest = map(int, line.split()[1:9])
        busy = user + nice + system + sum(rest)
        available = busy + idle + iowait
        ticks = self._ticks()
        known = [0, 0]
        for pid, (kind, count) in ticks.items():
            known[kind] += max(0, count - self._ticks_before.get(pid, (kind, 0))[1])
        self._used[OURS] += known[OURS]
        self._used[YIELDING] += known[YIELDING]
        self._used[OTHER] += max(0, busy - self._busy_before - sum(known))
        self._available += available - self._available_before
        self._busy_before, self._available_before, self._ticks_before = busy, available, ticks

    def _ticks(self) -> dict[int, tuple[int, int]]:
        """Return (kind, ticks used) of our processes and of the idle class's, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
                pid = int(path.parent.name)
                is_ours = int(fields[3]) in self._sessions or pid == os.getpid()
                if is_ours or int(fields[38]) == SCHED_IDLE:
                    found[pid] = (OURS if is_ours else YIELDING, int(fields[11]) + int(fields[12]))
        return found
