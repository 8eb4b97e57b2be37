import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import note

from slos_serve.ray_serve.autoscaling import HeadroomPolicy

POLICY = HeadroomPolicy(target_load=0.7, patience_s=60.0)


def wanted(current, loads, refused_per_s=0.0, drain_s=0.0):
    return POLICY.wanted(current, loads, refused_per_s=refused_per_s, drain_s=drain_s)


def test_as_many_replicas_as_keep_the_mean_load_at_its_target():
    assert wanted(2, [0.9, 0.9]) == 3
    assert wanted(2, [0.7, 0.7]) == 2


def test_refused_promises_ask_for_one_more_whatever_the_load():
    assert wanted(2, [0.1, 0.1], refused_per_s=1.0) == 3


def test_replicas_go_one_at_a_time():
    assert wanted(5, [0.0] * 5) == 4


def test_no_replica_goes_while_promised_work_would_outlast_its_draining():
    assert wanted(5, [0.0] * 5, drain_s=61.0) == 5


def test_nothing_changes_before_anything_is_reported():
    assert wanted(3, []) == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 20), st.floats(0, 5), st.floats(0, 100))
def test_the_replicas_that_stay_can_carry_the_load_of_those_that_go(loads, current, refused_per_s, drain_s):
    number = wanted(current, loads, refused_per_s, drain_s)
    assert number >= 1
    if number < current:
        assert sum(loads) <= number * POLICY.target_load + 1e-6


def test_it_reads_what_ray_hands_to_a_policy():
    metrics = {"slo_load": {"a": 0.9, "b": 0.8}, "slo_refused_per_s": {"a": 0.0}, "slo_drain_s": {"a": None}}
    context = SimpleNamespace(target_num_replicas=2, aggregated_metrics=metrics)
    assert POLICY(context) == (3, {})
    assert POLICY(SimpleNamespace(target_num_replicas=2, aggregated_metrics=None)) == (2, {})


@pytest.mark.parametrize("bad", [{"target_load": 0}, {"target_load": 1}, {"refused_per_s": -1}, {"patience_s": 0}])
def test_settings_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(ValueError, match="HeadroomPolicy"):
        HeadroomPolicy(**bad)


@pytest.mark.parametrize(
    ("kind", "num_promised", "counted"), [("verdict", 3, 1), ("finished", 3, 0), ("verdict", 0, 0)]
)
def test_only_what_was_refused_for_want_of_room_asks_for_a_replica(kind, num_promised, counted, monkeypatch):
    pytest.importorskip("ray.serve.llm")
    from slos_serve.ray_serve import server

    async def answer():
        yield note(kind, verdict="best-effort", reason="compute")
        yield "data: a chunk"

    async def read(replica):
        return [item async for item in server.SloServer._counted(replica, answer())]

    monkeypatch.setattr(server, "HUB", SimpleNamespace(snapshot={"num_promised": num_promised}))
    replica = SimpleNamespace(_num_refused=0)
    assert len(asyncio.run(read(replica))) == 2
    assert replica._num_refused == counted
