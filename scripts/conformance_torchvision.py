"""Stands in for torchvision where there is none: every name imports and nothing works.

vLLM's CPU build goes without torchvision, but the module of an image model imports it, and the scheduler's tests of
image requests need that module's class; no image is ever processed in them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any


class _Name(type):
    """A class whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        """Find anything below torchvision."""
        del path, target
        return (
            importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            if fullname.startswith("torchvision.")
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> _Module:
        """Make an empty module that has every name."""
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run nothing."""


if __name__ == "torchvision":
    __version__ = "0.28.0"
    sys.meta_path.append(_Finder())
    sys.modules[__name__].__class__ = _Module
