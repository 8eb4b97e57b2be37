"""Compile the planner's inner loops where Numba is installed; run them as plain Python where not.

Both paths execute the same source, so they agree by construction; a test compares them.

What was compiled is kept on disk, for the next start. That is a convenience: where nothing can be kept or read
(read-only packages without a home, a full disk, a damaged file) the loops are compiled in memory, and
`why_not_kept` tells the host why, for one line in its log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_problems: list[str] = []
_caches: list[Any] = []


def why_not_kept() -> str:
    """Return why compiled loops could not be kept for the next start, the first reason found; "" where they are."""
    return _problems[0] if _problems else ""


def kept_in() -> str:
    """Return the folder that the loops imported so far are kept in; "" where they are not."""
    return str(_caches[0].cache_path) if _caches else ""


def num_damaged() -> int:
    """Count the loops imported so far whose kept form cannot be read; the next use replaces it."""
    return sum(not cache.is_readable() for cache in _caches)


def _note(error: Exception) -> None:
    if not _problems:  # the first says it: there is one for each loop
        _problems.append(" ".join(str(error).split()) or type(error).__name__)


if TYPE_CHECKING:
    HAS_NUMBA = True

    def jit(function: F) -> F: ...

    def jitable(function: F) -> F: ...

else:
    try:
        import numba
        from numba.core import codegen
        from numba.core.caching import FunctionCache
        from numba.extending import register_jitable as jitable  # plain Python where it is not called by a loop
    except ImportError:
        HAS_NUMBA = False

        def jit(function):
            return function

        jitable = jit

    else:
        HAS_NUMBA = True
        # llvmlite's handle on its library answers to any name with a function, `__dict__` included. vLLM, from 0.31 on,
        # reads the `__dict__` of all that it finds in all modules when it makes a worker on CPUs, and ends there.
        with contextlib.suppress(AttributeError):
            codegen.ll.ffi.lib._fntab.setdefault("__dict__", {})  # noqa: SLF001

        class _Cache(FunctionCache):
            """Numba's cache, without its errors: a loop that cannot be loaded is compiled."""

            def is_readable(self):
                try:
                    self._cache_file._load_index()  # noqa: SLF001 - the one step of loading that compiles nothing
                except Exception:  # noqa: BLE001 - as below
                    return False
                return True

            def load_overload(self, sig, target_context):
                try:
                    return super().load_overload(sig, target_context)
                except Exception as error:  # noqa: BLE001 - unpickling a damaged file raises anything
                    _note(error)
                    with contextlib.suppress(Exception):
                        self.flush()  # so that the next start finds a whole one
                    return None

            def save_overload(self, sig, data):
                try:
                    super().save_overload(sig, data)
                except Exception as error:  # noqa: BLE001 - it is compiled, and that is what counts
                    _note(error)

        def jit(function):
            compiled = numba.njit(fastmath=False)(function)
            try:
                cache = _Cache(function)
            except (RuntimeError, OSError) as error:  # no folder that could be written
                _note(error)
            else:
                _caches.append(cache)
                compiled._cache = cache  # noqa: SLF001 - what `cache=True` does, with our class
            return compiled
