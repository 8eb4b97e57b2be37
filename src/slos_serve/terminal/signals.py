"""What a person's Ctrl-C and a supervisor's SIGTERM do while something runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType


def ending_by_signal() -> AbstractContextManager[None]:
    """Turn SIGTERM and SIGHUP into `KeyboardInterrupt`, so that servers are ended as on Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    return handling((signal.SIGTERM, signal.SIGHUP), interrupt)


@contextlib.contextmanager
def handling(signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give some signals to a handler while the block runs."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
