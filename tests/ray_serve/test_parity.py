"""Simulator and Ray route alike: what one of them recorded, asked again by way of the other.

The simulator hands its router snapshots and arrivals as objects. On Ray snapshots arrive as JSON in a replica's
statistics, arrivals in hops, ends from the ingress, and Ray asks `choose_replicas`. Same policy, same answers.
`recorded_on_ray.jsonl.gz` holds the first 600 lines that a real cluster's router wrote in `benchmarks/cluster.py faults
--record FILE` (one replica killed, one stopped); where the policy is meant to decide otherwise, record anew.
"""

import asyncio
import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from parts import Clocks, stats

from slos_serve.core.perf import PerfModel
from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import draft, dry_run
from slos_serve.core.routing import virtual_copy
from slos_serve.core.routing.routers import Arrival, make_router
from slos_serve.core.types import Request, Slo
from slos_serve.core.warmup import warm_up_router
from slos_serve.lines import LineFile
from slos_serve.ray_serve.decisions import Recorded, replayed
from slos_serve.ray_serve.fleet import Fleet
from slos_serve.ray_serve.hops import Hop
from slos_serve.sim.cluster.cluster import ClusterOptions
from slos_serve.sim.hardware import Hardware
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.replica.requests import SimRequest
from slos_serve.sim.run import run_workload
from slos_serve.sim.workloads.workload import Workload

pytest.importorskip("ray.serve.llm")

NUM_REPLICAS = 3
HARDWARE = Hardware(
    name="toy",
    perf_model=PerfModel.from_terms([{"per_token_s": 1e-3, "per_context_token_s": 1e-6, "fixed_s": 0.01}]),
    kv_tokens=16_000,
    max_model_len=2000,
    max_num_batched_tokens=512,
    max_num_seqs=32,
)


class Recorder:
    """A router that writes down what it is told and what it answers."""

    def __init__(self, router):
        self.router = router
        self.hops, self.uses_snapshots = router.hops, router.uses_snapshots
        self.rank, self.forget = router.rank, router.forget
        self.events = []

    def observe(self, snapshot):
        self.events.append(("observe", snapshot))
        self.router.observe(snapshot)

    def ended(self, request_id):
        self.events.append(("ended", request_id))
        self.router.ended(request_id)

    def choose(self, arrival, names, now_s):
        route = self.router.choose(arrival, names, now_s)
        self.events.append(("sent", arrival, route.replica_id, now_s))
        return route

    def place(self, arrival, replica_id, now_s):
        self.events.append(("sent", arrival, replica_id, now_s))
        self.router.place(arrival, replica_id, now_s)


def recorded(policy, seed, monkeypatch):
    """Return what the router of a busy simulated cluster was told and answered."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / 24, 400))
    sims = []
    for i, at_s in enumerate(times.tolist()):
        slo = Slo(ttft_s=float(rng.choice([0.3, 0.9, 60.0])), tpot_s=0.05) if rng.random() < 0.9 else Slo()
        request = Request(
            request_id=f"q{i}", arrival_s=at_s, num_prompt_tokens=int(rng.choice([20, 300, 900])),
            max_output_tokens=200, slo=slo, slo_class="chat" if slo.ttft_s else "best-effort",
        )  # fmt: skip
        session = f"s{rng.integers(40)}" if rng.random() < 0.3 else ""
        sims.append(SimRequest(request=request, num_output_tokens=int(rng.integers(2, 60)), session_id=session))
    load = Workload(name="toy", arrivals=sims, duration_s=float(times[-1]))
    recorder = Recorder(make_router(policy, rng=np.random.default_rng(1)))
    monkeypatch.setattr(ClusterOptions, "make_router", lambda *_: recorder)
    options = ClusterOptions(num_replicas=NUM_REPLICAS, router=policy)
    run_workload(load, SloPlanner(), HARDWARE, cluster=options, options=ReplicaOptions(learns_times=True))
    return recorder.events


def asked_again(policy, events):
    """Return (what the simulator chose, what Ray's router chooses) for every request that was sent."""
    from slos_serve.ray_serve.router import SloRequestRouter

    clocks = Clocks()
    clocks.now = 0.0
    router = object.__new__(SloRequestRouter)  # its actor is Ray's; what decides is in the fleet
    router.fleet = Fleet(wall=clocks.wall, monotonic=clocks.wall)
    router.fleet.use(make_router(policy, rng=np.random.default_rng(1)))
    names = [f"r{i}" for i in range(NUM_REPLICAS)]
    candidates = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]
    known = {name: {} for name in names}
    keys = {}
    for i, (kind, what, *more) in enumerate(events):
        if kind == "observe":
            clocks.now = max(clocks.now, what.time_s)
            document = json.loads(json.dumps(replace(what, replica_id="-").to_json()))
            known[what.replica_id] = stats(float(i), replica=document)
            router.fleet.update(known)
        elif kind == "ended":
            router.fleet.ended(what, keys.get(what, ""))
        else:
            chosen, clocks.now = more
            keys[what.request_id] = f"h{i}"
            pending = SimpleNamespace(
                kwargs={"hop": Hop(key=f"h{i}", arrival=what)},
                metadata=SimpleNamespace(multiplexed_model_id=""),
                routing_context=SimpleNamespace(should_backoff=False),
            )
            groups = asyncio.run(router.choose_replicas(candidates, pending))
            yield chosen, groups[0][0].replica_id.unique_id


@pytest.mark.parametrize("policy", ["slo", "round-robin", "least-load"])
def test_what_a_simulated_cluster_decided_is_what_rays_router_decides(policy, monkeypatch):
    pairs = []
    for seed in range(2):
        events = recorded(policy, seed, monkeypatch)
        pairs += asked_again(policy, events)
    share = sum(ours == rays for ours, rays in pairs) / len(pairs)
    assert len(pairs) >= 800
    assert {rays for _, rays in pairs} == {f"r{i}" for i in range(NUM_REPLICAS)}
    assert share == 1.0, f"{share:.4f} of {len(pairs)} decisions alike"


def test_what_rays_router_decided_on_a_real_cluster_is_decided_again_without_it():
    with gzip.open(Path(__file__).parent / "recorded_on_ray.jsonl.gz", "rt") as lines:
        pairs = list(replayed(lines))
    assert len({then for then, _ in pairs}) >= 2
    assert [now for _, now in pairs] == [then for then, _ in pairs]


@pytest.mark.parametrize("policy", ["slo", "least-load"])
def test_a_record_of_decisions_holds_all_that_they_depend_on(policy, monkeypatch, tmp_path):
    file = LineFile(tmp_path / "decisions.jsonl", max_bytes=1 << 30)
    router = Recorded(make_router(policy), file, policy=policy, options={})
    answers = []
    for kind, what, *more in recorded(policy, 3, monkeypatch)[:900]:
        if kind == "observe":
            router.observe(what)
        elif kind == "ended":
            router.ended(what)
        else:
            answers.append(router.choose(what, [f"r{i}" for i in range(NUM_REPLICAS)], more[1]).replica_id)
    assert list(replayed(file.path.read_text().splitlines())) == [(one, one) for one in answers]


def test_a_file_that_is_no_record_of_decisions_is_refused():
    with pytest.raises(ValueError, match="slos-serve-decisions/1"):
        list(replayed(['{"event": "ended", "request": "r"}']))


def test_no_decision_waits_for_a_loop_to_be_compiled():
    def compiled():
        loops = (virtual_copy.advance, dry_run.run, draft._best_lengths, draft._gain_table)
        return [len(getattr(loop, "signatures", ())) for loop in loops]

    warm_up_router()
    before = compiled()
    with gzip.open(Path(__file__).parent / "recorded_on_ray.jsonl.gz", "rt") as lines:
        assert len(list(replayed(lines))) > 100
    assert compiled() == before


@pytest.mark.parametrize("path", ["/dev/full", "/proc/none/record"])
def test_a_record_on_a_full_disk_never_fails_a_request(path, caplog):
    router = Recorded(make_router("slo"), LineFile(Path(path), max_bytes=1000), policy="slo", options={})
    arrival = Arrival(request_id="a", arrival_s=0.0, num_prompt_tokens=10)
    for i in range(3):
        assert router.choose(replace(arrival, request_id=str(i)), ["one"], 0.0).replica_id == "one"
        router.ended(str(i))
    router.forget("one")
    assert len([line for line in caplog.messages if "the record of routes stops" in line]) == 1
