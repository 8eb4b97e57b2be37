"""One line on standard error that says what is going on; silent where nobody watches."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing import Self

BAR_WIDTH = 24
REFRESH_S = 0.1


class Progress:
    """A progress bar on a terminal; elsewhere one line when it starts. Call it with the share that is done."""

    def __init__(self, what: str, *, stream: TextIO | None = None) -> None:
        self.what = what
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._show(0.0)
        else:
            print(f"{self.what} ...", file=self._stream, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def __call__(self, share: float) -> None:
        """Show that `share` (0 to 1) is done; nan where nobody can say."""
        now = time.monotonic()
        if self._is_terminal and now - self._shown >= REFRESH_S:
            self._shown = now
            self._show(share)

    def _show(self, share: float) -> None:
        seconds = time.monotonic() - self._started
        bar = ""
        if share == share:  # noqa: PLR0124 -- not nan
            done = round(BAR_WIDTH * min(max(share, 0.0), 1.0))
            bar = f" [{'#' * done}{'.' * (BAR_WIDTH - done)}]"
        self._stream.write(f"\r\x1b[K{self.what}{bar} {seconds:.0f} s")
        self._stream.flush()
