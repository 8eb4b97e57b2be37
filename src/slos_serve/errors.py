"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SlosServeError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SlosServeError, ValueError):
    """Name where a configuration went wrong: file, key, value and what was expected."""

    def __init__(self, *, where: str, key: str, value: object, expected: str, hint: str = "") -> None:
        self.where = where
        self.key = key
        self.value = value
        self.expected = expected
        super().__init__(f"{where}: {key} = {value!r}: {hint}expected {expected}")


def unknown_name(*, where: str, key: str, value: str, names: Iterable[str], expected: str = "") -> ConfigError:
    """Return the error for a name that is none of `names`: the closest one, then what was expected, then all."""
    known = list(names)
    hint = "".join(f"did you mean {name}? " for name in get_close_matches(value, known, n=1))
    return ConfigError(where=where, key=key, value=value, expected=f"{expected}one of {', '.join(known)}", hint=hint)


class MissingExtraError(SlosServeError, ImportError):
    """Name the optional extra that provides a missing module."""

    def __init__(self, *, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'slos-serve[{extra}]'")
