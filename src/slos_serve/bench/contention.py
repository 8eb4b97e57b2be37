"""How far other work on the machine held a server up during a run: that decides whether the run may count."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

    from slos_serve.bench.engines import ServerProcess


def threads_of(engine: ServerProcess) -> dict[str, tuple[int, int]]:
    """Return nanoseconds run, and waited for a processor, by thread of a server and of all its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
    found, family = {}, [engine.process.pid]
    while family:
        pid = family.pop()
        family += [child for child, parent in parents.items() if parent == pid]
        for path in Path(f"/proc/{pid}").glob("task/*/schedstat"):
            with contextlib.suppress(OSError):
                ran, waited, _ = map(int, path.read_text("ascii").split())
                found[path.parent.name] = (ran, waited)
    return found


class CpuContention:
    """Measure the share of the time for which a server's busiest thread was ready and got no processor: `waited`."""

    def __init__(self, engine: ServerProcess) -> None:
        self.waited = 0.0
        self._engine = engine

    def __enter__(self) -> Self:
        self._began_s, self._before = time.perf_counter(), threads_of(self._engine)
        return self

    def __exit__(self, *_: object) -> None:
        took_s = time.perf_counter() - self._began_s
        used = [
            (ran - before[0], waited - before[1])
            for thread, (ran, waited) in threads_of(self._engine).items()
            for before in [self._before.get(thread, (0, 0))]
        ]
        self.waited = max(used, default=(0, 0))[1] / 1e9 / took_s
