"""A Ray of our own on a machine that is too busy for the half minute Ray gives its processes."""

import pytest

ray = pytest.importorskip("ray")

from slos_serve.errors import SlosServeError  # noqa: E402
from slos_serve.ray_serve import cluster  # noqa: E402

TOO_LATE = "The current node timed out during startup. This could happen because ..."


@pytest.fixture
def starts(monkeypatch):
    """Let `ray.init` fail as Ray 2.60 does, so many times; returns what it was asked."""
    asked = []

    def fail(times, message):
        def init(**options):
            asked.append(options)
            if len(asked) <= times:
                raise Exception(message)  # noqa: TRY002 -- as Ray does

        monkeypatch.setattr(cluster, "ask_for_token", lambda: None)  # this process's Ray stays as it is
        monkeypatch.setattr(cluster.ray, "init", init)
        monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
        return asked

    return fail


def test_it_is_started_again(starts):
    asked = starts(2, TOO_LATE)
    assert cluster.RayCluster(None, num_cpus=2).is_own
    assert [options["address"] for options in asked] == ["local"] * 3


def test_one_that_never_starts_is_given_up_in_one_line(starts):
    asked = starts(99, TOO_LATE)
    with pytest.raises(SlosServeError, match="Ray did not start, tried 4 times"):
        cluster.RayCluster(None, num_cpus=2)
    assert len(asked) == 4


def test_any_other_failure_is_not_tried_again(starts):
    asked = starts(99, "no space left on device")
    with pytest.raises(Exception, match="no space left"):
        cluster.RayCluster(None, num_cpus=2)
    assert len(asked) == 1
