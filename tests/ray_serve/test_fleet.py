import pytest
from parts import arrival, replica_state, stats

from slos_serve.core.routing.routers import make_router
from slos_serve.core.routing.snapshots import PrefillRow
from slos_serve.ray_serve.fleet import fleet_of
from slos_serve.ray_serve.hops import Hop


def hop(key="h", **more):
    return Hop(key=key, arrival=arrival(**more))


def two(fleet, clocks, **more):
    fleet.update({"a": stats(clocks.now, **more), "b": stats(clocks.now)})


def test_a_replica_that_reports_is_usable_and_ranked_by_the_policy(fleet, clocks):
    fleet.use(make_router("round-robin"))
    two(fleet, clocks)
    assert [fleet.choose(hop(str(i)), ["a", "b"])[0] for i in range(3)] == ["a", "b", "a"]
    assert fleet.num_usable == 2


def test_every_candidate_is_ranked_so_that_a_full_replica_can_be_skipped(fleet, clocks):
    fleet.use(make_router("power-of-two", rng=__import__("numpy").random.default_rng(0)))
    fleet.update({name: stats(clocks.now) for name in "abcd"})
    assert sorted(fleet.choose(hop(), list("abcd"))) == list("abcd")


def test_a_replica_whose_engine_is_silent_is_avoided_and_known_to_be_silent(fleet, clocks):
    fleet.use(make_router("least-load"))
    two(fleet, clocks, silent_s=30.0)
    assert fleet.is_silent("a")
    assert not fleet.is_silent("b")
    assert fleet.choose(hop(), ["a", "b"]) == ["b"]


def test_a_replica_that_makes_no_steps_although_it_has_requests_is_silent(fleet, clocks):
    two(fleet, clocks, stalled_s=100.0)
    assert fleet.is_silent("a")


@pytest.mark.parametrize("kind", ["new", "all"])
def test_newcomers_go_past_a_replica_in_pause_and_what_runs_there_stays(fleet, clocks, kind):
    fleet.use(make_router("least-load"))
    two(fleet, clocks, paused=kind)
    assert fleet.choose(hop(), ["a", "b"])[0] == "b"
    assert fleet.num_usable == 1
    assert not fleet.is_silent("a")
    two(fleet, clocks, paused="")
    clocks.now += 1
    two(fleet, clocks, paused="")
    assert fleet.num_usable == 2


def test_where_all_replicas_are_paused_one_is_asked_all_the_same(fleet, clocks):
    fleet.use(make_router("least-load"))
    fleet.update({name: stats(clocks.now, paused="all") for name in "ab"})
    assert sorted(fleet.choose(hop(), ["a", "b"])) == ["a", "b"]


def test_a_replica_whose_reports_stop_while_others_go_on_is_silent(fleet, clocks):
    two(fleet, clocks)
    old = stats(clocks.now)
    clocks.now += 10.0
    fleet.update({"a": old, "b": stats(clocks.now)})
    assert fleet.is_silent("a")
    assert not fleet.is_silent("b")


def test_nobody_is_given_up_when_nothing_is_heard_of_anybody(fleet, clocks):
    two(fleet, clocks)
    clocks.now += 100.0
    assert not fleet.is_silent("a")
    assert fleet.num_usable == 2


def test_a_replica_that_never_said_how_its_engine_does_is_left_to_rays_health_checks(fleet, clocks):
    fleet.update({"a": {}, "b": stats(clocks.now)})
    clocks.now += 100.0
    fleet.update({"a": {}, "b": stats(clocks.now)})
    assert not fleet.is_silent("a")


def test_a_draining_replica_is_not_listed_any_more_and_works_on(fleet, clocks):
    two(fleet, clocks)
    fleet.update({"b": stats(clocks.now + 1)})
    assert not fleet.is_silent("a")
    assert fleet.num_usable == 1


def test_a_silent_replica_that_is_taken_off_the_list_stays_silent(fleet, clocks):
    two(fleet, clocks, silent_s=30.0)
    fleet.update({"b": stats(clocks.now + 1)})
    assert fleet.is_silent("a")


def test_a_replica_that_lost_a_request_is_asked_last_for_a_while(fleet, clocks):
    fleet.use(make_router("least-load"))
    two(fleet, clocks)
    fleet.lost("a")
    assert fleet.choose(hop("1"), ["a", "b"]) == ["b"]
    clocks.now += 11.0
    fleet.update({"a": stats(clocks.now), "b": stats(clocks.now)})
    assert fleet.num_usable == 2


def test_with_no_usable_replica_left_any_candidate_is_better_than_none(fleet, clocks):
    fleet.use(make_router("slo"))
    two(fleet, clocks)
    fleet.lost("a")
    fleet.lost("b")
    assert sorted(fleet.choose(hop(), ["a", "b"])) == ["a", "b"]


def test_replicas_with_another_model_or_other_classes_come_in_only_where_there_is_no_other(fleet, clocks):
    fleet.use(make_router("least-load"))
    fleet.digest = "d"
    two(fleet, clocks, digest="other")
    assert fleet.choose(hop("1"), ["a", "b"]) == ["b"]
    assert fleet.choose(hop("2"), ["a"]) == ["a"]
    assert [line["same_config"] for line in fleet.status()] == [False, True]


@pytest.mark.parametrize("broken", [{"version": 99}, {"version": 1, "prefills": "no"}, "text", [1]])
def test_a_snapshot_of_another_version_leaves_its_replica_ranked_by_what_was_sent_there(fleet, clocks, broken):
    fleet.use(make_router("slo"))
    document = {**replica_state(clocks.now), **broken} if isinstance(broken, dict) else broken
    fleet.update({"a": stats(clocks.now, replica=document), "b": stats(clocks.now, replica=replica_state(clocks.now))})
    assert sorted(fleet.choose(hop(ttft_deadline_s=clocks.now + 5, tpot_s=0.1), ["a", "b"])) == ["a", "b"]
    assert [line["plans"] for line in fleet.status()] == [False, True]


def test_a_report_of_another_version_leaves_its_replica_usable(fleet, clocks):
    fleet.use(make_router("slo"))
    fleet.update({"a": {"slos_serve": {"version": 0}}, "b": {"slos_serve": "text"}, "c": {}})
    assert sorted(fleet.choose(hop(), ["a", "b", "c"])) == ["a", "b", "c"]


def test_where_a_request_went_is_known_until_it_ends(fleet, clocks):
    fleet.use(make_router("least-load"))
    two(fleet, clocks)
    first = fleet.choose(hop("k"), ["a", "b"])[0]
    assert fleet.where("k") == first
    fleet.routed(hop("k"), "b")
    assert fleet.where("k") == "b"
    fleet.ended("r", "k")
    assert fleet.where("k") is None


def test_a_request_that_ray_sent_elsewhere_counts_where_it_went(fleet, clocks):
    policy = make_router("least-load")
    fleet.use(policy)
    two(fleet, clocks)
    first, other = fleet.choose(hop("k"), ["a", "b"])
    fleet.routed(hop("k"), other)
    assert (policy.num_requests(first, clocks.now), policy.num_requests(other, clocks.now)) == (0, 1)


def test_a_burst_between_two_reports_does_not_all_go_to_one_replica(fleet, clocks):
    fleet.use(make_router("slo"))
    state = replica_state(clocks.now)
    fleet.update({"a": stats(clocks.now, replica=state), "b": stats(clocks.now, replica=state)})
    deadline = {"ttft_deadline_s": clocks.now + 1.0, "tpot_s": 0.1}
    sent = [fleet.choose(hop(str(i), request_id=str(i), **deadline), ["a", "b"])[0] for i in range(6)]
    assert {sent.count("a"), sent.count("b")} == {3}


def test_a_policy_that_comes_later_knows_what_was_reported_before(fleet, clocks):
    fleet.update(
        {
            "a": stats(clocks.now, replica=replica_state(clocks.now, num_running=9)),
            "b": stats(clocks.now, replica=replica_state(clocks.now)),
        }
    )
    fleet.use(make_router("least-load"))
    assert fleet.choose(hop(), ["a", "b"])[0] == "b"


def test_it_is_empty_only_once_it_is_known_that_there_is_no_replica(fleet):
    assert not fleet.is_empty
    fleet.update({})
    assert fleet.is_empty


def test_a_fleet_that_only_rays_own_router_serves_is_unwatched(fleet, clocks):
    assert fleet.is_unwatched
    fleet.update({"a": stats(clocks.now)})
    assert not fleet.is_unwatched


def test_router_and_ingress_of_one_process_meet_in_one_fleet():
    assert fleet_of("app", "model") is fleet_of("app", "model")
    assert fleet_of("app", "model") is not fleet_of("app", "other")


def test_a_request_is_better_elsewhere_where_a_promise_is_seen_and_it_has_not_begun(fleet, clocks):
    def waits(name, tokens, context=0.0):
        return PrefillRow(name, tokens, context, clocks.now + 2.0, 0.5, 10.0, 0.0, 10.0, 0.0, promised=True)

    fleet.use(make_router("slo"))
    full, empty = replica_state(clocks.now, prefills=(waits("x", 1900.0),)), replica_state(clocks.now)
    fleet.update({"a": stats(clocks.now, replica=full), "b": stats(clocks.now, replica=empty)})
    asks = hop(ttft_deadline_s=clocks.now + 1.0, tpot_s=0.5)
    assert fleet.is_better_elsewhere(asks, "a")
    assert not fleet.is_better_elsewhere(asks, "b")
    assert not fleet.is_better_elsewhere(hop(ttft_deadline_s=clocks.now - 1.0, tpot_s=0.5), "a")
    begun = replica_state(clocks.now, prefills=(waits("x", 1900.0), waits("r", 50.0, 50.0)))
    fleet.update({"a": stats(clocks.now + 1, replica=begun), "b": stats(clocks.now, replica=empty)})
    assert not fleet.is_better_elsewhere(asks, "a")
