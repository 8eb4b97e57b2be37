"""Where what the engine publishes meets the requests that wait for it: one `HUB` per API process.

The engine sends one way, one message per step at most: verdicts, finished requests, a snapshot. A thread
outside this module receives them and calls `Hub.feed`; request handlers live on the event loop and wait
in `Hub.wait_verdict`. Everything kept is bounded, and a malformed message costs nothing but itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slos_serve.config import CUSTOM, SloConfig, load_slo_config
from slos_serve.core.words import EndTold, Outcome, Reason, RequestTold, Said, VerdictTold
from slos_serve.http.delivery import Delivery
from slos_serve.http.history import History
from slos_serve.http.metrics import OTHER, SloMetrics
from slos_serve.http.notices import Notices
from slos_serve.http.records import Record, Records
from slos_serve.http.slo import Operator
from slos_serve.http.snapshots import Snapshots

MAX_RECORDS = 4096
FRESH_S = 2.0
SILENT_S = 5.0
RETRY_AFTER_S = (1, 30)
GUARD_MS = 10.0  # of an engine that was told none: the network and the client
VERDICT_KEYS = ("verdict", "reason", "slack_ms", "predicted_ttft_ms", "asked")
FINISHED_KEYS = (
    "outcome",
    "promised",
    "stages",
    "least_slack_ms",
    "ttft_ms",
    "tpot_ms",
    "num_prompt_tokens",
    "num_output_tokens",
    "promise_lead_ms",
    "session",
    "tokens",
)

# One HTTP request can be several in the engine (n > 1, many prompts): it ends as its worst part does.
WORST_FIRST = tuple(Outcome)


class Hub:
    """Verdicts, recent requests, the last snapshot and the metrics. Safe to call from any thread."""

    def __init__(self, metrics: SloMetrics, *, max_records: int = MAX_RECORDS) -> None:
        self.metrics = metrics
        self.notices = Notices()
        self.history = History()
        self.operator = Operator(SloConfig())
        self.settings: Mapping[str, Any] = {}
        self.model: str | None = None
        self.controls: list[Callable[[dict[str, Any]], Mapping[str, Any]]] = []
        self.num_malformed = 0
        self.delivery = Delivery()
        self.is_front = False  # no engine is beside it: it stands before replicas, which are watched by others
        self._client = 0
        self._lock = threading.Lock()
        self._records = Records(max_records)
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}
        self._snapshots = Snapshots()
        self._under_way: Counter[str] = Counter()  # answers by tenant, where the operator bounds them

    def configure(self, *, slo: Mapping[str, Any] | None = None, model: str | None = None, client: int = 0) -> None:
        """Take over `additional_config["slo"]`: class configuration, mode and profile. `ConfigError` if bad.

        `client` is this API server's number among several of one engine. Each hears of every request, so that any
        of them can be asked about it, and counts its own alone.
        """
        self._client = client
        self.settings = dict(slo or {})
        self.model = model
        self.operator = Operator(load_slo_config(self.settings.get("config")), model)
        self.metrics.know(self.config)

    @property
    def config(self) -> SloConfig:
        """The operator's configuration; the shipped defaults until `configure`."""
        return self.operator.config

    # Engine side: any thread.

    def feed(self, message: Mapping[str, Any]) -> None:
        """Take in one message of the engine. Never raises: what cannot be read is counted and dropped."""
        engine = message.get("engine", 0) if isinstance(message, Mapping) else 0
        for key, take in (("verdicts", self._take_verdict), ("finished", self._take_finished)):
            for item in self._items(message, key):
                self._guarded(take, item)
        self._guarded(lambda m: self._take_snapshot(m.get("snapshot"), engine), message)
        self._guarded(self._take_steps, message)

    def _guarded(self, take: Any, item: Any) -> None:
        try:
            take(item)
        except (AttributeError, KeyError, TypeError, ValueError):
            self.num_malformed += 1

    def _items(self, message: Mapping[str, Any], key: str) -> list[Any]:
        items = message.get(key) if isinstance(message, Mapping) else None
        return items if isinstance(items, list) else []

    def _label(self, slo_class: object) -> str:
        return str(slo_class) if slo_class in self.config.classes or slo_class == CUSTOM else OTHER

    def _take_verdict(self, item: VerdictTold) -> None:
        label, verdict, reason = self._label(item["slo_class"]), item["verdict"], item.get("reason") or ""
        if self._is_own(item):
            said = Said.REJECTED if self._will_reject(item, label, reason) else verdict
            self.metrics.count_verdict(label, said, reason)
        slo_id = item.get("slo_id") or item["request_id"]
        with self._lock:
            record = self._records.make(slo_id, label, item.get("tenant") or "")
            self._know(record, item)
            parts = record["_parts"]
            parts[item.get("request_id")] = {key: item.get(key) for key in VERDICT_KEYS}
            # As good as its worst part.
            worst = next((part for part in parts.values() if part["verdict"] == Said.BEST_EFFORT), None)
            if not record.get("_is_settled"):
                record.update(worst or parts[item.get("request_id")])
            self._records.touch(record)
            waiters = self._waiters.pop(slo_id, ())
        for waiter in waiters:
            _wake(waiter)

    def _will_reject(self, item: VerdictTold, label: str, reason: str) -> bool:
        """Tell whether the edge answers this verdict with a 429."""
        slo_class = self.config.classes.get(label)
        rejects = slo_class is not None and slo_class.on_unattainable == "reject" and bool(item.get("slo_id"))
        return rejects and item["verdict"] == Said.BEST_EFFORT and reason != Reason.OBSERVE

    def _is_own(self, item: RequestTold) -> bool:
        return bool(item.get("client", self._client) == self._client)

    def _take_finished(self, item: EndTold) -> None:
        label, outcome = self._label(item["slo_class"]), item["outcome"]
        slo_id, tenant = item.get("slo_id") or item["request_id"], item.get("tenant") or ""
        with self._lock:
            record = self._records.get(slo_id)
            if record is not None and record.get("outcome") == "rejected" and not record["_ended"]:
                return  # refused before its first byte and counted then; the engine only saw it leave
            if record is None and outcome != "none":
                record = self._records.make(slo_id, label, tenant)
            if record is not None:
                self._know(record, item)
                self._end(record, item)
                self._records.touch(record)
            waiters = self._waiters.pop(slo_id, ())
        for waiter in waiters:
            _wake(waiter)
        self.history.take_end(time.time(), label, {**item, "asked": (record or {}).get("asked")})
        if not self._is_own(item):
            return
        if record is not None:
            self.notices.tell(record)
        self.metrics.count_outcome(label, tenant, outcome)
        if item.get("promised"):
            self.metrics.count_promise(label, outcome, item.get("least_slack_ms") or {})
        self.metrics.count_stages(label, item.get("stages") or {})

    def _know(self, record: Record, item: RequestTold) -> None:
        """Take up what the engine says of a request that this API server may not have opened."""
        self._records.name_by_engine(record["id"], item.get("request_id"))
        if (stamped_s := item.get("stamped_s")) is not None:
            record.setdefault("arrival_s", stamped_s)

    def _end(self, record: Record, item: EndTold) -> None:
        """Write into a record how a request, or a part of it, ended."""
        record["_ended"][item.get("request_id")] = item["outcome"]
        sent_s, ttft_ms = record.get("_sent_s"), item.get("ttft_ms")
        if sent_s is not None and ttft_ms is not None and len(record["_parts"]) == 1:
            self.delivery.note(sent_s - record["_stamped_s"] - ttft_ms / 1000, time.monotonic())
        record.update({key: item.get(key) for key in FINISHED_KEYS})
        record["outcome"] = min(record["_ended"].values(), key=WORST_FIRST.index)
        record["finished_s"] = time.time()
        if item["outcome"] == "rejected":
            record.update(verdict="rejected", reason=item.get("reason") or "")

    def _take_snapshot(self, snapshot: Mapping[str, Any] | None, engine: object) -> None:
        if snapshot is None:
            return
        whole = self._snapshots.take(engine, snapshot)
        self.metrics.show(whole)
        self.metrics.heard.set(self._snapshots.heard_s)
        self.history.take_load(time.time(), whole)
        if self._client == 0:
            self.metrics.count(snapshot, engine)

    def _take_steps(self, message: Mapping[str, Any]) -> None:
        steps = message.get("steps") or ()
        self.history.take_steps(time.time(), steps)
        if self._client == 0:
            self.metrics.observe(self.metrics.plan, message.get("plan_s"))
            errors = [seconds - predicted for seconds, predicted, *_ in steps if predicted is not None]
            self.metrics.observe(self.metrics.step_error, errors)

    # HTTP side: the event loop.

    def open(
        self,
        slo_id: str,
        *,
        slo_class: str,
        tenant: str,
        arrival_s: float,
        best_effort: bool = False,
        reason: str = Reason.REQUESTED,
        client_id: str = "",
        shown_tenant: str = "",
        **facts: Any,
    ) -> None:
        """Remember a request on its way to the engine; one that wants no promise has its verdict already, and `reason`.

        `client_id` is how the client calls it, `shown_tenant` the name on its page. `facts` are kept as they are.
        """
        with self._lock:
            record = self._records.make(slo_id, slo_class, tenant)
            record.update(facts, arrival_s=arrival_s, tenant=shown_tenant or tenant)
            self._records.name(slo_id, client_id)
            if best_effort:
                record.update(verdict=Said.BEST_EFFORT, reason=reason, _is_settled=True)
            self._records.touch(record)

    def annotate(self, slo_id: str, **facts: Any) -> None:
        """Add to a request's record what others than its engine know of it."""
        with self._lock:
            record = self._records.get(slo_id)
            if record is not None:
                record.update(facts)
                self._records.touch(record)

    async def wait_verdict(self, slo_id: str, timeout_s: float) -> Record | None:
        """Return a request's verdict as soon as there is one, or None after `timeout_s`."""
        with self._lock:
            record = self._records.get(slo_id)
            if record is not None and record["verdict"] != "pending":
                return public(record)
            future = self._wait(slo_id)
        return self.find(slo_id) if await self._woken(slo_id, future, timeout_s) else None

    async def wait_end(self, slo_id: str, num_parts: int, timeout_s: float) -> None:
        """Wait until every part of a request is known to have ended, `timeout_s` at most."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                record = self._records.get(slo_id)
                if record is None or len(record["_ended"]) >= num_parts:
                    return
                future = self._wait(slo_id)
            if not await self._woken(slo_id, future, deadline - time.monotonic()):
                return

    def _wait(self, slo_id: str) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(slo_id, []).append(future)
        return future

    async def _woken(self, slo_id: str, future: asyncio.Future[None], timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(future, max(0.0, timeout_s))
        except TimeoutError:
            return False
        finally:
            with self._lock:
                left = self._waiters.get(slo_id, [])
                if future in left:
                    left.remove(future)
                if not left:
                    self._waiters.pop(slo_id, None)
        return True

    def was_sent_away(self, slo_id: str) -> bool:
        """Tell whether the engine ended all of a request before it began: it had waited too long."""
        with self._lock:
            record = self._records.get(slo_id)
            ended = {} if record is None else record["_ended"]
            return bool(ended) and set(ended.values()) == {"rejected"}

    def find(self, request_id: str, may_see: Callable[[str], bool] = lambda _: True) -> Record | None:
        """Return what is known of a request by our id, the engine's or the client's, of the tenants one may see."""
        with self._lock:
            record = self._records.find(request_id, may_see)
            return None if record is None else public(record)

    def recent(self, may_see: Callable[[str], bool], limit: int, *, since: int = 0) -> list[Record]:
        """Return what is known of the newest requests that one may see, of those that changed after `since`."""
        with self._lock:
            return [public(record) for record in self._records.recent(may_see, limit, since=since)]

    @property
    def last_change(self) -> int:
        """How many changes of records there have been."""
        return self._records.num_changes

    def reject(self, slo_id: str, *, slo_class: str, tenant: str, reason: str, is_retry: bool = False) -> None:
        """Count a request that was answered with a 429; one that its client tries again was counted the first time."""
        label = self._label(slo_class)
        if not is_retry:
            self.metrics.count_outcome(label, tenant, Outcome.REJECTED)
            self.history.take_end(time.time(), label, {"outcome": Outcome.REJECTED})
        with self._lock:
            record = self._records.make(slo_id, label, tenant)
            record.update(verdict=Said.REJECTED, reason=reason, outcome=Outcome.REJECTED)
            self._records.touch(record)
            is_news = not record["_parts"]
        self.notices.tell(record)
        if is_news:  # the engine has said nothing that was counted
            self.metrics.count_verdict(label, Said.REJECTED, reason)

    @property
    def snapshot(self) -> Mapping[str, Any] | None:
        """The last snapshot, however old."""
        return self._snapshots.whole

    @property
    def snapshot_age_s(self) -> float:
        """Seconds since the last snapshot; infinite before the first."""
        return self._snapshots.age_s

    @property
    def stalled_s(self) -> float:
        """Seconds since an engine was last seen to have made a step; infinite before the first."""
        return self._snapshots.idle_s

    @property
    def is_heard(self) -> bool:
        """Tell whether an engine of ours is publishing, so that a verdict is worth a moment's wait."""
        return self.snapshot_age_s <= SILENT_S

    @property
    def fresh_snapshot(self) -> Mapping[str, Any] | None:
        """The last snapshot while the engine is at work: an idle one has room, and only repeats itself."""
        return self.snapshot if self._snapshots.idle_s <= FRESH_S else None

    def refusal(self, *, best_effort: bool, rejects: bool) -> str | None:
        """Return why a request is refused before it reaches the engine, None to let it through.

        Only a busy engine in enforce mode refuses, and only what its last snapshot proves: best-effort work
        when as many best-effort requests wait as the operator allows, a class that asks to be rejected when
        the promises already given leave no prefill rate at all. Anything finer is the planner's verdict.
        """
        snapshot = self.fresh_snapshot
        if snapshot is None or snapshot.get("effective_mode") != "enforce":
            return None
        limit = self.config.max_best_effort_queue
        if best_effort and limit is not None:
            waiting = min(snapshot.get("num_best_effort") or 0, snapshot.get("num_waiting") or 0)
            if waiting >= max(1, limit):
                return "queue-full"
        headroom = snapshot.get("headroom_tokens_per_s")
        if rejects and headroom is not None and headroom <= 0:
            return "compute"
        return None

    def admit(self, tenant: str, count: int) -> bool:
        """Count answers of a tenant as under way, until `leave`; False where that is more than the operator allows."""
        limit = self.config.max_requests_per_tenant
        if limit is not None and self._under_way[tenant] + count > limit:
            return False
        self._under_way[tenant] += count
        return True

    def leave(self, tenant: str, count: int) -> None:
        """Count answers as over that were admitted."""
        self._under_way[tenant] -= count
        if self._under_way[tenant] <= 0:
            del self._under_way[tenant]

    @property
    def delivery_lead_s(self) -> float:
        """By how much earlier than it came a request is stamped, for what tokens take from the engine to the client.

        What nearly all of them take up to here; the engine's guard covers the rest of the way, and where the operator
        set a longer one, what it has more than the usual.
        """
        known_s = (float(self.settings.get("guard_ms", GUARD_MS)) - GUARD_MS) / 1000
        return max(0.0, self.delivery.expected_s(time.monotonic()) - max(0.0, known_s))

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until the present queue has drained, 1 to 30."""
        drain_s = (self.snapshot or {}).get("drain_s") or 0.0
        low, high = RETRY_AFTER_S
        return high if not math.isfinite(drain_s) else min(high, max(low, math.ceil(drain_s)))

    @property
    def is_profiling(self) -> bool:
        """Tell whether the engine still waits for the performance profile it was told to use.

        An engine that has not been heard yet is taken at the file's word.
        """
        path, snapshot = self.settings.get("profile"), self.snapshot
        if not path:
            return False
        return not Path(path).exists() if snapshot is None else snapshot.get("profile") is None

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a verdict."""
        return sum(map(len, self._waiters.values()))


def public(record: Record) -> Record:
    """Return a copy of a record without its book-keeping."""
    return {key: value for key, value in record.items() if not key.startswith("_")}


def _wake(future: asyncio.Future[None]) -> None:
    def done() -> None:
        if not future.done():
            future.set_result(None)

    with contextlib.suppress(RuntimeError):  # the server is shutting down and its loop is closed
        future.get_loop().call_soon_threadsafe(done)


HUB = Hub(SloMetrics())
