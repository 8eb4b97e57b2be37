"""Errors that a user can act on."""

from __future__ import annotations


class SlosServeError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SlosServeError, ValueError):
    """Name where a configuration went wrong: file, key, value and what was expected."""

    def __init__(self, *, where: str, key: str, value: object, expected: str) -> None:
        self.where = where
        self.key = key
        self.value = value
        self.expected = expected
        super().__init__(f"{where}: {key} = {value!r}: expected {expected}")


class MissingExtraError(SlosServeError, ImportError):
    """Name the optional extra that provides a missing module."""

    def __init__(self, *, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed: pip install 'slos-serve[{extra}]'")
