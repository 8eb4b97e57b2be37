"""Append lines to a file that only its user reads, that stays bounded, and that no crash or full disk can spoil.

A line that was cut short (a kill, a full disk) is ended before the next one, so that it costs itself alone. At a
quarter of its bound a file becomes `NAME.1`, which becomes `NAME.2`, up to `NAME.3`; each begins with `header`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

NUM_OLDER = 3


class LineFile:
    """Append to `path`; never raises. `problem` says why nothing more is written, after the first error of the disk."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self.path = path
        self.header: list[str] = []
        self.problem = ""
        self._most = max_bytes // (NUM_OLDER + 1)
        self._is_whole = False

    def write(self, lines: Sequence[str]) -> bool:
        """Append lines, given without their ends; False where this is the write that failed, and the last one."""
        if self.problem:
            return True
        try:
            self._write("".join(line + "\n" for line in lines).encode())
        except OSError as error:
            self.problem = error.strerror or str(error)
            return False
        return True

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_full(len(data)):
            self._shift()
            data = "".join(line + "\n" for line in self.header).encode() + data
        # Opened each time: who moves the file away, or puts another in its place, is followed.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with os.fdopen(os.open(self.path, flags, 0o600), "ab", buffering=0) as file:
            if not self._is_whole and _is_torn(file.fileno()):
                data = b"\n" + data
            while data:
                data = data[file.write(data) :]
        self._is_whole = True

    def _is_full(self, num_more: int) -> bool:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size > 0 and found.st_size + num_more > self._most

    def _shift(self) -> None:
        for number in range(NUM_OLDER, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


def _is_torn(fd: int) -> bool:
    """Tell whether a file's last line has no end."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or not found.st_size:
        return False
    return os.pread(fd, 1, found.st_size - 1) != b"\n"
