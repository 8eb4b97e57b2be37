"""What a router knows of a replica: a summary small enough to publish, rich enough to plan with.

A snapshot holds what the planner's own feasibility test needs: the performance model with its margins,
the engine's limits, free KV blocks, one row for each prefill that is promised or still undecided, and the
promised decodes in groups of like TPOT and urgency. A group of several decodes is one column of a demand
whose pace and gain are those of all of them together (see `group_demand`), so that the test costs the
same whether ten or a thousand requests decode.

Times are seconds on the replica's clock; JSON has null for "none".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slos_serve.core.perf import FIXED, PER_REQUEST, FloatArray, PerfModel, batch_seconds
from slos_serve.core.planning import columns, demand
from slos_serve.core.planning.columns import BATCH_FIXED_MULTIPLE, MIN_TPOT_S, read_rows
from slos_serve.core.planning.demand import Demand, Machine
from slos_serve.core.planning.programme import tiers_of
from slos_serve.core.types import Limits

if TYPE_CHECKING:
    from typing import Self

    from slos_serve.core.types import ReplicaState

VERSION = 1
MODES = ("observe", "enforce")
MAX_PREFILLS = 64  # rows beyond it are merged into the last one
MAX_SESSIONS = 256
# Decodes of one TPOT are told apart by how many periods ahead of schedule they are.
AHEAD_PERIODS = (1.0, 2.0, 4.0, 8.0, 16.0)
FINITE = ("time_s", "free_kv_blocks", "best_effort_tokens", "headroom_tokens_per_s", "step_s", "batch_fixed_multiple")
PREFILL_COLUMNS = (demand.LEFT, demand.CONTEXT, demand.DEADLINE, demand.TPOT, demand.OUTPUT_LEFT)


class PrefillRow(NamedTuple):
    """A prefill that is promised, or waits for a verdict. Tokens and blocks; `inf` where nothing is asked."""

    request_id: str
    left_tokens: float
    context_tokens: float
    deadline_s: float
    tpot_s: float
    output_tokens: float  # predicted
    held_blocks: float  # held or granted
    start_blocks: float
    acceptance: float
    promised: bool

    @property
    def is_owed(self) -> bool:
        """Tell whether anything is asked about it."""
        return math.isfinite(self.deadline_s) or math.isfinite(self.tpot_s)


class DecodeGroup(NamedTuple):
    """Promised decodes of one TPOT and urgency. Totals, but for the earliest due time and mean acceptance."""

    tpot_s: float
    size: float  # requests
    context_tokens: float
    due_s: float
    output_tokens: float  # predicted, still to come
    held_blocks: float
    acceptance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """One replica at one moment; see the module's text.

    `free_kv_blocks`: free, plus what best-effort work would give back, less what promised prefills under
    way have been granted (may be negative). `sessions`: (session id, cached tokens) of prefixes that the
    cache holds, newest last. `step_s`: how long the step that starts now is predicted to take.
    `batch_fixed_multiple`: its planner's bound on a batch, in fixed costs of a step. `mode`:
    `observe` makes no promises. Raises `ValueError` for unusable values.
    """

    replica_id: str
    time_s: float
    perf_model: PerfModel
    limits: Limits
    free_kv_blocks: float
    prefills: tuple[PrefillRow, ...] = ()
    decodes: tuple[DecodeGroup, ...] = ()
    acceptance: Mapping[str, float] = field(default_factory=dict)
    num_running: int = 0
    num_waiting: int = 0
    num_best_effort: int = 0
    best_effort_tokens: float = 0.0
    headroom_tokens_per_s: float = 0.0
    step_s: float = 0.0
    batch_fixed_multiple: float = BATCH_FIXED_MULTIPLE
    sessions: tuple[tuple[str, int], ...] = ()
    mode: str = "enforce"
    healthy: bool = True
    draining: bool = False

    def __post_init__(self) -> None:
        if not self.replica_id or not isinstance(self.replica_id, str):
            raise ValueError(f"ReplicaSnapshot.replica_id = {self.replica_id!r}: expected a name")
        if self.mode not in MODES:
            raise ValueError(f"ReplicaSnapshot.mode = {self.mode!r}: expected one of {MODES}")
        for name in FINITE:
            _finite(name, getattr(self, name))
        for name in ("num_running", "num_waiting", "num_best_effort", "batch_fixed_multiple"):
            if getattr(self, name) < 0:
                raise ValueError(f"ReplicaSnapshot.{name} = {getattr(self, name)!r}: expected 0 or more")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document that `from_json` turns back into an equal snapshot."""
        document: dict[str, Any] = {"version": VERSION}
        for one in fields(self):
            document[one.name] = getattr(self, one.name)
        document["perf_model"] = self.perf_model.to_json()
        document["limits"] = asdict(self.limits)
        document["acceptance"] = dict(self.acceptance)
        document["prefills"] = [_without_inf(row) for row in self.prefills]
        document["decodes"] = [_without_inf(row) for row in self.decodes]
        document["sessions"] = [list(pair) for pair in self.sessions]
        return document

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> Self:
        """Rebuild from `to_json`. `ValueError` for another version, an unknown or missing field, or a bad value."""
        try:
            document = json.loads(data) if isinstance(data, str) else data
            if not isinstance(document, Mapping) or document.get("version") != VERSION:
                version = document.get("version") if isinstance(document, Mapping) else document
                raise ValueError(f"ReplicaSnapshot.version = {version!r}: expected {VERSION}")
            values = {key: value for key, value in document.items() if key != "version"}
            unknown = sorted(set(values) - {one.name for one in fields(cls)})
            if unknown:
                raise ValueError(f"ReplicaSnapshot.{unknown[0]}: expected names among {cls.__slots__}")
            values["perf_model"] = PerfModel.from_json(values["perf_model"])
            values["limits"] = Limits(**values["limits"])
            values["prefills"] = tuple(_prefill(row) for row in values.get("prefills", ()))
            values["decodes"] = tuple(_group(row) for row in values.get("decodes", ()))
            values["sessions"] = tuple((str(name), int(tokens)) for name, tokens in values.get("sessions", ()))
            return cls(**values)
        except (TypeError, KeyError, AttributeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"ReplicaSnapshot: {error}: expected the fields of version {VERSION}") from error


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"ReplicaSnapshot.{name} = {value!r}: expected a finite number")
    return float(value)


def _without_inf(row: Sequence[Any]) -> list[Any]:
    return [None if isinstance(value, float) and math.isinf(value) else value for value in row]


def _numbers(what: str, values: Sequence[Any]) -> list[float]:
    return [math.inf if value is None else _finite(what, value) for value in values]


def _prefill(row: Sequence[Any]) -> PrefillRow:
    if len(row) != len(PrefillRow._fields):
        raise ValueError(f"ReplicaSnapshot.prefills row {row!r}: expected {PrefillRow._fields}")
    numbers = _numbers("prefills", row[1:-1])
    return PrefillRow._make([str(row[0]), *numbers, bool(row[-1])])


def _group(row: Sequence[Any]) -> DecodeGroup:
    if len(row) != len(DecodeGroup._fields):
        raise ValueError(f"ReplicaSnapshot.decodes row {row!r}: expected {DecodeGroup._fields}")
    return DecodeGroup(*_numbers("decodes", row))


def snapshot_of(
    state: ReplicaState,
    *,
    replica_id: str,
    headroom_tokens_per_s: float = 0.0,
    step_s: float = 0.0,
    planner: object = None,
    sessions: Sequence[tuple[str, int]] = (),
    mode: str = "enforce",
    healthy: bool = True,
    draining: bool = False,
) -> ReplicaSnapshot:
    """Summarise the planner's input.

    `headroom_tokens_per_s` is the last plan's, `step_s` its batch's seconds. `planner` says how long its batches may
    be, so that routers test what it would plan.
    """
    rows, limits, model = state.requests.rows, state.limits, state.perf_model
    fixed_s = max(model.seconds(1.0), MIN_TPOT_S)
    table, flags, granted = read_rows(rows, state.now_s, 0.0, limits.guard_s, fixed_s, limits.block_size)
    running, promised, held = flags[columns.IS_RUNNING], flags[columns.IS_PROMISED], table[demand.HELD]
    undecided = flags[columns.IS_CANDIDATE] & flags[columns.IS_PENDING]
    wants = ~flags[columns.IS_ENDED]
    rest = wants & ~promised & ~undecided
    by_class = np.array([state.acceptance.get(name, 0.0) for name in state.requests.classes] or [0.0])
    acceptance = np.clip(by_class, 0.0, columns.MAX_ACCEPTANCE)[rows["class_index"]]
    prefills = np.flatnonzero((promised | undecided) & (table[demand.LEFT] > 0))
    prefills = prefills[np.lexsort((rows["seq"][prefills], table[demand.DEADLINE, prefills]))]
    values = [*table[list(PREFILL_COLUMNS)], granted * promised, table[demand.START], acceptance]
    listed = [
        PrefillRow._make([state.requests.request_ids[i], *row, bool(promised[i])])
        for i, row in zip(prefills.tolist(), np.stack(values).T[prefills].tolist(), strict=True)
    ]
    live = np.flatnonzero(flags[columns.IS_LIVE])
    owed = float((granted - held)[promised].sum())
    return ReplicaSnapshot(
        replica_id=replica_id,
        time_s=state.now_s,
        perf_model=model,
        limits=limits,
        free_kv_blocks=state.num_free_kv_blocks + float(held[running & wants & ~promised].sum()) - owed,
        prefills=_merged(listed),
        decodes=_grouped(table[:, live], acceptance[live], state.now_s),
        acceptance={name: float(state.acceptance.get(name, 0.0)) for name in state.requests.classes},
        num_running=int(running.sum()),
        num_waiting=len(rows) - int(running.sum()),
        num_best_effort=int(rest.sum()),
        best_effort_tokens=float((np.maximum(table[demand.LEFT], 1.0) + table[demand.OUTPUT_LEFT])[rest].sum()),
        headroom_tokens_per_s=headroom_tokens_per_s,
        step_s=step_s,
        batch_fixed_multiple=getattr(planner, "batch_fixed_multiple", BATCH_FIXED_MULTIPLE),
        sessions=tuple(sessions[-MAX_SESSIONS:]),
        mode=mode,
        healthy=healthy,
        draining=draining,
    )


def _merged(rows: list[PrefillRow]) -> tuple[PrefillRow, ...]:
    """Return at most `MAX_PREFILLS` rows; those beyond become one, due when the first of them is."""
    if len(rows) <= MAX_PREFILLS:
        return tuple(rows)
    tail = rows[MAX_PREFILLS - 1 :]
    merged = tail[0]._replace(
        left_tokens=sum(row.left_tokens for row in tail),
        held_blocks=sum(row.held_blocks for row in tail),
        start_blocks=sum(row.start_blocks for row in tail),
        promised=any(row.promised for row in tail),
    )
    return (*rows[: MAX_PREFILLS - 1], merged)


def _grouped(decodes: Demand, acceptance: FloatArray, now_s: float) -> tuple[DecodeGroup, ...]:
    """Group decodes by how often they need a batch, and by urgency."""
    needed = demand.needed_each(decodes, now_s)
    tpot = np.where(decodes[demand.LEAD] > 0.0, needed, decodes[demand.TPOT])
    due = decodes[demand.DUE]
    paced = np.isfinite(tpot)
    _, tier = tiers_of(np.where(paced, needed, math.inf))
    with np.errstate(invalid="ignore"):
        ahead = np.where(paced & np.isfinite(due), (due - now_s) / np.where(paced, tpot, 1.0), math.inf)
    key = tier * (len(AHEAD_PERIODS) + 1) + np.searchsorted(AHEAD_PERIODS, ahead)
    groups = []
    for one in np.unique(key).tolist():
        of, part = key == one, decodes[:, key == one]
        tpot_s, due_s = float(tpot[of].min()), float(due[of].min())
        context, output_left, blocks = part[[demand.CONTEXT, demand.OUTPUT_LEFT, demand.HELD]].sum(axis=1).tolist()
        mean = float(acceptance[of].mean())
        groups.append(DecodeGroup(tpot_s, float(part.shape[1]), context, due_s, output_left, blocks, mean))
    return tuple(groups)


def machine_of(snapshot: ReplicaSnapshot) -> Machine:
    """Return the engine for the planner's test.

    A group stands for several requests but is one column: what each request costs beside its tokens is
    added to the fixed cost, and its seats are taken off, as if all of them decoded in every batch.
    """
    limits, model = snapshot.limits, snapshot.perf_model
    lines = model.planned()
    fixed_s = max(batch_seconds(lines, 1.0, 1.0, 0.0, 0.0, 0.0), MIN_TPOT_S)
    hidden = sum(group.size for group in snapshot.decodes) - len(snapshot.decodes)
    lines[:, FIXED] += lines[:, PER_REQUEST] * hidden
    return Machine(
        lines=lines,
        margin_prefill=model.margin_prefill,
        margin_decode=model.margin_decode,
        token_budget=float(limits.max_num_batched_tokens),
        max_seqs=max(1.0, float(limits.max_num_seqs) - hidden),
        block_size=float(limits.block_size),
        free_blocks=snapshot.free_kv_blocks,
        max_batch_s=snapshot.batch_fixed_multiple * fixed_s,
    )


def prefill_demand(rows: Sequence[PrefillRow]) -> Demand:
    """Return a demand of prefill rows, one column each, without drafts."""
    table = _empty(len(rows))
    if rows:
        values = np.array([row[1:] for row in rows], np.float64).T
        table[demand.LEFT], table[demand.CONTEXT], table[demand.DEADLINE] = values[:3]
        table[demand.TPOT], table[demand.OUTPUT_LEFT] = values[3:5]
        table[demand.HELD], table[demand.START] = values[5:7]
        table[demand.DUE] = math.inf
        table[demand.REQUIRED] = values[8]
    return table


def group_demand(groups: Sequence[DecodeGroup]) -> Demand:
    """Return a demand of decode groups: so many requests of one TPOT yield as many tokens per TPOT."""
    table = _empty(len(groups))
    if groups:
        tpot, size, context, due, output_left, held, _ = np.array(groups, np.float64).T
        table[demand.CONTEXT], table[demand.DUE], table[demand.HELD] = context, due, held
        table[demand.TPOT] = tpot / size
        table[demand.VERIFY] = table[demand.GAIN] = size
        table[demand.OUTPUT_LEFT] = output_left
        table[demand.DEADLINE] = -math.inf
        table[demand.REQUIRED] = 1.0
    return table


def _empty(num_requests: int) -> Demand:
    table = np.zeros((demand.NUM_COLUMNS, num_requests))
    table[demand.GAP] = math.inf
    table[demand.VERIFY] = table[demand.GAIN] = table[demand.VALUE] = 1.0
    return table
