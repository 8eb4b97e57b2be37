"""A cluster without room is told before anything is deployed on it."""

import pytest

from slos_serve.errors import ConfigError

pytest.importorskip("ray")


@pytest.mark.parametrize(
    ("num_replicas", "bundle", "expected"),
    [
        (4, {"GPU": 1.0}, "at most 3 (each takes 1 GPU, 3 free here)"),
        (2, {"GPU": 2.0}, "at most 1 (each takes 2 GPU, 3 free here)"),
        (1, {"GPU": 4.0}, "a cluster with room for one (each takes 4 GPU, 3 free here)"),
        (1, {"TPU": 1.0}, "a cluster with room for one (each takes 1 TPU, 0 free here)"),
    ],
)
def test_more_replicas_than_a_cluster_has_room_for_are_refused_with_how_many_fit(
    num_replicas, bundle, expected, monkeypatch
):
    from slos_serve.ray_serve import cluster

    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": 8.0, "GPU": 3.0})
    joined = object.__new__(cluster.RayCluster)
    with pytest.raises(ConfigError) as caught:
        joined.check_room(num_replicas, bundle)
    assert (caught.value.key, caught.value.expected) == ("--replicas", expected)


def test_as_many_replicas_as_fit_are_let_through(monkeypatch):
    from slos_serve.ray_serve import cluster

    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"GPU": 3.0})
    object.__new__(cluster.RayCluster).check_room(3, {"GPU": 1.0, "CPU": 0.0})
