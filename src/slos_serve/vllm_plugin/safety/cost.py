"""What the plug-in costs: the CPU time of its code on the scheduler's thread, from one hand-over to the next.

CPU time, because on a busy machine the clock on the wall runs while others do. What of it users feel is the part
during which the device had nothing to do: under asynchronous scheduling a batch is in flight while the next is
planned, and only what exceeds it delays anybody. Nor is it our doing that others had the CPUs meanwhile.
"""

from __future__ import annotations

import os
import threading
from time import thread_time


class Cost:
    """A stopwatch of the calling thread's CPU time, in seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._spent_s = 0.0

    def start(self) -> None:
        """Begin to count; our code has been entered."""
        self._began = thread_time()

    def stop(self) -> None:
        """Stop counting; our code is left."""
        self._spent_s += thread_time() - self._began

    def take(self) -> float:
        """Return what was counted since the last call; our code is still in it."""
        now = thread_time()
        spent, self._spent_s, self._began = self._spent_s + now - self._began, 0.0, now
        return spent


class CpuWait:
    """For how long the thread that makes this has been able to run while others had the CPUs, in seconds."""

    def __init__(self) -> None:
        try:
            self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1

    def read_s(self) -> float:
        """Return the kernel's count since the thread began; 0 where there is none. Any thread may ask."""
        try:
            return int(os.pread(self._file, 128, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0

    def close(self) -> None:
        """Count no longer."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
