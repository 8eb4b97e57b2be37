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

There is one grader. Its functions take whatever has the fields of `GRADER` as attributes: a `StreamGrader`, or, called
from compiled loops, the row of an array of many streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.jit import jitable

if TYPE_CHECKING:
    from slos_serve.core.types import Slo

TOLERANCE_S = 1e-6
CHECK_EVERY = 10
STAGES = ("prefill", "thinking", "answer")
OUTCOMES = ("met", "missed", "declined", "rejected", "failed", "cancelled", "none")


# What the grade of a stream rests on. All times but `arrival_s` are seconds since arrival; limits that are only
# compared hold the tolerance. `ring`: t(n) at n % CHECK_EVERY, the last ten tokens.
GRADER = (
    ("arrival_s", np.float64),
    ("ttft_s", np.float64),
    ("tpot_s", np.float64),
    ("thinking_tpot_s", np.float64),
    ("e2e_s", np.float64),
    ("gap_s", np.float64),
    ("window_s", np.float64),
    ("paced", np.bool_),
    ("still_thinking", np.bool_),
    ("num_thinking", np.int64),
    ("first", np.float64),
    ("last", np.float64),
    ("granted_start", np.float64),
    ("next_check", np.int64),
    ("ring", np.float64, (CHECK_EVERY,)),
    ("thinking_slack_s", np.float64),
    ("answer_slack_s", np.float64),
    ("prefill_late", np.bool_),
    ("thinking_late", np.bool_),
    ("answer_late", np.bool_),
    ("e2e_late", np.bool_),
    ("gap_late", np.bool_),
    ("window_late", np.bool_),
    ("missed", np.bool_),
    ("num_output_tokens", np.int64),
)


@jitable
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
    to no stage. `least_slack_s` is the time to spare before TTFT or TPOT was due at the tightest of a stage's checks,
    negative where it was late, of the stages that had one.
    """

    met: bool
    met_mean_tpot: bool
    met_window: bool
    ttft_s: float
    tpot_s: float
    e2e_s: float
    num_output_tokens: int
    stages: Mapping[str, str]
    least_slack_s: Mapping[str, float]


@jitable
def feed_stream(stream: StreamGrader, time_s: float, num_new_tokens: int, num_new_thinking_tokens: int = 0) -> None:
    """Grade one chunk of output that arrived at `time_s`, thinking tokens first."""
    if num_new_tokens <= 0:
        return
    t = time_s - stream.arrival_s
    before = stream.num_output_tokens
    after = stream.num_output_tokens = before + num_new_tokens
    if stream.still_thinking:
        stream.num_thinking += min(max(num_new_thinking_tokens, 0), num_new_tokens)
        stream.still_thinking = stream.num_thinking == after
    if before:
        if t - stream.last > stream.gap_s:
            stream.gap_late = True
            _mark(stream, before + 1)
    else:
        _start(stream, t)
    stream.last = t
    if t > stream.e2e_s:
        stream.e2e_late = stream.missed = True
    if stream.paced:
        if after >= stream.next_check:
            _check(stream, t, after)
        if not stream.window_late:
            # The most frequent case, one answer token after ten others, is kept out of a call.
            if num_new_tokens == 1 and before - stream.num_thinking >= CHECK_EVERY:
                slot = after % CHECK_EVERY
                stream.window_late = t - stream.ring[slot] > stream.window_s
                stream.ring[slot] = t
            else:
                _slide(stream, t, before, after)


@jitable
def _start(stream: StreamGrader, t: float) -> None:
    """Take the first token: grade the prefill and start the clock of TPOT."""
    stream.first = t
    if t > stream.ttft_s + TOLERANCE_S:
        stream.prefill_late = stream.missed = True
    stream.granted_start = t if stream.ttft_s == math.inf else max(t, stream.ttft_s)


@jitable
def _check(stream: StreamGrader, t: float, after: int) -> None:
    """Check the multiples of ten that a chunk ending in token `after` contains.

    All came at `t` and due(n) rises, so the first one of each span decides for its span.
    """
    first = stream.next_check
    stream.next_check = after - after % CHECK_EVERY + CHECK_EVERY
    _judge(stream, first, t)
    if first <= stream.num_thinking:
        answer = (stream.num_thinking // CHECK_EVERY + 1) * CHECK_EVERY
        if answer <= after:
            _judge(stream, answer, t)


@jitable
def _judge(stream: StreamGrader, n: int, t: float) -> None:
    """Check token `n`, which came at `t`, against its pace."""
    took = t - stream.granted_start
    granted = granted_s(n, stream.num_thinking, stream.thinking_tpot_s, stream.tpot_s)
    if n <= stream.num_thinking:
        stream.thinking_slack_s = min(stream.thinking_slack_s, granted - took)
    else:
        stream.answer_slack_s = min(stream.answer_slack_s, granted - took)
    if took - TOLERANCE_S > granted:
        _mark(stream, n)


@jitable
def _mark(stream: StreamGrader, n: int) -> None:
    """Note that token `n` was late, on the account of its span."""
    stream.missed = True
    if n <= stream.num_thinking:
        stream.thinking_late = True
    else:
        stream.answer_late = True


@jitable
def _slide(stream: StreamGrader, t: float, before: int, after: int) -> None:
    """Check the windows that end in tokens before+1..after; windows inside one chunk take no time."""
    ring, thinking = stream.ring, stream.num_thinking
    for n in range(before + 1, min(after, before + CHECK_EVERY) + 1):
        slot = n % CHECK_EVERY
        if n > CHECK_EVERY:
            # of the ten gaps up to token n, those that end by token N + 1 are paced as thinking
            fast = min(max(thinking + CHECK_EVERY + 1 - n, 0), CHECK_EVERY)
            granted = granted_s(CHECK_EVERY + 1, fast, stream.thinking_tpot_s, stream.tpot_s)
            stream.window_late = stream.window_late or t - ring[slot] > granted + TOLERANCE_S
        ring[slot] = t


class StreamGrader:
    """Grade one stream while it runs, in constant memory.

    `thinks`: the request starts with a thinking span; without it thinking counts are ignored. Read
    `missed` for "can no longer be met", `first_token_s` and `last_token_s` (`inf` before a token), and
    `num_output_tokens`. Times are seconds on the clock of `arrival_s` and must not fall.
    """

    __slots__ = tuple(name for name, *_ in GRADER)

    def __init__(self, arrival_s: float, slo: Slo, thinks: bool = False) -> None:
        self.arrival_s = arrival_s
        self.ttft_s = math.inf if slo.ttft_s is None else slo.ttft_s
        self.tpot_s = math.inf if slo.tpot_s is None else slo.tpot_s
        self.thinking_tpot_s = self.tpot_s if slo.thinking_tpot_s is None else slo.thinking_tpot_s
        self.e2e_s = math.inf if slo.e2e_s is None else slo.e2e_s + TOLERANCE_S
        self.gap_s = math.inf if slo.max_gap_s is None else slo.max_gap_s + TOLERANCE_S
        self.paced = math.isfinite(self.tpot_s) or (thinks and math.isfinite(self.thinking_tpot_s))
        self.window_s = CHECK_EVERY * self.tpot_s + TOLERANCE_S
        self.still_thinking = thinks
        self.num_thinking = 0
        self.first = math.inf
        self.last = -math.inf
        self.granted_start = math.inf
        self.next_check = CHECK_EVERY
        self.ring = [0.0] * CHECK_EVERY
        self.thinking_slack_s = self.answer_slack_s = math.inf
        self.prefill_late = self.thinking_late = self.answer_late = False
        self.e2e_late = self.gap_late = self.window_late = False
        self.missed = False
        self.num_output_tokens = 0

    @property
    def first_token_s(self) -> float:
        """When the first token came; `inf` before it."""
        return self.arrival_s + self.first

    @property
    def last_token_s(self) -> float:
        """When the newest token came; `inf` before the first."""
        return self.arrival_s + self.last if self.num_output_tokens else math.inf

    @property
    def state(self) -> tuple[Any, ...]:
        """All that the grade rests on, in the order of `GRADER`."""
        return tuple(getattr(self, name) for name in self.__slots__)

    @state.setter
    def state(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            setattr(self, name, value)

    def delay(self, seconds: float) -> None:
        """Move all deadlines, and what has been, so far back."""
        self.arrival_s += seconds

    feed = feed_stream

    def finish(self, time_s: float) -> Grade:
        """Check the last token and return the grade of the stream that ended at `time_s`."""
        n = self.num_output_tokens
        if n == 0:
            return self._finish_silent(time_s - self.arrival_s)
        granted = granted_s(n, self.num_thinking, self.thinking_tpot_s, self.tpot_s)
        if n > 1:
            _judge(self, n, self.last)
        span = self.last - self.first
        mean_late = span > granted + TOLERANCE_S
        window_late = mean_late if n <= CHECK_EVERY else self.window_late
        other_late = self.prefill_late or self.e2e_late or self.gap_late
        return Grade(
            met=not self.missed,
            met_mean_tpot=not (other_late or mean_late),
            met_window=not (other_late or window_late),
            ttft_s=self.first,
            tpot_s=span / (n - 1) if n > 1 else 0.0,
            e2e_s=self.last,
            num_output_tokens=n,
            stages=self._stages(),
            least_slack_s=self._least_slack_s(),
        )

    def _stages(self) -> dict[str, str]:
        """Return met, missed or "" for each of `STAGES`."""
        gapped = self.gap_s < math.inf
        thinking = self.num_thinking > 0 and (gapped or self.thinking_tpot_s < math.inf)
        answer = self.num_output_tokens > self.num_thinking and (gapped or self.tpot_s < math.inf)
        return {
            "prefill": _stage(self.ttft_s < math.inf, self.prefill_late),
            "thinking": _stage(thinking, self.thinking_late),
            "answer": _stage(answer, self.answer_late),
        }

    def _least_slack_s(self) -> dict[str, float]:
        """Return the least time to spare in each of `STAGES` that has some."""
        least = self.ttft_s - self.first, self.thinking_slack_s, self.answer_slack_s
        return {stage: seconds for stage, seconds in zip(STAGES, least, strict=True) if seconds < math.inf}

    def _finish_silent(self, t: float) -> Grade:
        """Grade a stream that ended without a token, `t` seconds after its arrival."""
        prefill_late = t > self.ttft_s + TOLERANCE_S
        met = not prefill_late and t <= self.e2e_s
        return Grade(
            met=met,
            met_mean_tpot=met,
            met_window=met,
            ttft_s=math.inf,
            tpot_s=0.0,
            e2e_s=t,
            num_output_tokens=0,
            stages={"prefill": "missed" if prefill_late else "", "thinking": "", "answer": ""},
            least_slack_s={},
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
