"""Why a step took many times as long as predicted: what the engine's process can tell of itself.

Garbage is collected while nothing else of the process runs; a thread that may run waits where others have the CPUs; our
own code takes time. What none of these explains was spent in the engine's executor, on the device, or between steps.
"""

from __future__ import annotations

import gc
import time
from typing import NamedTuple

from slos_serve.vllm_plugin.safety.cost import CpuWait


class Spent(NamedTuple):
    """Seconds of one stalled step: in collections, waiting for a CPU, and in our code."""

    collecting_s: float
    waiting_s: float
    ours_s: float

    def text(self) -> str:
        """Return what there is to say, the longest first."""
        words = {
            "collecting garbage": self.collecting_s,
            "waiting for a CPU that others had": self.waiting_s,
            "in the scheduler's own code": self.ours_s,
        }
        said = [f"{1000 * s:.0f} ms {what}" for what, s in sorted(words.items(), key=lambda one: -one[1]) if s >= 1e-3]
        return ", ".join(said) or "nothing that this process knows of: the device, its executor, or the machine"


class Stalls:
    """Count what can hold up the calling thread; `mark` now and then, and `since` tells what there was after it."""

    def __init__(self) -> None:
        self._collected_s = 0.0
        self._began_s = 0.0
        self.cpu_wait = CpuWait()
        self._marked = (0.0, self.cpu_wait.read_s())
        gc.callbacks.append(self._collect)

    def close(self) -> None:
        """Watch no longer."""
        if self._collect in gc.callbacks:
            gc.callbacks.remove(self._collect)
        self.cpu_wait.close()

    def mark(self) -> None:
        """Count from now on; on the thread that is watched."""
        self._marked = (self._collected_s, self.cpu_wait.read_s())

    def since(self, ours_s: float) -> Spent:
        """Return what held the thread up since the last mark; `ours_s` is what our code took."""
        collected_s, waited_s = self._marked
        return Spent(self._collected_s - collected_s, max(0.0, self.cpu_wait.read_s() - waited_s), ours_s)

    def _collect(self, phase: str, _info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began_s = now
        else:
            self._collected_s += now - self._began_s
