"""What a person at the terminal sees of a benchmark on a cluster: our words, and not those of Ray and vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TERMINAL: list[IO[str]] = [sys.stderr]


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(text, file=TERMINAL[-1], flush=True)


@contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Send what this process and its children print to a file; `say` still reaches the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    TERMINAL.append(os.fdopen(os.dup(2), "w"))
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, 1):
            os.dup2(saved, number)
            os.close(saved)
        TERMINAL.pop().close()
