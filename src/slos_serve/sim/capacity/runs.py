"""One run of a capacity search: a system, with settings, on one window of a scenario at one rate.

A `Cell` says everything that its outcome depends on, so that its key can name the outcome in a file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from slos_serve import named
from slos_serve.core.perf import PER_TOKEN
from slos_serve.core.slo.summary import drain_seconds
from slos_serve.sim.capacity.bounds import clairvoyant_attainment
from slos_serve.sim.capacity.search import RunOutcome
from slos_serve.sim.hardware import Hardware, load_hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import RunResult
from slos_serve.sim.systems import MAX_DRAFT_LENGTH, find_system
from slos_serve.sim.workloads.scenarios import Offer, find_scenario, scaled_slos

if TYPE_CHECKING:
    from slos_serve.core.types import Planner
    from slos_serve.sim.cluster.cluster import ClusterOptions
    from slos_serve.sim.workloads.workload import Workload

CLAIRVOYANT = "clairvoyant"  # not a system: a bound on all of them
STOP_SHARE = 0.35  # of a class's requests not met: what is left cannot matter to a search


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is run. `rate_rps` is per GPU; `settings` of the system are JSON.

    `window` numbers the scenario's windows of a `part` (tune, report). `slo_scale` multiplies every promise.
    `seed` is behind accepted drafts. `max_requests` per replica cuts the window short. `replicas` counts
    units of a system that needs several. `async_lag`: steps are planned one ahead; None: where the hardware's engine
    does so. `may_stop` bears on how far a hopeless run goes, not on what it is.
    """

    scenario: str
    system: str
    hardware: str
    data: str
    part: str
    window: int
    rate_rps: float
    settings: str = "{}"
    acceptance: float = 0.7
    async_lag: bool | None = None
    known_lengths: bool = False
    max_requests: int | None = None
    slo_scale: float = 1.0
    replicas: int = 1
    router: str | None = None
    seed: int = 0
    may_stop: bool = False

    def key(self) -> str:
        """Return what the outcome depends on beside the code, as text: names, promises, and the files' contents."""
        values = asdict(self)
        del values["may_stop"]
        path = Path(self.hardware)
        if path.is_file():
            values["hardware_digest"] = _digest(path.read_bytes())
        values["data_digest"] = _data_digest(self.data)
        values["slo_digest"] = _digest(repr(scaled_slos(self.slo_scale)).encode())
        own = [name for name in (self.system, self.router or "") if named.is_own(name)]
        if own:
            values["own_digests"] = [named.digest(name) for name in own]
        return json.dumps(values, sort_keys=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@lru_cache(maxsize=8)
def _data_digest(folder: str) -> str:
    """Return a digest of the files that scenarios read; a folder is taken not to change during one command."""
    digest = hashlib.sha256()
    for path in sorted(
        path for kind in ("traces", "lengths") for path in Path(folder, kind).glob("*") if path.is_file()
    ):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def deploy(cell: Cell) -> tuple[Planner, ClusterOptions]:
    """Return the cell's planner and cluster."""
    return find_system(cell.system).deploy(json.loads(cell.settings), num_replicas=cell.replicas, router=cell.router)


def offered(cell: Cell, hardware: Hardware, num_replicas: int) -> Workload:
    """Return the workload that `num_replicas` replicas are offered: their number times the rate and the requests."""
    offer = Offer(
        data=Path(cell.data),
        hardware=hardware,
        rate_rps=cell.rate_rps * hardware.num_gpus * num_replicas,
        part=cell.part,
        seed=cell.window,
        max_requests=None if cell.max_requests is None else cell.max_requests * num_replicas,
    )
    return find_scenario(cell.scenario).offer(offer, scaled_slos(cell.slo_scale))


def simulate(cell: Cell) -> RunResult:
    """Run a cell."""
    hardware = load_hardware(cell.hardware)
    _, cluster = deploy(cell)
    workload = offered(cell, hardware, cluster.num_replicas)
    budget = {name: int(STOP_SHARE * count) for name, count in workload.num_by_class().items()}
    return find_system(cell.system).serve(
        workload,
        hardware,
        settings=json.loads(cell.settings),
        num_replicas=cell.replicas,
        router=cell.router,
        engine=ReplicaOptions(
            acceptance={"": cell.acceptance}, known_lengths=cell.known_lengths, async_lag=cell.async_lag
        ),
        seed=1000 * cell.seed + cell.window,
        max_model_len=find_scenario(cell.scenario).max_model_len(hardware),
        miss_budget=budget if cell.may_stop else None,
    )


def outcome_of(result: RunResult) -> RunOutcome:
    """Count a run."""
    counts: dict[str, Counter[str]] = {}
    for grade in result.graded:
        if grade.outcome in {"none", "cancelled"}:
            continue
        mine = counts.setdefault(grade.slo_class, Counter())
        mine["offered"] += 1
        mine["met"] += grade.outcome == "met"
        mine["promised"] += grade.promised
        mine["kept"] += grade.promised and grade.outcome == "met"
    by_class = {
        name: (mine["met"], mine["offered"], mine["promised"], mine["kept"]) for name, mine in sorted(counts.items())
    }
    return RunOutcome(by_class=by_class, drain_s=drain_seconds(result.graded), stopped=result.stopped)


def run_cell(cell: Cell) -> RunOutcome:
    """Run a cell and count what came of it; for the clairvoyant bound, what no scheduler could exceed."""
    return bound(cell) if cell.system == CLAIRVOYANT else outcome_of(simulate(cell))


def bound(cell: Cell) -> RunOutcome:
    """Return the clairvoyant bound as an outcome: every class attains as much as the worst one may."""
    hardware = load_hardware(cell.hardware)
    workload = offered(cell, hardware, 1)
    share = clairvoyant_attainment(workload, hardware, acceptance=cell.acceptance, max_draft_length=MAX_DRAFT_LENGTH)
    counts = sorted(workload.num_by_class().items())
    return RunOutcome(by_class={name: (math.ceil(share * count - 1e-9), count, 0, 0) for name, count in counts})


def work_rate(workload: Workload, hardware: Hardware, *, share: float = 0.5) -> float:
    """Return `share` of the requests per second that a GPU could serve if it were never idle: a first guess."""
    sims = [*workload.arrivals, *(sim for _, sim in workload.following.values())]
    per_token_s = max(line[PER_TOKEN] for line in hardware.perf_model.lines)
    per_step_s = hardware.perf_model.seconds(1, 1)
    busy_s = 0.0
    for sim in sims:
        fresh = max(1, sim.request.num_prompt_tokens - sim.num_cached_tokens)
        busy_s += hardware.reference_s(fresh) + sim.num_output_tokens * (per_token_s + per_step_s / 32)
    return share * len(sims) / busy_s / hardware.num_gpus


def guess_rps(cell: Cell) -> float:
    """Return a rate per GPU to start a cell's search from."""
    hardware = load_hardware(cell.hardware)
    return work_rate(offered(cell, hardware, 1), hardware)
