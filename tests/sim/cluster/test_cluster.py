"""Many replicas: every request ends once wherever it goes, routing sees no future, and faults lose nothing silently."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.worlds import MODEL, hardware, sim, workload

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.planner import SloPlanner
from slos_serve.core.routing.routers import ROUTERS
from slos_serve.errors import ConfigError
from slos_serve.sim.ablations import at_arrival, fixed_batch, no_lower_tier
from slos_serve.sim.cluster.cluster import ClusterOptions
from slos_serve.sim.cluster.faults import Fault, parse_fault
from slos_serve.sim.replica.replica import ReplicaOptions
from slos_serve.sim.run import pooled, run_workload
from slos_serve.sim.systems import SYSTEMS

PROMISES = ReplicaOptions(learns_times=False)  # no margin: times can be worked out


def load_of(seed, count=60, *, rate=20.0, prompt=120, output=12, ttft_s=0.8, classes=("chat",), **more):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    return workload(
        *[
            sim(
                f"r{i}",
                int(rng.integers(5, 2 * prompt)),
                int(rng.integers(1, 2 * output)),
                at_s=float(t),
                ttft_s=ttft_s,
                slo_class=classes[i % len(classes)],
                **more,
            )
            for i, t in enumerate(times)
        ],
        duration_s=float(times[-1]),
    )


def run(load, replicas=3, *, planner=None, options=None, hw=None, seed=0, **more):
    cluster = ClusterOptions(num_replicas=replicas, **more)
    planner = planner or (SloPlanner() if options is PROMISES else VllmPlanner())
    return run_workload(load, planner, hw or hardware(), options=options, cluster=cluster, seed=seed)


def outcomes(result):
    return Counter(grade.outcome for grade in result.graded)


def attained(result):
    return outcomes(result)["met"] / len(result.graded)


# -- conservation and determinism -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    replicas=st.integers(1, 5),
    router=st.sampled_from(sorted(ROUTERS)),
    promises=st.booleans(),
    async_lag=st.booleans(),
    lag_s=st.sampled_from([0.0, 0.05, 1.0]),
    faults=st.lists(
        st.builds(
            Fault,
            kind=st.sampled_from(["kill", "slow", "late", "drain"]),
            replica=st.integers(0, 0),
            at_s=st.floats(0, 3),
            duration_s=st.sampled_from([0.3, 2.0, math.inf]),
        ),
        max_size=2,
    ),
)
def test_every_request_has_one_outcome_whatever_is_routed_where_and_whatever_breaks(
    seed, replicas, router, promises, async_lag, lag_s, faults
):
    load = load_of(seed, 30, rate=15.0 * replicas)
    result = run(
        load,
        replicas,
        planner=SloPlanner() if promises else VllmPlanner(),
        options=ReplicaOptions(async_lag=async_lag),
        router=router,
        snapshot_lag_s=lag_s,
        faults=tuple(faults),
    )
    assert len(result.graded) == 30
    assert all(len(replica.table) == 0 or replica.is_dead for replica in result.cluster.replicas)
    for replica in result.cluster.replicas:
        assert replica.engine.pool.num_free == replica.engine.pool.num_blocks
    if not any(fault.kind in {"kill", "late", "drain"} for fault in faults):
        assert outcomes(result)["failed"] == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_seed_gives_the_same_bytes(router):
    def document():
        result = run(load_of(1), router=router, options=PROMISES, faults=(parse_fault("kill:1@0.5:1"),))
        return json.dumps(result.entry(system="x", wall_s=0.0))

    assert document() == document()


def test_one_replica_behind_any_router_is_a_replica():
    load = load_of(2)
    entries = [run(load, 1, router=router, options=PROMISES).entry(system="x", wall_s=0.0) for router in ROUTERS]
    for entry in entries:
        del entry["router"]
    assert all(entry == entries[0] for entry in entries)


def test_round_robin_spreads_requests_evenly():
    result = run(workload(*[sim(f"r{i}", 20, 2, at_s=0.001 * i) for i in range(9)]), router="round-robin")
    assert [replica.num_steps > 0 for replica in result.cluster.replicas] == [True] * 3
    assert [replica.tokens_computed for replica in result.cluster.replicas] == [3 * 21] * 3


# -- what routing is for ----------------------------------------------------------------------------------


def test_the_slo_router_attains_more_than_round_robin_where_lengths_differ():
    def load(seed):
        rng = np.random.default_rng(seed)
        times = np.cumsum(rng.exponential(1 / 16, 240))
        prompts = rng.choice([20, 600], 240, p=[0.8, 0.2])
        rows = zip(times, prompts, rng.integers(2, 20, 240), strict=True)
        sims = [sim(f"r{i}", int(p), int(o), at_s=float(t), ttft_s=0.9) for i, (t, p, o) in enumerate(rows)]
        return workload(*sims, duration_s=float(times[-1]))

    met = Counter()
    for seed in range(3):
        for router in ("round-robin", "slo"):
            met[router] += outcomes(run(load(seed), 4, router=router, options=PROMISES))["met"]
    assert met["slo"] > met["round-robin"] + 20


def test_a_request_hops_away_from_a_replica_that_cannot_promise():
    # r0 and r1 take turns, so both long prompts go to r0; the sequential router always begins with r0
    long = [sim(f"long{i}", 700, 2, ttft_s=1.0) for i in range(2)]
    load = workload(*long, sim("short", 30, 3, at_s=0.1, ttft_s=2.5))
    stays = run(load, 2, router="sequential", max_hops=0, options=PROMISES)
    hops = run(load, 2, router="sequential", options=PROMISES)
    assert outcomes(stays)["met"] == 2
    assert outcomes(hops)["met"] == 3
    assert hops.cluster.num_hops == 2  # one prompt that r0 cannot serve, and one that it would have served last
    assert [replica.num_steps > 0 for replica in stays.cluster.replicas] == [True, False]


def test_a_hop_keeps_the_time_of_arrival():
    load = workload(*[sim(f"r{i}", 700, 2, ttft_s=1.0) for i in range(3)])
    result = run(load, 3, router="sequential", options=PROMISES, hop_s=0.05)
    assert outcomes(result)["met"] == 3
    assert result.cluster.num_hops == 3  # one hop, and one request twice
    waits = sorted(grade.ttft_s for grade in result.graded)
    assert waits == pytest.approx([waits[0], waits[0] + 0.05, waits[0] + 0.1], abs=1e-9)


def test_hops_are_limited():
    load = workload(*[sim(f"r{i}", 700, 2, ttft_s=1.0) for i in range(8)])
    result = run(load, 4, router="sequential", max_hops=1, options=PROMISES)
    assert result.cluster.num_hops <= 8
    assert outcomes(result)["met"] == 2


def test_a_waiting_request_is_fetched_by_a_replica_that_becomes_free():
    # one request fills a replica's memory; which of the two ends first nobody can know when the third arrives
    hw = hardware(kv_tokens=960, max_model_len=960)
    load = workload(
        sim("long", 700, 200, max_output_tokens=250),
        sim("short", 700, 20, at_s=0.001, max_output_tokens=250),
        sim("third", 400, 2, at_s=1.0, ttft_s=2.0, max_output_tokens=250),
    )
    stays = run(load, 2, hw=hw, router="slo", max_hops=0, options=PROMISES)
    fetched = run(load, 2, hw=hw, router="slo", options=PROMISES)
    assert outcomes(stays) == {"met": 2, "declined": 1}
    assert outcomes(fetched) == {"met": 3}
    assert fetched.cluster.num_hops == 1


def test_sessions_return_to_the_replica_that_holds_their_prefix():
    rounds = {}
    first = []
    for s in range(6):
        names = [f"s{s}-{turn}" for turn in range(4)]
        sims = [
            sim(
                name,
                100 + 60 * turn,
                8,
                at_s=0.05 * s,
                ttft_s=1.0,
                session_id=f"s{s}",
                num_cached_tokens=96 + 60 * turn if turn else 0,
            )
            for turn, name in enumerate(names)
        ]
        first.append(sims[0])
        for before, after in itertools.pairwise(sims):
            rounds[before.request.request_id] = (0.2, after)
    load = workload(*first, following=rounds)
    computed = {}
    for router in ("round-robin", "slo"):
        result = run(load, 3, router=router, options=PROMISES)
        computed[router] = sum(replica.tokens_computed for replica in result.cluster.replicas)
        assert len(result.graded) == 24
    assert computed["slo"] < 0.75 * computed["round-robin"]


def test_the_pooled_bound_is_one_replica_as_fast_as_all():
    hw = hardware()
    fast = pooled(hw, 4)
    assert fast.perf_model.seconds(100, context_tokens=50) == pytest.approx(
        hw.perf_model.seconds(100, context_tokens=50) / 4
    )
    assert (fast.kv_tokens, fast.max_num_seqs) == (4 * hw.kv_tokens, 4 * hw.max_num_seqs)
    load = load_of(3, 200, rate=40.0)
    alone = run(load, 4, router="pooled", options=PROMISES)
    assert len(alone.cluster.replicas) == 1
    assert attained(alone) >= attained(run(load, 4, router="round-robin", options=PROMISES))


# -- faults ------------------------------------------------------------------------------------------------


def test_a_killed_replica_fails_its_streams_and_its_waiting_requests_go_elsewhere():
    decoding = sim("a", 50, 200, ttft_s=1.0, slo_class="decoding")
    waiting = [sim(f"w{i}", 400, 2, at_s=0.3, ttft_s=5.0, slo_class="waiting") for i in range(4)]
    result = run(workload(decoding, *waiting), 2, faults=(parse_fault("kill:0@0.35"),), detect_s=0.2)
    by_class = {
        name: Counter(g.outcome for g in result.graded if g.slo_class == name) for name in ("decoding", "waiting")
    }
    assert by_class["decoding"] == {"failed": 1}
    assert by_class["waiting"] == {"met": 4}


def test_what_is_sent_to_a_dead_replica_before_that_is_noticed_is_sent_again():
    load = workload(sim("early", 20, 2), sim("blind", 20, 2, at_s=0.2, ttft_s=3.0))
    result = run(load, 2, router="sequential", faults=(parse_fault("kill:0@0.1"),), detect_s=0.5)
    assert outcomes(result) == {"met": 2}
    blind = max(result.graded, key=lambda grade: grade.arrival_s)
    assert blind.ttft_s == pytest.approx(0.4 + MODEL.seconds(20), abs=1e-9)


def test_without_any_replica_requests_wait_for_one_that_comes_back_and_fail_where_none_will():
    load = workload(sim("a", 20, 2, at_s=0.5, ttft_s=5.0))
    back = run(load, 1, faults=(parse_fault("kill:0@0.1:2"),))
    assert (outcomes(back), len(back.cluster.replicas)) == ({"met": 1}, 2)
    assert back.graded[0].ttft_s > 1.5
    assert outcomes(run(load, 1, faults=(parse_fault("kill:0@0.1"),))) == {"failed": 1}


def test_a_drained_replica_finishes_what_it_has_and_gets_nothing_new():
    load = workload(sim("a", 20, 30), *[sim(f"b{i}", 20, 2, at_s=0.2 + 0.01 * i) for i in range(6)])
    result = run(load, 2, router="round-robin", faults=(parse_fault("drain:0@0.1"),))
    assert outcomes(result)["failed"] == 0
    assert [replica.tokens_computed for replica in result.cluster.replicas] == [20 + 29, 6 * 21]


def test_a_replica_that_starts_late_serves_from_then_on():
    load = workload(*[sim(f"r{i}", 20, 2, at_s=0.1 * i) for i in range(20)])
    result = run(load, 2, router="round-robin", faults=(parse_fault("late:1@1"),))
    first, second = result.cluster.replicas
    assert first.tokens_computed > second.tokens_computed > 0


def test_a_slow_replica_gets_less_from_the_slo_router():
    load = load_of(5, 200, rate=16.0)
    learns = ReplicaOptions()
    result = run(load, 2, router="slo", planner=SloPlanner(), options=learns, faults=(parse_fault("slow:0@0:1000:3"),))
    slow, fast = result.cluster.replicas
    assert slow.tokens_computed < 0.75 * fast.tokens_computed


def test_a_crowd_does_not_follow_a_replica_that_comes_back():
    load = load_of(7, 400, rate=24.0)
    calm = run(load, 3, router="slo", options=PROMISES)
    shaken = run(load, 3, router="slo", options=PROMISES, faults=(parse_fault("kill:0@4:4"),))
    assert outcomes(shaken)["met"] > 0.8 * outcomes(calm)["met"]


@pytest.mark.parametrize(
    "text", ["kill", "kill:0", "kill:x@3", "melt:0@3", "kill:0@3:4:5:6", "slow:0@-1", "kill:0@3:0"]
)
def test_a_fault_that_makes_no_sense_is_refused(text):
    with pytest.raises(ConfigError, match=r"^arguments: fault = '.*': expected kill\|.*, the others positive$"):
        parse_fault(text)


# -- other layouts -------------------------------------------------------------------------------------------


def test_a_disaggregated_pair_hands_over_after_the_first_token_and_its_transfer():
    transfer_s = 1e-4
    result = run(workload(sim("a", 100, 5)), 2, num_prefill=1, kv_transfer_s_per_token=transfer_s)
    grade, (prefill, decode) = result.graded[0], result.cluster.replicas
    assert grade.ttft_s == pytest.approx(MODEL.seconds(100), abs=1e-12)
    steps = sum(MODEL.seconds(1, context_tokens=100 + n) for n in range(4))
    assert grade.finish_s == pytest.approx(MODEL.seconds(100) + 100 * transfer_s + steps, abs=1e-12)
    assert (prefill.tokens_computed, decode.tokens_computed) == (100, 4)
    assert result.cluster.num_moved == 1


def test_a_request_of_one_token_never_leaves_its_prefill_replica():
    result = run(workload(sim("a", 100, 1)), 2, num_prefill=1)
    assert (result.cluster.num_moved, result.graded[0].outcome) == (0, "met")


def test_a_session_finds_its_prefix_where_its_earlier_prompts_were_prefilled():
    load = workload(
        sim("other", 80, 2),
        sim("first", 100, 5, session_id="s"),
        sim("second", 160, 5, at_s=10.0, session_id="s", num_cached_tokens=96),
    )
    result = run(load, 3, num_prefill=2)
    computed = [replica.tokens_computed for replica in result.cluster.replicas]
    assert computed == [80, 100 + (160 - 96), 1 + 4 + 4]


def test_a_disaggregated_decode_survives_preemption():
    hw = hardware(kv_tokens=96, max_model_len=96)
    result = run(workload(sim("a", 30, 40), sim("b", 30, 40)), 2, hw=hw, num_prefill=1)
    assert result.cluster.replicas[1].engine.num_preemptions > 0
    assert sorted(grade.num_output_tokens for grade in result.graded) == [40, 40]


def test_silos_keep_classes_apart():
    load = load_of(4, 30, classes=("chat", "coding"))
    result = run(load, 3, silos={"chat": 1, "coding": 2})
    mine = [sim for sim in load.arrivals if sim.request.slo_class == "chat"]
    tokens = sum(one.request.num_prompt_tokens + one.num_output_tokens - 1 for one in mine)
    assert result.cluster.replicas[0].tokens_computed == tokens


@pytest.mark.parametrize(
    ("settings", "replicas", "prefill"),
    [({"prefill": 1, "decode": 1}, 2, 1), ({"prefill": 2, "decode": 1}, 3, 2), ({"prefill": 1, "decode": 2}, 3, 1)],
)
def test_distserve_is_deployed_in_units(settings, replicas, prefill):
    for units in (1, 4):
        _, cluster = SYSTEMS["distserve"].deploy({"token_budget": 512, **settings}, num_replicas=units)
        assert (cluster.num_replicas, cluster.num_prefill) == (replicas * units, prefill * units)
        assert cluster.kv_transfer_s_per_token == pytest.approx(524_288 / 300e9)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_named_system_serves_at_every_setting_of_its_grid(name):
    system = SYSTEMS[name]
    load = load_of(6, 24, rate=12.0, classes=("chat", "coding", "summarization"))
    for chosen in (system.default, *system.grid[:2], system.grid[-1]):
        planner, cluster = system.deploy(chosen, num_replicas=2)
        options = ReplicaOptions(drops_declined=system.drops_declined, acceptance={"": 0.7})
        result = run_workload(
            load, planner, hardware(), options=options, cluster=cluster, max_draft_length=system.max_draft_length
        )
        assert len(result.graded) == 24
        assert result.cluster.options.num_replicas >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_replicas": 0},
        {"num_replicas": 2, "num_prefill": 2},
        {"num_replicas": 2, "silos": {"chat": 1}},
        {"router": "dice"},
        {"hop_s": -1.0},
        {"snapshot_period_s": 0.0},
        {"num_replicas": 1, "faults": (Fault(kind="kill", replica=1, at_s=1.0),)},
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="expected"):
        ClusterOptions(**options)


# -- ablations and wrong predictions -----------------------------------------------------------------------


def crowd():
    """Return more than one replica can promise at once, with time to spare: deferral is worth something."""
    return workload(*[sim(f"r{i}", 300, 3, at_s=0.01 * i, ttft_s=1.4) for i in range(6)])


def test_without_deferral_what_is_not_promised_at_arrival_never_is():
    deferring = run(crowd(), 1, options=PROMISES)
    never = run(crowd(), 1, planner=at_arrival(), options=PROMISES)
    assert outcomes(never)["met"] <= outcomes(deferring)["met"]
    leads = [grade for grade in never.graded if grade.promised]
    assert outcomes(never)["declined"] == 6 - len(leads)


def test_without_a_lower_tier_nobody_is_told_no():
    planner = no_lower_tier()
    said = []

    class Watched:
        makes_promises = True

        def plan(self, state):
            plan = planner.plan(state)
            said.extend(plan.verdicts)
            return plan

    result = run(crowd(), 1, planner=Watched(), options=PROMISES)
    assert said
    assert all(verdict.promised for verdict in said)
    assert len(result.graded) == 6


def test_dropping_what_is_declined_turns_it_away_and_computes_nothing_for_it():
    load = workload(sim("hopeless", 900, 2, ttft_s=0.1), sim("fine", 20, 2, ttft_s=2.0))
    kept = run(load, 1, options=PROMISES)
    dropped = run(load, 1, planner=SloPlanner(), options=ReplicaOptions(drops_declined=True))
    assert outcomes(kept) == {"declined": 1, "met": 1}
    assert outcomes(dropped) == {"rejected": 1, "met": 1}
    assert dropped.replica.tokens_computed == 21


def test_planning_one_step_ahead_who_is_turned_away_leaves_when_the_step_under_way_has_ended():
    load = workload(
        sim("running", 50, 40, ttft_s=2.0),
        sim("hopeless", 900, 2, at_s=0.2, ttft_s=0.1),
        sim("fine", 20, 2, ttft_s=2.0),
    )
    result = run(load, 1, planner=SloPlanner(), options=ReplicaOptions(drops_declined=True, async_lag=True))
    assert outcomes(result) == {"rejected": 1, "met": 2}
    assert result.replica.tokens_computed < 900


def test_a_fixed_batch_never_holds_more_than_its_size():
    sizes = []
    planner = fixed_batch(token_budget=64)

    class Watched:
        makes_promises = True

        def plan(self, state):
            plan = planner.plan(state)
            sizes.append(int(plan.batch.num_tokens.sum()))
            return plan

    run(crowd(), 1, planner=Watched(), options=PROMISES)
    assert max(sizes) == 64


def test_wrong_lengths_reach_the_planner_and_not_the_truth():
    seen = []

    class Watched:
        def plan(self, state):
            seen.extend(state.requests.rows["predicted_output_tokens"].tolist())
            return VllmPlanner().plan(state)

    load = workload(sim("a", 20, 5, max_output_tokens=400), hints={"chat": 40.0})
    for error in (1.0, 0.5):
        seen.clear()
        result = run(load, 1, planner=Watched(), options=ReplicaOptions(length_error=error))
        assert result.graded[0].num_output_tokens == 5
        first = seen[0]
        if error == 1.0:
            true = first
    assert first == pytest.approx(0.5 * true)


def test_acceptance_drifts_and_the_host_measures_where_to():
    load = workload(*[sim(f"r{i}", 20, 400, at_s=0.5 * i) for i in range(40)])
    options = ReplicaOptions(acceptance={"": 0.8}, acceptance_drift=-2.0)
    result = run(load, 1, planner=VllmPlanner(draft_length=3), options=options)
    assert result.replica.outputs.measured_acceptance()["chat"] < 0.7


@pytest.mark.parametrize(
    ("system", "settings", "known"),
    [
        ("slos-serve", {"token_budget": 512}, "reserve"),
        ("slos-serve-no-deferral", {"token_budget": 512}, "reserve"),
        ("vllm", {"prefill": 2}, "chunk_limit"),
        ("distserve", {"silos": {}}, "kv_bytes_per_token"),
    ],
)
def test_a_setting_that_a_system_does_not_have_is_told_with_those_it_has(system, settings, known):
    (key,) = settings
    with pytest.raises(ConfigError, match=f"^{system}: {key} = .*: expected one of the settings .*{known}"):
        SYSTEMS[system].deploy({**SYSTEMS[system].default, **settings})


def test_every_setting_that_a_sweep_tries_is_known():
    for system in SYSTEMS.values():
        for chosen in (system.default, *system.grid):
            assert set(chosen) <= set(system.setting_names())
