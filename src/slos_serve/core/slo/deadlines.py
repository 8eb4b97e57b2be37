"""When tokens are due, and whether a stream kept its promises.

Theory of operation. A request arrives at `arrival`; t(n) is when the chunk that contains its n-th output
token arrives. The promise is cumulative, so that time gained is never lost:

    D = arrival + ttft                     the first token is on time if t(1) <= D
    t0 = max(D, t(1))                      t(1) where no TTFT is promised
    due(n) = t0 + tpot_thinking * min(n - 1, N) + tpot_answer * max(0, n - 1 - N)        for n >= 2

with N thinking tokens, which come before the answer. A request that thinks and has no thinking TPOT of
its own keeps its TPOT there too. Token n is late if t(n) > due(n); the primary rule looks at n = 10, 20,
... and at the last token. `e2e` (arrival to last token) and `max_gap` (between two tokens) must hold too.
N need not be known ahead: by the time token n is out, min(n - 1, N) is settled, so one pass decides.

Two secondary rules are reported beside it. They differ only in how TPOT is judged:

- mean: t(last) - t(1) is at most what TPOT grants those tokens, which is the goodput rule of
  `vllm bench serve` (with one output token TPOT counts as 0);
- window: so is t(n) - t(n - 10), for every n > 10; a shorter output is one window.

Times that differ by less than `TOLERANCE_S` are equal: a wall-clock time in a double resolves no finer.

For planning, `due` gives the same deadlines over the rows of a `RequestTable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slos_serve.core.types import Slo

TOLERANCE_S = 1e-6
CHECK_EVERY = 10
STAGES = ("prefill", "thinking", "answer")
OUTCOMES = ("met", "missed", "declined", "rejected", "failed", "cancelled", "none")


def granted_s(n: int, num_thinking_tokens: int, thinking_tpot_s: float, tpot_s: float) -> float:
    """Return the seconds that TPOT grants tokens 2..n; `inf` where a token among them has no TPOT."""
    if n - 1 <= num_thinking_tokens:
        return thinking_tpot_s * (n - 1) if n > 1 else 0.0
    thinking = thinking_tpot_s * num_thinking_tokens if num_thinking_tokens else 0.0
    return thinking + tpot_s * (n - 1 - num_thinking_tokens)


def due_s(n: int, arrival_s: float, first_token_s: float, slo: Slo, num_thinking_tokens: int = 0) -> float:
    """Return when output token `n` is due by the primary rule; `inf` where nothing is promised about it.

    For n = 1 that is the TTFT deadline; `first_token_s` is not read then.
    """
    deadline = -math.inf if slo.ttft_s is None else arrival_s + slo.ttft_s
    if n == 1:
        return math.inf if slo.ttft_s is None else deadline
    tpot = math.inf if slo.tpot_s is None else slo.tpot_s
    thinking_tpot = tpot if slo.thinking_tpot_s is None else slo.thinking_tpot_s
    return max(deadline, first_token_s) + granted_s(n, num_thinking_tokens, thinking_tpot, tpot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """How a finished stream did.

    `met`, `met_mean_tpot` and `met_window` are the primary and the two secondary rules; all are True where
    nothing was promised. `ttft_s` is `inf` if no token came; `tpot_s` is the mean after the first token;
    `e2e_s` counts to the last token (to the end, if none came). `stages` says for each of `STAGES` whether
    the checks that fell on its tokens held ("" where it had no tokens or no promise); an e2e miss belongs
    to no stage.
    """

    met: bool
    met_mean_tpot: bool
    met_window: bool
    ttft_s: float
    tpot_s: float
    e2e_s: float
    num_output_tokens: int
    stages: Mapping[str, str]


class StreamGrader:
    """Grade one stream while it runs, in constant memory.

    `thinks`: the request starts with a thinking span; without it thinking counts are ignored. Read
    `missed` for "can no longer be met", `first_token_s` and `last_token_s` (`inf` before a token), and
    `num_output_tokens`. Times are seconds on the clock of `arrival_s` and must not fall.
    """

    __slots__ = (
        "_answer_late",
        "_arrival_s",
        "_e2e_late",
        "_e2e_s",
        "_first",
        "_gap_late",
        "_gap_s",
        "_granted_start",
        "_last",
        "_next_check",
        "_num_thinking",
        "_paced",
        "_prefill_late",
        "_ring",
        "_still_thinking",
        "_thinking_late",
        "_thinking_tpot_s",
        "_tpot_s",
        "_ttft_s",
        "_window_late",
        "_window_s",
        "missed",
        "num_output_tokens",
    )

    def __init__(self, arrival_s: float, slo: Slo, thinks: bool = False) -> None:
        self._arrival_s = arrival_s
        # Limits relative to arrival, with the tolerance inside where they are only compared.
        self._ttft_s = math.inf if slo.ttft_s is None else slo.ttft_s
        self._tpot_s = math.inf if slo.tpot_s is None else slo.tpot_s
        self._thinking_tpot_s = self._tpot_s if slo.thinking_tpot_s is None else slo.thinking_tpot_s
        self._e2e_s = math.inf if slo.e2e_s is None else slo.e2e_s + TOLERANCE_S
        self._gap_s = math.inf if slo.max_gap_s is None else slo.max_gap_s + TOLERANCE_S
        self._paced = math.isfinite(self._tpot_s) or (thinks and math.isfinite(self._thinking_tpot_s))
        self._window_s = CHECK_EVERY * self._tpot_s + TOLERANCE_S
        self._still_thinking = thinks
        self._num_thinking = 0
        self._first = math.inf
        self._last = -math.inf
        self._granted_start = math.inf
        self._next_check = CHECK_EVERY
        self._ring = [0.0] * CHECK_EVERY  # t(n) at n % CHECK_EVERY, the last ten tokens
        self._prefill_late = self._thinking_late = self._answer_late = False
        self._e2e_late = self._gap_late = self._window_late = False
        self.missed = False
        self.num_output_tokens = 0

    @property
    def first_token_s(self) -> float:
        """When the first token came; `inf` before it."""
        return self._arrival_s + self._first

    @property
    def last_token_s(self) -> float:
        """When the newest token came; `inf` before the first."""
        return self._arrival_s + self._last if self.num_output_tokens else math.inf

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything that `feed` moves or reads: the attributes in the order of `__slots__`."""
        return tuple(getattr(self, name) for name in self.__slots__)

    @state.setter
    def state(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)

    def delay(self, seconds: float) -> None:
        """Move all deadlines, and what has been, so far back."""
        self._arrival_s += seconds

    def feed(self, time_s: float, num_new_tokens: int, num_new_thinking_tokens: int = 0) -> None:
        """Take one chunk of output that arrived at `time_s`, thinking tokens first."""
        if num_new_tokens <= 0:
            return
        t = time_s - self._arrival_s
        before = self.num_output_tokens
        after = self.num_output_tokens = before + num_new_tokens
        if self._still_thinking:
            self._num_thinking += min(max(num_new_thinking_tokens, 0), num_new_tokens)
            self._still_thinking = self._num_thinking == after
        if before:
            if t - self._last > self._gap_s:
                self._gap_late = True
                self._mark(before + 1)
        else:
            self._start(t)
        self._last = t
        if t > self._e2e_s:
            self._e2e_late = self.missed = True
        if self._paced:
            if after >= self._next_check:
                self._check(t, after)
            if not self._window_late:
                # The most frequent case, one answer token after ten others, is kept out of a call.
                if num_new_tokens == 1 and before - self._num_thinking >= CHECK_EVERY:
                    slot = after % CHECK_EVERY
                    self._window_late = t - self._ring[slot] > self._window_s
                    self._ring[slot] = t
                else:
                    self._slide(t, before, after)

    def finish(self, time_s: float) -> Grade:
        """Check the last token and return the grade of the stream that ended at `time_s`."""
        n = self.num_output_tokens
        if n == 0:
            return self._finish_silent(time_s - self._arrival_s)
        granted = granted_s(n, self._num_thinking, self._thinking_tpot_s, self._tpot_s)
        if n > 1 and self._last > self._granted_start + granted + TOLERANCE_S:
            self._mark(n)
        span = self._last - self._first
        mean_late = span > granted + TOLERANCE_S
        window_late = mean_late if n <= CHECK_EVERY else self._window_late
        other_late = self._prefill_late or self._e2e_late or self._gap_late
        return Grade(
            met=not self.missed,
            met_mean_tpot=not (other_late or mean_late),
            met_window=not (other_late or window_late),
            ttft_s=self._first,
            tpot_s=span / (n - 1) if n > 1 else 0.0,
            e2e_s=self._last,
            num_output_tokens=n,
            stages=self._stages(),
        )

    def _start(self, t: float) -> None:
        """Take the first token: grade the prefill and start the clock of TPOT."""
        self._first = t
        if t > self._ttft_s + TOLERANCE_S:
            self._prefill_late = self.missed = True
        self._granted_start = t if self._ttft_s == math.inf else max(t, self._ttft_s)

    def _check(self, t: float, after: int) -> None:
        """Check the multiples of ten that a chunk ending in token `after` contains.

        All came at `t` and due(n) rises, so the first one of each span decides for its span.
        """
        first = self._next_check
        self._next_check = after - after % CHECK_EVERY + CHECK_EVERY
        limit = t - self._granted_start - TOLERANCE_S
        if limit > granted_s(first, self._num_thinking, self._thinking_tpot_s, self._tpot_s):
            self._mark(first)
            answer = (self._num_thinking // CHECK_EVERY + 1) * CHECK_EVERY
            if first < answer <= after and limit > granted_s(
                answer, self._num_thinking, self._thinking_tpot_s, self._tpot_s
            ):
                self._mark(answer)

    def _mark(self, n: int) -> None:
        """Note that token `n` was late, on the account of its span."""
        self.missed = True
        if n <= self._num_thinking:
            self._thinking_late = True
        else:
            self._answer_late = True

    def _slide(self, t: float, before: int, after: int) -> None:
        """Check the windows that end in tokens before+1..after; windows inside one chunk take no time."""
        ring, thinking = self._ring, self._num_thinking
        for n in range(before + 1, min(after, before + CHECK_EVERY) + 1):
            slot = n % CHECK_EVERY
            if n > CHECK_EVERY:
                # of the ten gaps up to token n, those that end by token N + 1 are paced as thinking
                fast = min(max(thinking + CHECK_EVERY + 1 - n, 0), CHECK_EVERY)
                granted = granted_s(CHECK_EVERY + 1, fast, self._thinking_tpot_s, self._tpot_s)
                self._window_late = self._window_late or t - ring[slot] > granted + TOLERANCE_S
            ring[slot] = t

    def _stages(self) -> dict[str, str]:
        """Return met, missed or "" for each of `STAGES`."""
        gapped = self._gap_s < math.inf
        thinking = self._num_thinking > 0 and (gapped or self._thinking_tpot_s < math.inf)
        answer = self.num_output_tokens > self._num_thinking and (gapped or self._tpot_s < math.inf)
        return {
            "prefill": _stage(self._ttft_s < math.inf, self._prefill_late),
            "thinking": _stage(thinking, self._thinking_late),
            "answer": _stage(answer, self._answer_late),
        }

    def _finish_silent(self, t: float) -> Grade:
        """Grade a stream that ended without a token, `t` seconds after its arrival."""
        prefill_late = t > self._ttft_s + TOLERANCE_S
        met = not prefill_late and t <= self._e2e_s
        return Grade(
            met=met,
            met_mean_tpot=met,
            met_window=met,
            ttft_s=math.inf,
            tpot_s=0.0,
            e2e_s=t,
            num_output_tokens=0,
            stages={"prefill": "missed" if prefill_late else "", "thinking": "", "answer": ""},
        )


def _stage(promised: bool, late: bool) -> str:
    return ("missed" if late else "met") if promised else ""


def outcome(
    grade: Grade | None,
    *,
    has_slo: bool,
    promised: bool,
    rejected: bool = False,
    cancelled: bool = False,
    failed: bool = False,
) -> str:
    """Return the one outcome (of `OUTCOMES`) in which an offered request ends.

    `promised`: a promise was given before its first token, at arrival or by promotion. `grade` may be None
    for a request that never ran to an end: that is a failure unless another reason is given.
    """
    if not has_slo:
        return "none"
    if rejected:
        return "rejected"
    if cancelled:
        return "cancelled"
    if failed or grade is None:
        return "failed"
    if not promised:
        return "declined"
    return "met" if grade.met else "missed"
