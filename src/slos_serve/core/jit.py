"""Compile the planner's inner loops where Numba is installed; run them as plain Python where not.

Both paths execute the same source, so they agree by construction; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    HAS_NUMBA = True

    def jit(function: F) -> F: ...

else:
    try:
        import numba
    except ImportError:
        HAS_NUMBA = False

        def jit(function):
            return function

    else:
        HAS_NUMBA = True

        def jit(function):
            return numba.njit(cache=True, fastmath=False)(function)
