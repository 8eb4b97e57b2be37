"""Compile the planner's inner loops where Numba is installed; run them as plain Python where not.

Both paths execute the same source, so they agree by construction; a test compares them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    HAS_NUMBA = True

    def jit(function: F) -> F: ...

else:
    try:
        import numba
        from numba.core import codegen
    except ImportError:
        HAS_NUMBA = False

        def jit(function):
            return function

    else:
        HAS_NUMBA = True
        # llvmlite's handle on its library answers to any name with a function, `__dict__` included. vLLM, from 0.31 on,
        # reads the `__dict__` of all that it finds in all modules when it makes a worker on CPUs, and ends there.
        with contextlib.suppress(AttributeError):
            codegen.ll.ffi.lib._fntab.setdefault("__dict__", {})  # noqa: SLF001

        def jit(function):
            return numba.njit(cache=True, fastmath=False)(function)
