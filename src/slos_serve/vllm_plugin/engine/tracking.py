"""The core's request table, kept in step with vLLM's requests.

One `Live` per request that vLLM holds, one row in the table per request that can run. A request that
waits for its grammar has no row until vLLM can promote it; one that follows vLLM's own rules (see
`view.follows_stock_rules`) never has one. Columns are refreshed before a plan, and only then, in one pass over the
requests that run or ran (see `moves`). Under asynchronous scheduling they say what will hold when the batch in flight
has ended: its tokens are computed and out, at the time when it is expected to end.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slos_serve.config import SloConfig
from slos_serve.core.lengths import LengthModel, length_quantile
from slos_serve.core.types import Request as CoreRequest
from slos_serve.core.types import RequestTable, Status, Tier
from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.engine.asked import Asked
from slos_serve.vllm_plugin.engine.hits import Hits
from slos_serve.vllm_plugin.engine.live import Live
from slos_serve.vllm_plugin.engine.moves import Moves
from slos_serve.vllm_plugin.engine.outputs import Outputs
from slos_serve.vllm_plugin.engine.said import said

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from slos_serve.vllm_plugin.engine.clock import Clock


class Tracker:
    """Keep `table` and `live` in step with one vLLM scheduler; `asked` resolves, `outputs` grades, `hits` looks up."""

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
        self.clock = clock
        self.table = RequestTable(list(config.classes))
        self.live: dict[str, Live] = {}
        self.blocked: dict[str, Live] = {}
        self.stock: dict[str, Request] = {}
        self.rowless: dict[str, Live] = {}  # who asks for nothing, and came since the last sync
        self.num_with_slo = 0  # rows that ask for a promise
        self.lengths = LengthModel(
            {name: c.output_tokens_hint for name, c in config.classes.items() if c.output_tokens_hint}
        )
        self.asked = Asked(config, self.live, sets_aside)
        self.outputs = Outputs(self.table, clock.now())
        self.hits = Hits(scheduler, self.table, self.live)
        self.version = 0  # changes with every row that comes or changes its promises, not when one goes
        self._unresolved: dict[str, Live] = {}
        self.is_async = is_async
        self._rows_live: list[Live] = []  # in row order
        self.moves = Moves(scheduler, self.table, is_async=is_async)

    @property
    def thinking_end(self) -> frozenset[int]:
        """The token ids that end a thinking span; empty until they are known."""
        return self.asked.thinking_end

    @thinking_end.setter
    def thinking_end(self, marks: frozenset[int]) -> None:
        self.asked.thinking_end = self.outputs.thinking_end = marks

    # -- arrival ----------------------------------------------------------------------------------

    def add(self, request: Request) -> Live | None:
        """Take up a request that vLLM has queued; None for one that is known (streamed input)."""
        if request.request_id in self.live or self.scheduler.requests.get(request.request_id) is not request:
            return None  # the next input of a streamed session, or its end
        params = request.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        args = said(extra, edge_only=self._edge_only)
        added_s, stamped_s = self.clock.now(), _stamped_s(request, args)
        live = Live(
            request=request, args=args, stamped_s=stamped_s, arrival_s=self.clock.place(stamped_s), added_s=added_s
        )
        self.live[request.request_id] = live
        self.asked.resolve(live)
        if not live.is_resolved:
            self._unresolved[request.request_id] = live
        self.outputs.watch(live)
        self.version += 1
        if view.follows_stock_rules(request):
            live.is_stock = True
            self.stock[request.request_id] = request
        elif view.is_blocked(request):
            self.blocked[request.request_id] = live
        else:
            self._admit(live)
        return live

    def _admit(self, live: Live) -> None:
        """Give a request its row, or let one that asks for nothing wait for it until a plan is made."""
        if live.planned_slo.is_empty:
            self.rowless[live.request_id] = live
        else:
            self._add_rows()
            self._add_row(live)

    def _add_rows(self) -> None:
        """Give a row to all that wait for one, in the order in which they came."""
        while self.rowless:
            self._add_row(self.rowless.pop(next(iter(self.rowless))))

    def set_reference(self, reference: Callable[[int], float]) -> list[Live]:
        """Pin the reference that slowdown SLOs mean; returns the requests that now have promises."""
        self.asked.reference = reference
        resolved = []
        self.version += 1
        for live in self._unresolved.values():
            if live.has_begun:
                continue  # it began without a promise; it cannot be graded any more
            self.asked.resolve(live)
            if live.has_slo:
                self.outputs.watch(live)
                resolved.append(live)
            if live.has_row:
                self.num_with_slo += not live.planned_slo.is_empty
                self.table.set_promises(self._core_request(live))
            self._readmit(live)
        self._unresolved.clear()
        return resolved

    def _readmit(self, live: Live) -> None:
        """Give a row to one that has none and now asks for a promise."""
        if self.rowless.pop(live.request_id, None) is not None:
            self._admit(live)

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
        row["drawn_output_tokens"] = self.lengths.predict(*known, quantile=length_quantile(int(row["seq"]), produced))

    def _add_row(self, live: Live) -> None:
        self.version += 1
        request = live.request
        index = self.table.add(self._core_request(live))
        self._predict(live, index, request.num_output_tokens)
        self._rows_live.append(live)
        self.moves.add(request, index)
        live.has_row = True
        self.num_with_slo += not live.planned_slo.is_empty
        self.hits.want([live.request_id])

    # -- departure --------------------------------------------------------------------------------

    def remove(self, request_id: str) -> Live | None:
        """Forget a request; None if it was not known."""
        live = self.live.pop(request_id, None)
        self.blocked.pop(request_id, None)
        self.stock.pop(request_id, None)
        self.rowless.pop(request_id, None)
        if live is None:
            return None
        self.outputs.leave(live)
        self._unresolved.pop(request_id, None)
        if live.has_row:
            self.num_with_slo -= not live.planned_slo.is_empty
            index = self.table.index(request_id)
            self.table.remove(request_id)
            self.moves.remove(request_id, index)
            last = self._rows_live.pop()
            if index < len(self._rows_live):
                self._rows_live[index] = last
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
            and request_id not in self.rowless
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
        self.outputs.delay(live, seconds)
        if live.has_row:
            row = self.table.rows[self.table.index(live.request_id)]
            for name in ("ttft_deadline_s", "e2e_deadline_s", "first_token_s", "last_token_s"):
                row[name] += seconds

    # -- every step -------------------------------------------------------------------------------

    def sync(self, ends_s: float) -> None:
        """Refresh the columns that vLLM moved; `ends_s`: when what is in flight is expected to end."""
        self._add_rows()
        rows = self.table.rows
        for index in self.moves.step(ends_s, self.outputs.last_s).tolist():
            self._predict(self._rows_live[index], index, int(rows["num_output_tokens"][index]))
        self.hits.step()

    def promote(self) -> None:
        """Give a row to each request whose grammar is ready."""
        for request_id, live in list(self.blocked.items()):
            if view.awaits_grammar(live.request):
                view.promote(self.scheduler, live.request)
            if not view.is_blocked(live.request):
                del self.blocked[request_id]
                self.version += 1
                self._admit(live)

    def note_preempted(self, request_id: str) -> None:
        """Look a preempted request's prefix up again: its own blocks may still be cached."""
        self.version += 1
        self.hits.want([request_id])

    def reopen(self) -> None:
        """Forget verdicts of plans that were not carried out, when plans begin to be.

        A request whose first token is out was never asked about: it is served and graded, nothing more.
        """
        self.version += 1
        tiers = self.table.rows["tier"]
        for index, live in enumerate(self._rows_live):
            if live.has_slo and not live.verdict:
                undecided = not live.has_begun and not live.is_set_aside
                tiers[index] = Tier.PENDING if undecided else Tier.BEST_EFFORT

    def regroup(self) -> None:
        """Plan for the classes that are steered from now on; a promise that was given stands."""
        self.version += 1
        for live in self.live.values():
            aside = self.asked.is_aside(live) and not live.was_promised
            if aside == live.is_set_aside:
                continue
            before, live.is_set_aside = live.planned_slo, aside
            if live.has_row:
                self.num_with_slo += before.is_empty - live.planned_slo.is_empty
                self.table.set_promises(self._core_request(live))
            self._readmit(live)
            if live.has_row and live.has_begun:  # it began without a promise
                self.table.rows["tier"][self.table.index(live.request_id)] = Tier.BEST_EFFORT

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody asks for a promise, one whose grammar is not ready yet included."""
        return self.num_with_slo > 0 or any(not live.planned_slo.is_empty for live in self.blocked.values())

    def waiting(self, request_ids: Sequence[str]) -> dict[str, Request]:
        """Return those of the given requests that wait and may run, by id."""
        index = self.table.find(request_ids)
        index = index[index >= 0]
        waits = index[self.table.rows["status"][index] == Status.WAITING].tolist()
        return {live.request_id: live.request for live in map(self._rows_live.__getitem__, waits)}


def _stamped_s(request: Request, args: Mapping[str, Any]) -> float:
    """Return when a request arrived, as Unix time: the edge's stamp, else when vLLM made it."""
    stamp = args.get("slo_arrival_s")
    if isinstance(stamp, int | float) and math.isfinite(stamp) and 0 < request.arrival_time - stamp < 60:
        return float(stamp)
    return float(request.arrival_time)
