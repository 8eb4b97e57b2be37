"""A progress bar on standard error for what takes longer than two seconds; silent where nobody watches."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing import Self

BAR_AFTER_S, BAR_EVERY_S, BAR_WIDTH = 2.0, 0.2, 40


@contextmanager
def said_if_slow(line: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Write `line` if the block takes longer than a bar would wait."""
    timer = threading.Timer(BAR_AFTER_S, print, (line,), {"file": stream or sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Bar:
    """Count parts of a job. Call it with parts done, what is `counted` so far, and the part that just ended."""

    def __init__(self, what: str, total: int, *, counted: str = "runs", stream: TextIO | None = None) -> None:
        self.what, self.total, self.counted = what, total, counted
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._started = self._drawn = time.monotonic()
        self._is_shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def __call__(self, done: int, count: int, name: str = "") -> None:
        """Show where the job is."""
        now = time.monotonic()
        if not self._is_terminal:
            if name:
                print(
                    f"{done}/{self.total} {name} ({count} {self.counted}, {now - self._started:.0f} s)",
                    file=self._stream,
                )
                self._stream.flush()
            return
        if now - self._started < BAR_AFTER_S or now - self._drawn < BAR_EVERY_S:
            return
        self._drawn, self._is_shown = now, True
        filled = done * BAR_WIDTH // max(1, self.total)
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        text = f"{self.what} [{bar}] {done}/{self.total}, {count} {self.counted}, {now - self._started:.0f} s"
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()

    def note(self, line: str) -> None:
        """Write a line above the bar."""
        self._clear()
        print(line, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
