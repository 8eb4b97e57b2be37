"""The core's request table, kept in step with vLLM's requests.

One `Live` per request that vLLM holds, one row in the table per request that can run. A request that
waits for its grammar has no row until vLLM can promote it; one that follows vLLM's own rules (see
`view.follows_stock_rules`) never has one. Columns are refreshed before a plan, and only then, by list comprehensions
over vLLM's requests and one assignment per column. Under asynchronous scheduling they say what will hold when the batch
in flight has ended: its tokens are computed and out, at the time when it is expected to end.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_serve.config import OVERRIDES, SloConfig, short
from slos_serve.core.lengths import LengthModel, turn
from slos_serve.core.slo.deadlines import StreamGrader
from slos_serve.core.types import Request as CoreRequest
from slos_serve.core.types import RequestTable, Slo, Status, Tier
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.said import said

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.core.types import BoolArray, Rows
    from slos_serve.vllm_plugin.engine.clock import Clock

PREFIX = "slo_"
LOOKUPS_PER_STEP = 32
REFRESH_EVERY = 256  # steps between looking prefix hits of waiting requests up again
REFRESHED = 32


class ReferenceUnknownError(LookupError):
    """A slowdown SLO was asked for before the reference profile is known."""


@dataclass(slots=True, eq=False)
class Live:
    """What we know about one request that vLLM does not."""

    request: Request
    args: Mapping[str, Any]
    arrival_s: float
    added_s: float  # when the engine took it up
    slo: Slo = field(default_factory=Slo)
    slo_class: str = "best-effort"
    weight: float = 1.0
    thinks: bool = False
    is_thinking: bool = False
    is_resolved: bool = True
    reason: str = ""
    grader: StreamGrader | None = None
    is_stock: bool = False
    has_row: bool = False
    missed: bool = False
    missed_at: int = 0  # output tokens when that became known
    promised_tokens: float = math.inf  # the predicted output length when the promise was given
    num_output_tokens: int = 0
    num_thinking_tokens: int = 0
    first_token_s: float = math.inf
    last_token_s: float = math.inf
    verdict: str = ""  # promised, promoted, best-effort; "" while pending
    was_promised: bool = False
    is_declined: bool = False
    promise_lead_s: float | None = None
    would_be: str = ""  # the verdict in observe mode
    is_set_aside: bool = False  # its class only observes, others are steered: it is planned as best-effort work
    is_over_share: bool = False  # its tenant has all the promises that it may have
    is_expired: bool = False

    @property
    def request_id(self) -> str:
        """The engine's id of the request."""
        return str(self.request.request_id)

    @property
    def slo_id(self) -> str | None:
        """The id that the HTTP edge gave it; None on a bare server."""
        value = self.args.get("slo_id")
        return None if value is None else str(value)

    @property
    def tenant(self) -> str:
        """Who it is counted for."""
        return str(self.args.get("slo_tenant") or "")

    @property
    def session(self) -> str | None:
        """The session it belongs to, as the client names it."""
        value = self.request.session_id
        return None if value is None else short(str(value))

    @property
    def has_slo(self) -> bool:
        """Tell whether the client asked for anything."""
        return not self.slo.is_empty

    @property
    def has_outrun(self) -> bool:
        """Tell whether its SLO was missed by an output longer than predicted when the promise was given."""
        return (self.missed_at or self.num_output_tokens) > self.promised_tokens

    @property
    def planned_slo(self) -> Slo:
        """What plans are made for."""
        return Slo() if self.is_set_aside else self.slo


class Tracker:
    """Keep `table` and `live` in step with one vLLM scheduler."""

    def __init__(
        self,
        scheduler: Any,
        config: SloConfig,
        clock: Clock,
        sets_aside: Callable[[str], bool] = lambda _: False,
        *,
        is_async: bool,
        edge_only: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self._edge_only = edge_only
        self.config = config
        self.clock = clock
        self.table = RequestTable(list(config.classes))
        self.live: dict[str, Live] = {}
        self.blocked: dict[str, Live] = {}
        self.stock: dict[str, Request] = {}
        self.num_with_slo = 0  # rows that ask for a promise
        self._sets_aside = sets_aside
        self.lengths = LengthModel(
            {name: c.output_tokens_hint for name, c in config.classes.items() if c.output_tokens_hint}
        )
        self.num_invalid = 0
        self.thinking_end: frozenset[int] = frozenset()
        self.reference: Callable[[int], float] | None = None
        self.use_prefix_hits = True
        self.version = 0  # changes with every row that comes or changes its promises, not when one goes
        self._watched: dict[str, Live] = {}  # whose tokens are looked at: all, or until the first has come
        self._unresolved: dict[str, Live] = {}
        self.is_async = is_async
        self._rows_live: list[Live] = []  # in row order
        self._rows_requests: list[Request] = []
        self._lookups: deque[str] = deque()
        # as of the last sync, in row order
        self.running = np.zeros(0, np.bool_)
        self.left = np.zeros(0, np.int64)  # tokens that vLLM will still schedule
        self._steps = 0
        self._last_output_s = clock.now()
        self._block_size = int(scheduler.block_size)

    # -- arrival ----------------------------------------------------------------------------------

    def add(self, request: Request) -> Live | None:
        """Take up a request that vLLM has queued; None for one that is known (streamed input)."""
        if request.request_id in self.live or self.scheduler.requests.get(request.request_id) is not request:
            return None  # the next input of a streamed session, or its end
        params = request.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        args = said(extra, edge_only=self._edge_only)
        added_s = self.clock.now()
        live = Live(request=request, args=args, arrival_s=self._arrival(request, args), added_s=added_s)
        self.live[request.request_id] = live
        self.resolve(live)
        if not live.is_resolved:
            self._unresolved[request.request_id] = live
        self._watched[request.request_id] = live
        self.version += 1
        if view.follows_stock_rules(request):
            live.is_stock = True
            self.stock[request.request_id] = request
        elif view.is_blocked(request):
            self.blocked[request.request_id] = live
        else:
            self._add_row(live)
        return live

    def _arrival(self, request: Request, args: Mapping[str, Any]) -> float:
        stamp = args.get("slo_arrival_s")
        if isinstance(stamp, int | float) and math.isfinite(stamp) and 0 < request.arrival_time - stamp < 60:
            return self.clock.place(float(stamp))
        return self.clock.place(float(request.arrival_time))

    def resolve(self, live: Live) -> None:
        """Turn what was asked into promises; what makes no sense is best-effort, reason `invalid`."""
        args = live.args
        name = args.get("slo_class")
        overrides = {key: args[PREFIX + key] for key in (*OVERRIDES, "stage") if PREFIX + key in args}
        live.is_resolved = True
        try:
            # asked first, so that a nonsensical value is never taken for one that waits for the profile
            slo, weight, thinks = self.config.resolve(name, overrides, live.request.num_prompt_tokens, self._reference)
            label = self.config.label(name, overrides)
        except ReferenceUnknownError:
            live.is_resolved = False
            live.reason = "observe"
            live.slo_class = str(name or self.config.label(None, overrides))
            return
        except (ValueError, TypeError, KeyError, ArithmeticError):
            live.reason = "invalid"
            self.num_invalid += 1
            return
        live.slo, live.weight, live.thinks, live.slo_class = slo, weight, thinks, label
        live.is_over_share = not slo.is_empty and self._is_over_share(live)
        live.is_set_aside = self._is_aside(live)
        live.is_thinking = (
            thinks and bool(self.thinking_end) and not view.ends_thinking(live.request, self.thinking_end)
        )
        live.reason = "" if live.has_slo else "requested"
        if live.has_slo:
            live.grader = StreamGrader(live.arrival_s, slo, live.is_thinking)

    def _is_aside(self, live: Live) -> bool:
        """Tell whether a request is planned as best-effort work whatever it asks for."""
        return live.is_over_share or self._sets_aside(live.slo_class) or view.has_encoder_inputs(live.request)

    def _is_over_share(self, live: Live) -> bool:
        """Tell whether its tenant holds, or asks for, as many promises as the operator allows."""
        most = self.config.max_promises_per_tenant
        if most is None:
            return False
        others = (one for one in self.live.values() if one is not live and one.tenant == live.tenant)
        return sum(not one.planned_slo.is_empty and not one.missed for one in others) >= most

    def _reference(self, prompt_tokens: int) -> float:
        if self.reference is None:
            raise ReferenceUnknownError
        return self.reference(prompt_tokens)

    def set_reference(self, reference: Callable[[int], float]) -> list[Live]:
        """Pin the reference that slowdown SLOs mean; returns the requests that now have promises."""
        self.reference = reference
        resolved = []
        self.version += 1
        for live in self._unresolved.values():
            if live.num_output_tokens:
                continue  # it began without a promise; it cannot be graded any more
            self.resolve(live)
            if live.has_slo:
                resolved.append(live)
            if live.has_row:
                self.num_with_slo += not live.planned_slo.is_empty
                self.table.set_promises(self._core_request(live))
        self._unresolved.clear()
        return resolved

    def _core_request(self, live: Live) -> CoreRequest:
        request = live.request
        return CoreRequest(
            request_id=request.request_id,
            arrival_s=live.arrival_s,
            num_prompt_tokens=max(1, request.num_prompt_tokens),
            max_output_tokens=max(1, self._max_output_tokens(request)),
            slo=live.planned_slo,
            slo_class=live.slo_class,
            weight=live.weight,
            thinks=live.is_thinking,
            tenant=zlib.crc32(live.tenant.encode()) if live.tenant else 0,
        )

    def _max_output_tokens(self, request: Request) -> int:
        """Return the client's limit. A benchmark whose `max_tokens` is the true length says a class's limit instead."""
        extra = (request.sampling_params.extra_args if request.sampling_params is not None else None) or {}
        hidden = extra.get("hidden_max_tokens")
        limit = max(int(request.max_tokens), hidden if isinstance(hidden, int) else 0)
        return min(limit, int(self.scheduler.max_model_len) - int(request.num_prompt_tokens))

    def _predict(self, live: Live, index: int, produced: int) -> None:
        """Write what is known of the output length into a row."""
        request, row = live.request, self.table.rows[index]
        limit = max(1, self._max_output_tokens(request))
        known = live.slo_class, int(request.num_prompt_tokens), limit, produced
        row["predicted_output_tokens"] = self.lengths.predict(*known)
        row["drawn_output_tokens"] = self.lengths.predict(*known, quantile=turn(int(row["seq"]), produced))

    def _add_row(self, live: Live) -> None:
        self.version += 1
        self._predict(live, self.table.add(self._core_request(live)), live.num_output_tokens)
        self._rows_live.append(live)
        self._rows_requests.append(live.request)
        live.has_row = True
        self.num_with_slo += not live.planned_slo.is_empty
        self._lookups.append(live.request_id)

    # -- departure --------------------------------------------------------------------------------

    def remove(self, request_id: str) -> Live | None:
        """Forget a request; None if it was not known."""
        live = self.live.pop(request_id, None)
        is_watched = self._watched.pop(request_id, None) is not None
        self.blocked.pop(request_id, None)
        self.stock.pop(request_id, None)
        if live is None:
            return None
        if not is_watched and live.num_output_tokens:
            live.num_output_tokens = len(live.request.output_token_ids)
            live.last_token_s = self._last_output_s
        self._unresolved.pop(request_id, None)
        if live.has_row:
            self.num_with_slo -= not live.planned_slo.is_empty
            index = self.table.index(request_id)
            self.table.remove(request_id)
            last_live, last_request = self._rows_live.pop(), self._rows_requests.pop()
            if index < len(self._rows_live):
                self._rows_live[index], self._rows_requests[index] = last_live, last_request
        return live

    def reconcile(self) -> int:
        """Make the table agree with what vLLM holds again, after a fault of ours; return how many did not.

        What vLLM no longer holds is forgotten; what has no row follows vLLM's own rules from now on.
        """
        known = self.scheduler.requests
        gone = [request_id for request_id in self.live if request_id not in known]
        for request_id in gone:
            self.remove(request_id)
        lost = [
            request
            for request_id, request in known.items()
            if request_id not in self.stock
            and request_id not in self.blocked
            and not ((live := self.live.get(request_id)) and live.has_row)
        ]
        self.stock.update({request.request_id: request for request in lost})
        self.version += 1
        return len(gone) + len(lost)

    def delay(self, live: Live, seconds: float) -> None:
        """Move all that a request was promised so far back: the time of an operator's pause does not count."""
        if seconds <= 0:
            return
        self.version += 1
        if live.grader is not None:
            live.grader.delay(seconds)
        if live.has_row:
            row = self.table.rows[self.table.index(live.request_id)]
            for name in ("ttft_deadline_s", "e2e_deadline_s", "first_token_s", "last_token_s"):
                row[name] += seconds

    # -- every step -------------------------------------------------------------------------------

    def sync(self, ends_s: float) -> None:
        """Refresh the columns that vLLM moved; `ends_s`: when what is in flight is expected to end."""
        self._steps += 1
        requests = self._rows_requests
        if not requests:
            self.running = np.zeros(0, np.bool_)
            return
        rows = self.table.rows
        computed = view.computed_tokens(requests)
        produced = view.output_tokens(requests, with_placeholders=self.is_async)
        running = view.is_running(requests)
        moved = produced > rows["num_output_tokens"]
        if moved.any():  # what came since the last step came with the last output
            rows["last_token_s"][moved] = self._last_output_s
        self.left = view.tokens_left(requests)
        if self.is_async:
            in_flight = view.are_in_flight(requests)
            self._foretell(rows, in_flight, ends_s)
            has_all = in_flight & (self.left <= 0)  # it will be asked for no more tokens, whatever its class may have
            rows["max_output_tokens"][has_all] = produced[has_all]
        rows["status"] = running
        rows["num_computed_tokens"] = computed
        rows["num_output_tokens"] = produced
        rows["num_kv_blocks"] = -(-computed // self._block_size)
        self.running = running
        holds = np.minimum(rows["predicted_output_tokens"], rows["drawn_output_tokens"])
        over = np.flatnonzero((produced >= holds) & (produced < rows["max_output_tokens"]))
        for index in over.tolist():
            self._predict(self._rows_live[index], index, int(produced[index]))
        if self._lookups or self._steps % REFRESH_EVERY == 0:
            self._look_up(running)

    def _foretell(self, rows: Rows, in_flight: BoolArray, ends_s: float) -> None:
        """Write when the tokens in flight will be out, and take back what was foretold of those that are."""
        last_s, first_s = rows["last_token_s"], rows["first_token_s"]
        last_s[np.isfinite(last_s) & (last_s > self._last_output_s)] = self._last_output_s
        last_s[in_flight] = ends_s
        first_s[in_flight & ~np.isfinite(first_s)] = ends_s  # the true time is written when it comes

    def promote(self) -> None:
        """Give a row to each request whose grammar is ready."""
        for request_id, live in list(self.blocked.items()):
            if view.awaits_grammar(live.request):
                view.promote(self.scheduler, live.request)
            if not view.is_blocked(live.request):
                del self.blocked[request_id]
                self._add_row(live)

    def _look_up(self, running: Any) -> None:
        """Ask the prefix cache about a few waiting requests."""
        if not self.use_prefix_hits:
            self._lookups.clear()
            return
        if self._steps % REFRESH_EVERY == 0:
            waiting = np.flatnonzero(~running)[:REFRESHED].tolist()
            self._lookups.extend(self._rows_live[index].request_id for index in waiting)
        rows = self.table.rows
        for _ in range(min(LOOKUPS_PER_STEP, len(self._lookups))):
            request_id = self._lookups.popleft()
            live = self.live.get(request_id)
            if live is None or not live.has_row or live.request.num_computed_tokens:
                continue
            index = self.table.index(request_id)
            if rows["status"][index] == Status.WAITING:
                rows["num_cached_tokens"][index] = view.cached_tokens(self.scheduler, live.request)

    def note_preempted(self, request_id: str) -> None:
        """Look a preempted request's prefix up again: its own blocks may still be cached."""
        self.version += 1
        self._lookups.append(request_id)

    def reopen(self) -> None:
        """Forget verdicts of plans that were not carried out, when plans begin to be.

        A request whose first token is out was never asked about: it is served and graded, nothing more.
        """
        self.version += 1
        tiers = self.table.rows["tier"]
        for index, live in enumerate(self._rows_live):
            if live.has_slo and not live.verdict:
                undecided = not live.num_output_tokens and not live.is_set_aside
                tiers[index] = Tier.PENDING if undecided else Tier.BEST_EFFORT

    def regroup(self) -> None:
        """Plan for the classes that are steered from now on; a promise that was given stands."""
        self.version += 1
        for live in self.live.values():
            aside = self._is_aside(live) and not live.was_promised
            if aside == live.is_set_aside:
                continue
            before, live.is_set_aside = live.planned_slo, aside
            if live.has_row:
                self.num_with_slo += before.is_empty - live.planned_slo.is_empty
                self.table.set_promises(self._core_request(live))
                if live.num_output_tokens:  # it began without a promise
                    self.table.rows["tier"][self.table.index(live.request_id)] = Tier.BEST_EFFORT

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody asks for a promise, one whose grammar is not ready yet included."""
        return self.num_with_slo > 0 or any(not live.planned_slo.is_empty for live in self.blocked.values())

    def forget_hits(self) -> None:
        """Look prefix hits up again: the cache has been emptied."""
        waiting = np.flatnonzero(self.table.rows["status"] == Status.WAITING).tolist()
        self.table.rows["num_cached_tokens"][waiting] = 0
        self._lookups.extend(self._rows_live[index].request_id for index in waiting)

    def runnable_waiting(self) -> dict[str, Request]:
        """Return the waiting requests that have a row, by id."""
        requests = self._rows_requests
        return {requests[index].request_id: requests[index] for index in np.flatnonzero(~self.running).tolist()}

    # -- output -----------------------------------------------------------------------------------

    def take_outputs(self, outputs: Iterable[Any], now_s: float) -> None:
        """Grade the chunks of output (vLLM's per-request outputs) that leave the engine now.

        One pass with little in it: it runs for every token that is graded.
        """
        self._last_output_s = now_s
        watched = self._watched
        if not watched:
            return
        for output in outputs:
            count = len(output.new_token_ids)
            live = watched.get(output.request_id)
            if live is None or not count:
                continue
            thinking = 0
            if live.is_thinking:
                thinking = self._take_thinking(live, output.new_token_ids)
            if not live.num_output_tokens:
                self._take_first(live, now_s)
            live.num_output_tokens += count
            live.last_token_s = now_s
            grader = live.grader
            if grader is None:
                if not live.is_thinking:
                    del watched[output.request_id]  # the rest is counted when it ends
                continue
            grader.feed(now_s, count, thinking)
            if grader.missed and not live.missed:
                live.missed, live.missed_at = True, live.num_output_tokens
                if live.has_row:
                    self.table.rows["missed"][self.table.index(live.request_id)] = 1

    def _take_first(self, live: Live, now_s: float) -> None:
        live.first_token_s = now_s
        if live.has_row:
            self.table.rows["first_token_s"][self.table.index(live.request_id)] = now_s

    def _take_thinking(self, live: Live, token_ids: list[int]) -> int:
        """Count the thinking tokens of a chunk, the end mark included."""
        thinking = len(token_ids)
        for position, token in enumerate(token_ids, 1):
            if token in self.thinking_end:
                thinking, live.is_thinking = position, False
                break
        live.num_thinking_tokens += thinking
        if live.has_row:
            rows, index = self.table.rows, self.table.index(live.request_id)
            rows["num_thinking_tokens"][index] = live.num_thinking_tokens
            rows["is_thinking"][index] = int(live.is_thinking)
        return thinking
