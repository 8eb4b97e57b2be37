"""What is shown on standard error while something takes long: one line that is written over on a terminal.

Elsewhere a `Bar` says which part has ended, and a `Progress` what begins; neither draws.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing import Self

AFTER_S = 2.0  # what is over by then shows no bar
EVERY_S = 0.1


@contextmanager
def said_if_slow(line: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Write `line` if the block takes longer than a bar would wait."""
    timer = threading.Timer(AFTER_S, print, (line,), {"file": stream or sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Line:
    """A line on a terminal that is written over, at most every `EVERY_S`; gone at the end of the block."""

    width = 40

    def __init__(self, what: str, *, stream: TextIO | None = None) -> None:
        self.what = what
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._drawn = -1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _draw(self, share: float, text: str) -> None:
        """Show a share (0 to 1; nan: nobody can say), and what is said behind it."""
        if self._is_terminal and (self._drawn < 0 or self._seconds - self._drawn >= EVERY_S):
            self._drawn = self._seconds
            bar = ""
            if share == share:  # noqa: PLR0124 - not nan
                filled = int(self.width * min(max(share, 0.0), 1.0))
                bar = f" [{'#' * filled}{'.' * (self.width - filled)}]"
            self._stream.write(f"\r\x1b[K{self.what}{bar} {text}{self._seconds:.0f} s")
            self._stream.flush()

    def _clear(self) -> None:
        if self._drawn >= 0:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Bar(_Line):
    """Count parts of a job. Call it with parts done, what is `counted` so far, and the part that just ended."""

    def __init__(self, what: str, total: int, *, counted: str = "runs", stream: TextIO | None = None) -> None:
        super().__init__(what, stream=stream)
        self.total, self.counted = total, counted

    def __call__(self, done: int, count: int, name: str = "") -> None:
        """Show where the job is."""
        counted = f"{count} {self.counted}, "
        if not self._is_terminal and name:
            self.note(f"{done}/{self.total} {name} ({counted}{self._seconds:.0f} s)")
        elif self._seconds >= AFTER_S:
            self._draw(done / max(1, self.total), f"{done}/{self.total}, {counted}")

    def note(self, line: str) -> None:
        """Write a line above the bar."""
        self._clear()
        print(line, file=self._stream, flush=True)


class Progress(_Line):
    """What is going on, from its beginning. Call it with the share that is done."""

    width = 24

    def __enter__(self) -> Self:
        if self._is_terminal:
            self(0.0)
        else:
            print(f"{self.what} ...", file=self._stream, flush=True)
        return self

    def __call__(self, share: float) -> None:
        """Show that `share` (0 to 1) is done; nan where nobody can say."""
        self._draw(share, "")
