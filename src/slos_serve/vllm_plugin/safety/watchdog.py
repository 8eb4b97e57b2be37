"""Cut off a planner that hangs: an exception is raised inside it from another thread.

A planner is bounded by its work limit; this is for the one that is broken. Python code and the calls it makes
into compiled loops are interrupted, one endless compiled loop is not: that one holds Python's lock.
"""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class PlannerHungError(RuntimeError):
    """A plan took longer than it ever may."""


class Watchdog:
    """A context manager around planning; `interrupt` is called by another thread every now and then."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.num_interrupts = 0
        self._lock = threading.Lock()
        self._thread = 0
        self._ends_at: float | None = None

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        self._ends_at = time.monotonic() + self.limit_s

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ends_at = None
            _raise_in(ctypes.c_ulong(self._thread), None)  # one that has not struck yet must strike nobody else

    def interrupt(self) -> None:
        """Raise `PlannerHungError` in a plan that is over its time."""
        with self._lock:
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                self._ends_at = None
                self.num_interrupts += 1
                _raise_in(ctypes.c_ulong(self._thread), ctypes.py_object(PlannerHungError))
