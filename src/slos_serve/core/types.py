"""The nouns: what every host tells the planner, and what the planner answers.

A host (vLLM plug-in, simulator, router) keeps one `RequestTable`, a table with one row per live request
and one column per fact. The planner reads it as NumPy columns: at a thousand running requests a Python
object each would cost more than the plan itself. `Request` is what arrives; `ReplicaState` is the
planner's whole input and `Plan` its whole output, both serialisable, so that every incident is a file
that can be replayed.

Times are seconds on one clock chosen by the host. A missing promise is `None` in `Slo` and `inf` in the
table. Token counts use vLLM's field names: a request needs
`num_prompt_tokens + num_output_tokens - num_computed_tokens` more tokens computed before its next token
comes out; that is 1 in steady decode, and it includes its own output after a preemption.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slos_serve.core.perf import PerfModel
from slos_serve.core.words import Reason

if TYPE_CHECKING:
    from typing import Self

Rows = npt.NDArray[np.void]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Status(IntEnum):
    """Where the engine holds a request. A preempted one waits, with output tokens."""

    WAITING = 0
    RUNNING = 1


class Tier(IntEnum):
    """What has been said about a request's promise."""

    PENDING = 0
    PROMISED = 1
    BEST_EFFORT = 2


DEFAULT_WORK_LIMIT = 140_000
REASONS = tuple(Reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency promises of one request, in seconds; `None` means not promised.

    `ttft_s`: arrival to first token. `tpot_s`: per output token after the first (of the answer, where
    the request thinks). `thinking_tpot_s`: per thinking token. `e2e_s`: arrival to last token.
    `max_gap_s`: longest silence between two tokens.

    Raises `ValueError` for a value that is not a positive finite number.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    thinking_tpot_s: float | None = None
    e2e_s: float | None = None
    max_gap_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"Slo.{name} = {value!r}: expected a positive finite number of seconds")

    def items(self) -> Iterator[tuple[str, float | None]]:
        """Yield (name, seconds) pairs."""
        return ((name, getattr(self, name)) for name in self.__slots__)

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is asked for: such a request is best-effort."""
        return self.ttft_s is self.tpot_s is self.thinking_tpot_s is self.e2e_s is self.max_gap_s is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it arrives. The true output length is nobody's to know, so it is not here.

    `max_output_tokens` is the client's limit; `thinks` says that it starts with a thinking span. `tenant` is any
    number that stands for whose request it is: best-effort work is shared out between tenants.
    """

    request_id: str
    arrival_s: float
    num_prompt_tokens: int
    max_output_tokens: int
    slo: Slo = field(default_factory=Slo)
    slo_class: str = "best-effort"
    weight: float = 1.0
    thinks: bool = False
    tenant: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.arrival_s):
            raise ValueError(f"Request.arrival_s = {self.arrival_s!r}: expected a finite time in seconds")
        if self.num_prompt_tokens < 1:
            raise ValueError(f"Request.num_prompt_tokens = {self.num_prompt_tokens!r}: expected at least 1")
        if self.max_output_tokens < 1:
            raise ValueError(f"Request.max_output_tokens = {self.max_output_tokens!r}: expected at least 1")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"Request.weight = {self.weight!r}: expected a positive finite number")


# What is promised to a row: `inf` where nothing is. The deadlines among them are points in time, which delays move.
PROMISES = ("ttft_deadline_s", "tpot_s", "thinking_tpot_s", "e2e_deadline_s", "max_gap_s")
DEADLINES = ("ttft_deadline_s", "e2e_deadline_s")

REQUEST_DTYPE = np.dtype(
    [
        # fixed at arrival
        ("seq", np.int64),  # unique, ascending: the tie-break of every order
        ("class_index", np.int64),  # into RequestTable.classes
        ("arrival_s", np.float64),
        ("num_prompt_tokens", np.int64),
        ("max_output_tokens", np.int64),
        *((name, np.float64) for name in PROMISES),
        ("weight", np.float64),
        ("tenant", np.int64),
        # moves with every step
        ("status", np.int64),
        ("tier", np.int64),
        ("missed", np.int64),  # 1: some token was late, the SLO can no longer be met
        ("is_thinking", np.int64),
        ("num_computed_tokens", np.int64),
        ("num_output_tokens", np.int64),
        ("num_thinking_tokens", np.int64),  # of num_output_tokens
        ("num_cached_tokens", np.int64),  # prefix-cache hit of a request that has not started
        ("num_kv_blocks", np.int64),  # held now
        ("first_token_s", np.float64),  # inf before it
        ("last_token_s", np.float64),
        ("predicted_output_tokens", np.float64),  # a high quantile, never the truth
        ("drawn_output_tokens", np.float64),  # a quantile per request, spread evenly over requests; see `lengths.turn`
    ]
)


class RequestTable:
    """Live requests of one replica, one row each, in no particular order.

    `rows` is a view of the live rows: hosts assign columns (`table.rows["num_output_tokens"] = ...`),
    planners only read. Removing a row moves the last one into the hole.
    """

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes: list[str] = list(classes)
        self.request_ids: list[str] = []
        self._index: dict[str, int] = {}
        self._store: Rows = np.zeros(64, REQUEST_DTYPE)
        self._next_seq = 0

    def __len__(self) -> int:
        return len(self.request_ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._index

    @property
    def rows(self) -> Rows:
        """The live rows, shape (len(self),), a writable view."""
        return self._store[: len(self.request_ids)]

    def index(self, request_id: str) -> int:
        """Return the row of a live request; `KeyError` if there is none."""
        return self._index[request_id]

    def find(self, request_ids: Sequence[str]) -> IntArray:
        """Return the rows of requests, -1 where one is not live."""
        return np.fromiter(map(self._index.get, request_ids, repeat(-1)), np.int64, len(request_ids))

    def add(self, request: Request, *, tier: Tier = Tier.PENDING, predicted_output_tokens: float = 256.0) -> int:
        """Append a waiting request and return its row; drawn is what is predicted. `ValueError` on a duplicate id."""
        if request.request_id in self._index:
            raise ValueError(f"request {request.request_id!r} is already live")
        if len(self.request_ids) == len(self._store):
            self._store = np.concatenate([self._store, np.zeros(len(self._store), REQUEST_DTYPE)])
        index = self._index[request.request_id] = len(self.request_ids)
        self.request_ids.append(request.request_id)
        predicted = min(predicted_output_tokens, float(request.max_output_tokens))
        ttft_s, tpot_s, thinking_tpot_s, e2e_s, max_gap_s = self._deadlines(request)
        self._store[index] = (
            self._next_seq, self._class_index(request), request.arrival_s,
            request.num_prompt_tokens, request.max_output_tokens, ttft_s, tpot_s, thinking_tpot_s, e2e_s, max_gap_s,
            request.weight, request.tenant, Status.WAITING, Tier.BEST_EFFORT if request.slo.is_empty else tier,
            0, request.thinks, 0, 0, 0, 0, 0, math.inf, math.inf, predicted, predicted,
        )  # fmt: skip
        self._next_seq += 1
        return index

    def set_promises(self, request: Request, tier: Tier = Tier.PENDING) -> None:
        """Write what a live request asks for and its class, anew where they changed; its place in every order stays."""
        row = self._store[self._index[request.request_id]]
        row["class_index"] = self._class_index(request)
        names = ("ttft_deadline_s", "tpot_s", "thinking_tpot_s", "e2e_deadline_s", "max_gap_s")
        for name, value in zip(names, self._deadlines(request), strict=True):
            row[name] = value
        row["weight"] = request.weight
        row["is_thinking"] = int(request.thinks)
        row["tier"] = Tier.BEST_EFFORT if request.slo.is_empty else tier

    def _class_index(self, request: Request) -> int:
        if request.slo_class not in self.classes:
            self.classes.append(request.slo_class)
        return self.classes.index(request.slo_class)

    @staticmethod
    def _deadlines(request: Request) -> tuple[float, ...]:
        """Return deadline of the first token, paces, deadline of the last token and longest silence; `inf` for none."""
        slo, arrival_s = request.slo, request.arrival_s
        return (
            math.inf if slo.ttft_s is None else arrival_s + slo.ttft_s,
            math.inf if slo.tpot_s is None else slo.tpot_s,
            math.inf if slo.thinking_tpot_s is None else slo.thinking_tpot_s,
            math.inf if slo.e2e_s is None else arrival_s + slo.e2e_s,
            math.inf if slo.max_gap_s is None else slo.max_gap_s,
        )

    def remove(self, request_id: str) -> None:
        """Forget a request; `KeyError` if it is not live."""
        index = self._index.pop(request_id)
        last_id = self.request_ids.pop()
        if last_id != request_id:
            self._store[index] = self._store[len(self.request_ids)]
            self.request_ids[index] = last_id
            self._index[last_id] = index

    def copy(self) -> Self:
        """Return an independent copy."""
        other = copy(self)
        vars(other).update(
            classes=list(self.classes),
            request_ids=list(self.request_ids),
            _index=dict(self._index),
            _store=self._store.copy(),
        )
        return other

    def to_json(self) -> dict[str, Any]:
        """Return plain lists: columns by name (`inf` as null), ids and classes."""
        columns: dict[str, list[Any]] = {}
        for name in REQUEST_DTYPE.names or ():
            values = self.rows[name].tolist()
            if REQUEST_DTYPE[name].kind == "f":
                values = [value if math.isfinite(value) else None for value in values]
            columns[name] = values
        return {"classes": list(self.classes), "request_ids": list(self.request_ids), "columns": columns}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from `to_json`. `ValueError` where columns differ from this version's; older ones know no tenant."""
        names = REQUEST_DTYPE.names or ()
        count = len(data["request_ids"])
        columns = {"tenant": [0] * count, **data["columns"]}
        if set(columns) != set(names):
            difference = sorted(set(columns) ^ set(names))
            raise ValueError(f"request table columns {difference}: expected exactly {list(names)}")
        table = cls(data["classes"])
        table.request_ids = list(data["request_ids"])
        table._index = {request_id: i for i, request_id in enumerate(table.request_ids)}
        table._store = np.zeros(max(64, count), REQUEST_DTYPE)
        for name in names:
            values = columns[name]
            if REQUEST_DTYPE[name].kind == "f":
                values = [math.inf if value is None else value for value in values]
            table._store[name][:count] = values
        table._next_seq = 1 + max(columns["seq"], default=-1)
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine can hold and do in one step. Token and block counts.

    `guard_s` is subtracted from every deadline: the time between the end of a step and the client
    seeing its token. `work_limit` bounds a plan's search in elementary operations (labels expanded and
    request-steps simulated); hosts calibrate it to about 2 ms. Where `looks_at_new` is false a plan searches for no new
    promise: who waits for one stays undecided, which a host asks for where it cannot pay for the search in every step.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_kv_blocks: int
    max_draft_length: int = 0
    guard_s: float = 0.0
    work_limit: int = DEFAULT_WORK_LIMIT
    looks_at_new: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_num_batched_tokens",
            "max_num_seqs",
            "max_model_len",
            "block_size",
            "num_kv_blocks",
            "work_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits.{name} = {getattr(self, name)!r}: expected at least 1")
        if self.max_draft_length < 0 or not (math.isfinite(self.guard_s) and self.guard_s >= 0):
            raise ValueError("Limits.max_draft_length and Limits.guard_s: expected finite and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """The planner's whole input at one moment.

    `acceptance[class_name]` is the measured chance that a draft token is accepted (0 where unknown).
    `draft_lengths[class_name]` is what the engine uses now.
    """

    now_s: float
    requests: RequestTable
    num_free_kv_blocks: int
    limits: Limits
    perf_model: PerfModel
    acceptance: Mapping[str, float] = field(default_factory=dict)
    draft_lengths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.now_s):
            raise ValueError(f"ReplicaState.now_s = {self.now_s!r}: expected a finite time in seconds")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document that `from_json` turns back into an equal state."""
        return {
            "schema": "slos-serve-state/1",
            "now_s": self.now_s,
            "requests": self.requests.to_json(),
            "num_free_kv_blocks": self.num_free_kv_blocks,
            "limits": asdict(self.limits),
            "perf_model": self.perf_model.to_json(),
            "acceptance": dict(self.acceptance),
            "draft_lengths": dict(self.draft_lengths),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Self:
        """Rebuild a recorded state; `ValueError` for another schema."""
        document: Mapping[str, Any] = json.loads(data) if isinstance(data, str) else data
        if document.get("schema") != "slos-serve-state/1":
            raise ValueError(f"schema = {document.get('schema')!r}: expected 'slos-serve-state/1'")
        return cls(
            now_s=document["now_s"],
            requests=RequestTable.from_json(document["requests"]),
            num_free_kv_blocks=document["num_free_kv_blocks"],
            limits=Limits(**document["limits"]),
            perf_model=PerfModel.from_json(document["perf_model"]),
            acceptance=document["acceptance"],
            draft_lengths=document["draft_lengths"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEntry:
    """One request's share of a batch: prefill chunk tokens, or 1 + `draft_length` in decode."""

    request_id: str
    num_tokens: int
    draft_length: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPlan:
    """The next batch, in the order in which the engine should serve it.

    `request_ids[i]` computes `num_tokens[i]` new tokens (drafts not counted) and verifies up to
    `draft_lengths[i]` draft tokens. `preempted` lose their KV blocks before the batch; a running request
    in neither is held: it skips the step and keeps its blocks. `predicted_s` is the margin-free time.
    """

    request_ids: Sequence[str]
    num_tokens: IntArray
    draft_lengths: IntArray
    preempted: Sequence[str] = ()
    predicted_s: float = 0.0

    @property
    def entries(self) -> list[BatchEntry]:
        """The batch as one object per request, for people and tests."""
        return [
            BatchEntry(request_id=request_id, num_tokens=tokens, draft_length=drafts)
            for request_id, tokens, drafts in zip(
                self.request_ids, self.num_tokens.tolist(), self.draft_lengths.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A change in what is said about one request's promise; a "no" is data.

    `reason` is one of `REASONS` ("" for a promise). `slack_s`: planned time to spare before the first
    token is due. `predicted_ttft_s` counts from arrival (inf where no plan exists).
    """

    request_id: str
    promised: bool
    reason: str = ""
    slack_s: float = 0.0
    predicted_ttft_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The planner's whole output.

    `verdicts` holds changes only. `at_risk` names promised requests that no plan can keep any more: an
    empty tuple and no new promise means "the running set is kept, nothing new"; a non-empty one means
    "the running set cannot be kept, let these go". `work` is the search effort spent, in the unit of
    `Limits.work_limit`; `headroom_tokens_per_s` is the prefill rate still unspent. `repeats`: true if the same batch,
    one token for each running request, will be planned again until a request arrives or ends or KV blocks run out.
    """

    batch: BatchPlan
    verdicts: tuple[Verdict, ...] = ()
    at_risk: tuple[str, ...] = ()
    work: int = 0
    headroom_tokens_per_s: float = 0.0
    repeats: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values (`inf` as null); two equal plans give equal documents."""
        batch = self.batch
        return {
            "request_ids": list(batch.request_ids),
            "num_tokens": batch.num_tokens.tolist(),
            "draft_lengths": batch.draft_lengths.tolist(),
            "preempted": list(batch.preempted),
            "predicted_s": batch.predicted_s,
            "verdicts": [
                {**asdict(v), "predicted_ttft_s": v.predicted_ttft_s if math.isfinite(v.predicted_ttft_s) else None}
                for v in self.verdicts
            ],
            "at_risk": list(self.at_risk),
            "work": self.work,
            "headroom_tokens_per_s": self.headroom_tokens_per_s,
        }


class Planner(Protocol):
    """Decide the next batch and verdicts. Pure: same state, same plan; the state is not changed.

    A planner may say more of itself with attributes: see `PlannerTraits`. One whose plans go on in ways that can be
    told has a `count_steps` (see `SloPlanner`).
    """

    def plan(self, state: ReplicaState) -> Plan:
        """Return the plan for the step that starts at `state.now_s`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerTraits:
    """What a planner says of itself, each in an attribute of the same name; what it does not say is as here.

    `makes_promises`: its verdicts are promises, so a request without one is graded as declined and may be offered to
    another replica. A planner without this gives no verdicts. `ignores_times`: it never reads
    `ReplicaState.perf_model`, so that a simulator need not keep that right. `max_draft_length`: the most draft tokens
    that it asks an engine to verify for one request in a step, where nobody sets another limit.
    """

    makes_promises: bool = False
    ignores_times: bool = False
    max_draft_length: int = 0

    @classmethod
    def of(cls, planner: object) -> Self:
        """Return the traits of a planner or of its class."""
        said: dict[str, Any] = {
            one.name: getattr(planner, one.name) for one in fields(cls) if hasattr(planner, one.name)
        }
        return cls(**said)
