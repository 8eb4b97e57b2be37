"""No scheduler can do better than this: an upper bound on capacity, with all arrivals and lengths known.

A linear programme that every schedule of one engine satisfies, whatever it knows. Time is cut into windows
wherever a request arrives or a first token is due (to `RESOLUTION_S`, in the requests' favour), and every
`COARSE_S`; a step that straddles two counts in each by its share of time. For each window w

    S_w steps with D_w drafter steps in all, f_iw prefill tokens of request i, T_w decode tokens (drafts
    included), C_w context tokens read, with
    k1 * (sum of f + T) + k3 * C + k4 * D + b * S <= length of w      for each line of the performance model
    sum of f + T <= token budget * S                                  a step holds no more
    sum of f + C <= KV tokens * S                                     nor does the memory during a step
    D <= longest draft * S

and for each request, of which the share x_i is served in time (0 or 1 in a real schedule),

    its prompt is computed between arrival and first-token deadline, in a step or more,
    its tokens are out when the rule looks at them (every tenth, and the last), in windows of their own,
    `COARSE_S` long. There it takes part in n_iv steps of the S_v and verifies t_iv tokens, from n_iv to n_iv + D_v,
    and gains no more than the drafts among them are accepted on average: Acc(s) is concave, so
    g_iv <= Acc(s) * n_iv + (Acc(s+1) - Acc(s)) * (t_iv - s * n_iv) for every s;

what all requests verify and read in a long window adds up to T and C of the short ones in it. With drafts the bound
is one in expectation. Attention pairs, per-request costs, and memory held between steps are left out. The optimum of
min over classes of served / offered is therefore at least what any scheduler attains, and a rate at which it
is below the target is above capacity.

What has no promise about its first token, or about its pace, asks for nothing here in that part.
Rounds that wait for earlier ones have no arrival time of their own: such workloads have no bound here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.core.perf import FIXED, PER_CONTEXT, PER_DRAFT, PER_TOKEN, batch_seconds
from slos_serve.core.slo.deadlines import CHECK_EVERY, granted_s
from slos_serve.errors import MissingExtraError, SlosServeError

if TYPE_CHECKING:
    from slos_serve.core.perf import FloatArray
    from slos_serve.sim.hardware import Hardware
    from slos_serve.sim.replica.requests import SimRequest
    from slos_serve.sim.workloads.workload import Workload

RESOLUTION_S = 0.05
COARSE_S = 1.0
CUTS = (
    1,
    2,
    3,
    4,
    6,
)  # tangent points of the concave Acc(s), beside the most; fewer loosen the bound, never invalidate it


class UnsolvedError(SlosServeError):
    """The solver gave no answer to a linear programme, so that this one bound is not known."""


@dataclass(slots=True)
class _Rows:
    """Rows of a sparse matrix in the making: sum of coefficient * variable <= limit."""

    coefficients: list[float] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    column_of: list[int] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def new(self, limit: float = 0.0) -> int:
        """Start a row and return its number."""
        self.limits.append(limit)
        return len(self.limits) - 1

    def add(self, row: int, column: int, coefficient: float) -> None:
        """Add a term to a row."""
        self.coefficients.append(coefficient)
        self.row_of.append(row)
        self.column_of.append(column)


class _Programme:
    """The variables and rows of one workload on one engine. Times are relative to `start_s`.

    `gains`: output tokens of verifying 1, 2, ... tokens in a step, on average.
    """

    def __init__(
        self, hardware: Hardware, start_s: float, cuts_s: list[float], end_s: float, *, gains: FloatArray
    ) -> None:
        self.start_s = start_s
        self.gains = gains
        self.num_coarse = math.ceil(end_s / COARSE_S) + 1
        boundaries = [COARSE_S * i for i in range(self.num_coarse + 1)]
        ticks = np.unique(np.round(np.array([*cuts_s, *boundaries]) / RESOLUTION_S).astype(np.int64))
        self.bounds_s = ticks * RESOLUTION_S
        self.num_fine = len(ticks) - 1
        self.coarse_of = (self.bounds_s[:-1] / COARSE_S + 1e-9).astype(np.int64).tolist()
        # attainment; then S, D, T and C of each short window; then S and D of each long one
        self.first_coarse = 1 + 4 * self.num_fine
        self.num_columns = self.first_coarse + 2 * self.num_coarse
        self.rows = _Rows()
        self.upper: dict[int, float] = {0: 1.0}
        lines = hardware.perf_model.as_array()
        lengths_s = np.diff(self.bounds_s).tolist()
        self._time_rows = [[self.rows.new(length_s) for length_s in lengths_s] for _ in lines]
        self._budget_rows = [self.rows.new() for _ in lengths_s]
        self._memory_rows = [self.rows.new() for _ in lengths_s]
        self._tokens_rows, self._read_rows, self._steps_rows, self._drafts_rows = (
            [self.rows.new() for _ in range(self.num_coarse)] for _ in range(4)
        )
        self._per_token_s = lines[:, PER_TOKEN].tolist()
        for w in range(self.num_fine):
            coarse, steps = self.coarse_of[w], self.steps(w)
            drafts, tokens, read = steps + 1, steps + 2, steps + 3
            for row, line in zip(self._time_rows, lines.tolist(), strict=True):
                self.rows.add(row[w], tokens, line[PER_TOKEN])
                self.rows.add(row[w], read, line[PER_CONTEXT])
                self.rows.add(row[w], drafts, line[PER_DRAFT])
                self.rows.add(row[w], steps, line[FIXED])
            self.rows.add(self._budget_rows[w], tokens, 1.0)
            self.rows.add(self._budget_rows[w], steps, -float(hardware.max_num_batched_tokens))
            self.rows.add(self._memory_rows[w], read, 1.0)
            self.rows.add(self._memory_rows[w], steps, -float(hardware.kv_tokens))
            longest = self.rows.new()
            self.rows.add(longest, drafts, 1.0)
            self.rows.add(longest, steps, 1.0 - len(gains))
            # what the requests take in a long window comes out of its short ones
            self.rows.add(self._tokens_rows[coarse], tokens, -1.0)
            self.rows.add(self._read_rows[coarse], read, -1.0)
            self.rows.add(self._steps_rows[coarse], steps, -1.0)
            self.rows.add(self._drafts_rows[coarse], drafts, -1.0)
        for v in range(self.num_coarse):
            self.rows.add(self._steps_rows[v], self.first_coarse + 2 * v, 1.0)
            self.rows.add(self._drafts_rows[v], self.first_coarse + 2 * v + 1, 1.0)

    @staticmethod
    def steps(window: int) -> int:
        """Return the column of a window's steps; drafter steps, tokens and context read follow it."""
        return 1 + 4 * window

    def windows(self, from_s: float, to_s: float) -> range:
        """Return the short windows that touch a span of absolute time."""
        first = int(np.searchsorted(self.bounds_s, from_s - self.start_s + 1e-9, side="right")) - 1
        last = int(np.searchsorted(self.bounds_s, to_s - self.start_s - 1e-9, side="left"))
        return range(max(first, 0), min(max(last, first + 1), self.num_fine))

    def column(self) -> int:
        """Return a new variable's column."""
        self.num_columns += 1
        return self.num_columns - 1

    def add_request(self, sim: SimRequest, *, can_be_met: bool) -> int:
        """Add a request and return the column of its share x."""
        request, slo = sim.request, sim.request.slo
        share = self.column()
        self.upper[share] = 1.0 if can_be_met else 0.0
        if not can_be_met or slo.ttft_s is None:
            return share
        prompt = max(1, request.num_prompt_tokens - sim.num_cached_tokens)
        deadline_s = request.arrival_s + slo.ttft_s
        done = self.rows.new()  # prompt * x - sum of f <= 0
        self.rows.add(done, share, float(prompt))
        once = self.rows.new()  # x - sum of S <= 0
        self.rows.add(once, share, 1.0)
        for w in self.windows(request.arrival_s, deadline_s):
            self.rows.add(once, self.steps(w), -1.0)
            column = self.column()
            self.rows.add(done, column, -1.0)
            for row, per_token_s in zip(self._time_rows, self._per_token_s, strict=True):
                self.rows.add(row[w], column, per_token_s)
            self.rows.add(self._budget_rows[w], column, 1.0)
            self.rows.add(self._memory_rows[w], column, 1.0)
        if _granted_s(sim, sim.num_output_tokens) > 0:
            self._add_decode(sim, share, deadline_s)
        return share

    def _add_decode(self, sim: SimRequest, share: int, deadline_s: float) -> None:
        """Add the tokens after the first, in long windows."""
        due_s = [deadline_s + _granted_s(sim, n) for n in range(2, sim.num_output_tokens + 1)]
        span = self.windows(sim.request.arrival_s, due_s[-1])
        begin, end = self.coarse_of[span[0]], self.coarse_of[span[-1]]
        before = -1
        for coarse in range(begin, end + 1):
            out = self.column()  # tokens gained until this window's end
            row = self.rows.new()
            self.rows.add(row, out, 1.0)
            self.rows.add(row, self._add_gain(coarse, float(sim.request.num_prompt_tokens)), -1.0)
            if before >= 0:
                self.rows.add(row, before, -1.0)
            before = out
            window_end_s = self.start_s + (coarse + 1) * COARSE_S
            count = int(np.searchsorted(due_s, window_end_s, side="right")) + 1  # tokens due, the first included
            if coarse == end:
                count = sim.num_output_tokens
            elif count < sim.num_output_tokens:
                count -= count % CHECK_EVERY
            if count > 1:
                row = self.rows.new()  # (tokens due) * x <= tokens gained
                self.rows.add(row, share, float(count - 1))
                self.rows.add(row, out, -1.0)

    def _add_gain(self, coarse: int, context: float) -> int:
        """Add one request's tokens in a long window and return their column."""
        gained, joined, verified = self.column(), self.column(), self.column()
        steps, drafts = self.first_coarse + 2 * coarse, self.first_coarse + 2 * coarse + 1
        self.rows.add(self._tokens_rows[coarse], verified, 1.0)
        self.rows.add(self._read_rows[coarse], joined, context)
        pace = self.rows.new()
        self.rows.add(pace, joined, 1.0)
        self.rows.add(pace, steps, -1.0)
        length = self.rows.new()
        self.rows.add(length, verified, 1.0)
        self.rows.add(length, joined, -1.0)
        self.rows.add(length, drafts, -1.0)
        least = self.rows.new()
        self.rows.add(least, joined, 1.0)
        self.rows.add(least, verified, -1.0)
        most = len(self.gains)
        for s in (*(s for s in CUTS if s < most), most):
            slope = self.gains[s] - self.gains[s - 1] if s < most else 0.0
            row = self.rows.new()
            self.rows.add(row, gained, 1.0)
            self.rows.add(row, verified, -slope)
            self.rows.add(row, joined, slope * s - self.gains[s - 1])
        return gained

    def solve(self) -> float:
        """Return the largest attainment."""
        try:
            from scipy.optimize import linprog  # noqa: PLC0415
            from scipy.sparse import csr_matrix  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtraError(module="scipy", extra="bench") from error
        rows = self.rows
        shape = (len(rows.limits), self.num_columns)
        matrix = csr_matrix((rows.coefficients, (rows.row_of, rows.column_of)), shape=shape)
        cost = np.zeros(self.num_columns)
        cost[0] = -1.0
        bounds = np.zeros((self.num_columns, 2))
        bounds[:, 1] = np.inf
        for column, limit in self.upper.items():
            bounds[column, 1] = limit
        answer: Any = linprog(cost, A_ub=matrix, b_ub=np.array(rows.limits), bounds=bounds, method="highs-ipm")
        if answer.status != 0:
            raise UnsolvedError(f"the linear programme was not solved: {answer.message}")
        return float(answer.x[0])


def _granted_s(sim: SimRequest, n: int) -> float:
    """Return the seconds that the TPOT promises grant tokens 2..n; 0 where there is none."""
    slo = sim.request.slo
    tpot = slo.tpot_s or 0.0
    thinking_tpot = tpot if slo.thinking_tpot_s is None else slo.thinking_tpot_s
    return granted_s(n, sim.num_thinking_tokens, thinking_tpot, tpot)


def clairvoyant_attainment(
    workload: Workload, hardware: Hardware, *, acceptance: float = 0.0, max_draft_length: int = 0
) -> float:
    """Return an upper bound on what the worst class attains on one engine, 0 to 1.

    `acceptance`: chance of each draft token. `ValueError` for a workload whose later rounds wait for earlier ones, or
    without any SLO.
    """
    gains = np.cumsum(acceptance ** np.arange(max_draft_length + 1))
    if workload.following:
        raise ValueError(f"workload {workload.name!r}: rounds that wait for others have no clairvoyant bound")
    sims = [sim for sim in workload.arrivals if not sim.request.slo.is_empty]
    if not sims:
        raise ValueError(f"workload {workload.name!r}: expected requests with an SLO")
    start_s = min(sim.request.arrival_s for sim in sims)
    cuts, end_s = [], 0.0
    for sim in sims:
        arrival_s, ttft_s = sim.request.arrival_s - start_s, sim.request.slo.ttft_s or 0.0
        # outward, to the grid
        cuts += [math.floor(arrival_s / RESOLUTION_S), math.ceil((arrival_s + ttft_s) / RESOLUTION_S)]
        end_s = max(end_s, arrival_s + ttft_s + _granted_s(sim, sim.num_output_tokens))
    programme = _Programme(hardware, start_s, [RESOLUTION_S * cut for cut in cuts], end_s, gains=gains)
    lines = hardware.perf_model.as_array()
    by_class: dict[str, list[int]] = {}
    for sim in sims:
        prompt = max(1, sim.request.num_prompt_tokens - sim.num_cached_tokens)
        alone_s = batch_seconds(lines, float(prompt), 1.0, 0.0, 0.0, 0.0)
        met = sim.request.slo.ttft_s is None or alone_s <= sim.request.slo.ttft_s
        column = programme.add_request(sim, can_be_met=met)
        by_class.setdefault(sim.request.slo_class, []).append(column)
    for columns in by_class.values():
        row = programme.rows.new()  # offered * attainment - sum of x <= 0
        programme.rows.add(row, 0, float(len(columns)))
        for column in columns:
            programme.rows.add(row, column, -1.0)
    return programme.solve()
