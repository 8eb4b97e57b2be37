"""How long tokens are on their way from a step's end to their client's stream, learnt from first tokens.

The engine plans to the end of a step, a client's clock stops later: outputs cross a socket, become text, and with many
streams each waits for the others of its step. The edge knows when it wrote a stream's first chunk, the engine tells
afterwards when the token was there, both counted from the same stamped arrival. What nearly all take is taken off a new
request's time: its arrival is stamped so much earlier. The engine's guard (`guard_ms`) is for the rest of the way.
"""

from __future__ import annotations

from collections import deque

KEPT = 256  # of first tokens
KEPT_S = 60.0
QUANTILE = 0.98
LONGEST_S = 0.1
LEAST = 16


class Delivery:
    """The newest delivery times of one API process, in seconds. `now_s` is any clock that does not go back."""

    def __init__(self) -> None:
        self._noted: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._expected_s = 0.0

    def note(self, lag_s: float, now_s: float) -> None:
        """Learn from one first token."""
        self._noted.append((now_s, min(max(lag_s, 0.0), LONGEST_S)))
        self._forget(now_s)
        lags = sorted(lag for _, lag in self._noted)
        self._expected_s = lags[int(QUANTILE * (len(lags) - 1))] if len(lags) >= LEAST else 0.0

    def expected_s(self, now_s: float) -> float:
        """Return what nearly all first tokens of the last minute took at most; 0 where few were seen."""
        self._forget(now_s)
        return self._expected_s if len(self._noted) >= LEAST else 0.0

    def _forget(self, now_s: float) -> None:
        while self._noted and self._noted[0][0] < now_s - KEPT_S:
            self._noted.popleft()
