"""Planners and routers by the name that people give: one of ours, or `package.module:Class` of their own."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slos_serve.core.routing import routers
from slos_serve.core.routing.routers import ROUTERS
from slos_serve.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from slos_serve.core.routing.routers import Router


def is_own(name: str) -> bool:
    """Tell whether a name is a class's (`package.module:Class`), rather than one from a list."""
    return ":" in name


def find_class(name: str, *, where: str, key: str) -> Any:
    """Import `package.module:Class` (or `package.module.Class`); `ConfigError` says what is wrong with the name.

    Modules in the working directory are found too, as by `python -m`.
    """
    module, _, attribute = name.replace(":", ".").rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        expected = f"package.module:Class that can be imported from here ({error})"
        raise ConfigError(where=where, key=key, value=name, expected=expected) from error
    if not callable(found):
        raise ConfigError(where=where, key=key, value=name, expected="a class")
    return found


def make(name: str, *, where: str, key: str, **options: Any) -> Any:
    """Import a class and construct it; `ConfigError` also where it does not take the options."""
    found = find_class(name, where=where, key=key)
    try:
        return found(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            where=where, key=key, value=name, expected=f"a class that takes {options} ({error})"
        ) from error


def check_router(name: str, *, where: str, key: str, more: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a router that is neither one of ours, nor of `more`, nor a class to be imported."""
    if is_own(name):
        find_class(name, where=where, key=key)
    elif name not in (*ROUTERS, *more):
        expected = f"one of {', '.join((*ROUTERS, *more))}, or package.module:Class"
        raise ConfigError(where=where, key=key, value=name, expected=expected)


def make_router(name: str, *, rng: np.random.Generator | None = None, **options: Any) -> Router:
    """Return a router, ours by its name or somebody's own by its class; `rng` is for ours that draw."""
    if is_own(name):
        own: Router = make(name, where="arguments", key="router", **options)
        return own
    return routers.make_router(name, rng=rng, **options)


def digest(name: str) -> str:
    """Return a digest of the file that a class is in: what it does may change when that does."""
    source = inspect.getsourcefile(find_class(name, where="arguments", key="name"))
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else ""
