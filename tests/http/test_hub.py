"""What the engine publishes arrives once, is counted once, and never grows without bound."""

import asyncio
import math
import threading
import time

import pytest

from slos_serve.config import SloConfig
from slos_serve.http import replies
from slos_serve.http.hub import Hub
from slos_serve.http.metrics import SloMetrics

SNAPSHOT = {
    "mode": "enforce",
    "effective_mode": "enforce",
    "num_promised": 3,
    "num_best_effort": 4,
    "num_waiting": 4,
    "headroom_tokens_per_s": 1000.0,
    "planner_faults": {"error": 1},
    "best_effort_preemptions": 5,
    "margin_coverage": 0.96,
    "profile": None,
    "drain_s": 2.4,
}


def sample(registry, name, **labels):
    return registry.get_sample_value(name, labels)


async def test_a_verdict_from_another_thread_wakes_the_request(hub, say):
    threading.Timer(0.02, lambda: hub.feed({"verdicts": [say.verdict("a")]})).start()
    record = await hub.wait_verdict("a", 5.0)
    assert record["verdict"] == "promised"
    assert hub.num_waiting == 0


async def test_every_waiter_is_woken(hub, say):
    waits = [asyncio.create_task(hub.wait_verdict("a", 5)) for _ in range(3)]
    await asyncio.sleep(0)
    waits[0].cancel()
    await asyncio.sleep(0)
    hub.feed({"verdicts": [say.verdict("a")]})
    assert [(await wait)["verdict"] for wait in waits[1:]] == ["promised"] * 2
    assert hub.num_waiting == 0


async def test_a_verdict_that_came_first_is_returned_at_once(hub, say):
    hub.feed({"verdicts": [say.verdict("a", "best-effort", "memory")]})
    assert (await hub.wait_verdict("a", 0))["reason"] == "memory"


async def test_waiting_ends_with_the_timeout_or_the_client_and_leaves_nothing_behind(hub):
    assert await hub.wait_verdict("a", 0.01) is None
    assert await hub.wait_verdict("a", -1) is None
    task = asyncio.create_task(hub.wait_verdict("a", 5))
    await asyncio.sleep(0.01)
    assert hub.num_waiting == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert hub.num_waiting == 0


def test_a_verdict_for_a_closed_event_loop_is_kept_anyway(hub, say):
    async def leave():
        hub._waiters["a"] = [asyncio.get_running_loop().create_future()]

    asyncio.run(leave())
    hub.feed({"verdicts": [say.verdict("a")]})
    assert hub.find("a")["verdict"] == "promised"


@pytest.mark.parametrize(
    ("engine_id", "client_id"),
    [
        ("chatcmpl-abc-0a1b2c3d", "chatcmpl-abc"),
        ("cmpl-abc-0-0a1b2c3d", "cmpl-abc"),
        ("cmpl-a-b-12-0a1b2c3d", "cmpl-a-b"),
        ("1_chatcmpl-a-b-0a1b2c3d", "chatcmpl-a-b"),
    ],
)
def test_a_request_is_found_by_every_id_it_is_known_by(hub, say, engine_id, client_id):
    hub.open("a", slo_class="chat", tenant="t", arrival_s=1.0)
    hub.feed({"verdicts": [say.verdict("a", request_id=engine_id, stamped_s=0.9)]})
    for name in ("a", engine_id, client_id):
        record = hub.find(name)
        assert (record["id"], record["request_id"], record["arrival_s"]) == ("a", engine_id, 1.0)
        assert not [key for key in record if key.startswith("_")]


def test_a_request_of_a_bare_server_is_known_by_the_engines_id(hub, say):
    hub.feed({"verdicts": [say.verdict(None, request_id="cmpl-x-0-11111111")]})
    assert hub.find("cmpl-x-0-11111111")["verdict"] == "promised"
    assert hub.find("cmpl-x")["id"] == "cmpl-x-0-11111111"


def test_a_request_that_came_through_another_server_has_its_arrival_and_is_found_by_the_clients_id(hub, say):
    hub.feed({"verdicts": [say.verdict("a", request_id="chatcmpl-mine-0a1b2c3d", stamped_s=7.0)]})
    hub.feed({"finished": [say.finished("b", request_id="cmpl-other-0-0a1b2c3d", stamped_s=8.0)]})
    assert (hub.find("mine")["id"], hub.find("mine")["arrival_s"]) == ("a", 7.0)
    assert (hub.find("other")["id"], hub.find("other")["arrival_s"]) == ("b", 8.0)


def test_several_engine_requests_of_one_http_request_are_as_good_as_their_worst(hub, say):
    hub.feed({"verdicts": [say.verdict("a", "best-effort", "compute", request_id="0_x-11111111")]})
    hub.feed({"verdicts": [say.verdict("a", request_id="1_x-11111111")]})
    assert hub.find("a")["verdict"] == "best-effort"
    hub.feed({"verdicts": [say.verdict("a", "promoted", request_id="0_x-11111111")]})
    assert hub.find("a")["verdict"] in {"promoted", "promised"}


def test_only_the_latest_requests_are_kept(registry, say):
    hub = Hub(SloMetrics(registry), max_records=3)
    for i in range(10):
        hub.feed({"verdicts": [say.verdict(str(i), request_id=f"chatcmpl-{i}-11111111")]})
    assert hub.find("6") is None
    assert hub.find("chatcmpl-6") is None
    assert hub.find("chatcmpl-9")["id"] == "9"
    assert len(hub._records) == 3
    assert len(hub._records._aliases) == 6


def test_outcomes_promises_and_stages_are_counted(hub, say, registry):
    ends = [
        say.finished("a", least_slack_ms={"prefill": 120.0, "answer": -3.0}),
        say.finished("b", "missed", stages={"prefill": "missed", "thinking": "met", "answer": "missed"}),
        say.finished("c", "declined", promised=False),
        say.finished("d", "failed"),
        say.finished("e", "cancelled"),
        say.finished("f", "none", promised=False, stages={}, slo_class="best-effort"),
    ]
    hub.feed({"finished": ends, "verdicts": [say.verdict("a"), say.verdict("c", "best-effort", "compute")]})
    total = "slos_serve_requests_total"
    for outcome in ("met", "missed", "declined", "failed", "cancelled"):
        assert sample(registry, total, tenant="acme", outcome=outcome, **{"class": "chat"}) == 1
    assert sample(registry, total, tenant="acme", outcome="none", **{"class": "best-effort"}) == 1
    assert sample(registry, "slos_serve_promises_total", result="kept", **{"class": "chat"}) == 1
    assert sample(registry, "slos_serve_promises_total", result="broken", **{"class": "chat"}) == 2
    stages = {
        (stage, outcome): sample(
            registry, "slos_serve_stage_slo_total", stage=stage, outcome=outcome, **{"class": "chat"}
        )
        for stage in ("prefill", "thinking", "answer")
        for outcome in ("met", "missed")
    }
    assert stages == {
        ("prefill", "met"): 4,
        ("prefill", "missed"): 1,
        ("thinking", "met"): 1,
        ("thinking", "missed"): None,
        ("answer", "met"): 4,
        ("answer", "missed"): 1,
    }
    verdicts = "slos_serve_verdicts_total"
    assert sample(registry, verdicts, verdict="promised", reason="", **{"class": "chat"}) == 1
    assert sample(registry, verdicts, verdict="best-effort", reason="compute", **{"class": "chat"}) == 1
    slack = "slos_serve_slack_seconds"
    chat = {"class": "chat", "stage": "prefill"}  # a TTFT of at least 200 ms
    assert [sample(registry, f"{slack}_bucket", **chat, le=le) for le in ("0.1", "0.2")] == [0, 1]
    chat = {"class": "chat", "stage": "answer"}  # a TPOT of 100 ms
    assert [sample(registry, f"{slack}_bucket", **chat, le=le) for le in ("-0.01", "0.0")] == [0, 1]
    assert sample(registry, f"{slack}_count", **chat) == 1
    assert hub.find("a")["outcome"] == "met"
    assert hub.find("f") is None


def test_a_rejected_request_is_counted_once_and_not_as_the_cancelled_one_the_engine_saw(hub, say, registry):
    hub.reject("a", slo_class="chat", tenant="acme", reason="compute")
    hub.feed({"finished": [say.finished("a", "cancelled", promised=False)]})
    total = "slos_serve_requests_total"
    assert sample(registry, total, tenant="acme", outcome="rejected", **{"class": "chat"}) == 1
    assert sample(registry, total, tenant="acme", outcome="cancelled", **{"class": "chat"}) is None
    assert hub.find("a")["outcome"] == "rejected"


def test_labels_a_client_can_choose_are_bounded(hub, say, registry):
    for i in range(150):
        hub.feed({"finished": [say.finished(str(i), tenant=f"t{i}", slo_class=f"class{i}")]})
    labels = [s.labels for m in registry.collect() for s in m.samples if s.name == "slos_serve_requests_total"]
    assert {item["class"] for item in labels} == {"other"}
    assert len({item["tenant"] for item in labels}) == 101
    assert sample(registry, "slos_serve_requests_total", tenant="other", outcome="met", **{"class": "other"}) == 50


def test_snapshots_move_gauges_and_cumulative_counts_become_increments(hub, registry):
    hub.feed({"snapshot": SNAPSHOT})
    hub.feed({"snapshot": {**SNAPSHOT, "best_effort_preemptions": 7, "planner_faults": {"error": 2, "slow": 1}}})
    hub.feed({"snapshot": {**SNAPSHOT, "best_effort_preemptions": 1, "draft_lengths": {"chat": 3}}})  # restarted
    assert sample(registry, "slos_serve_best_effort_preemptions_total") == 8
    assert sample(registry, "slos_serve_planner_faults_total", kind="error") == 3
    assert sample(registry, "slos_serve_planner_faults_total", kind="slow") == 1
    assert sample(registry, "slos_serve_mode") == 2
    assert sample(registry, "slos_serve_promised_requests") == 3
    assert sample(registry, "slos_serve_best_effort_requests") == 4
    assert sample(registry, "slos_serve_prefill_headroom_tokens_per_second") == 1000
    assert sample(registry, "slos_serve_margin_coverage") == 0.96
    assert sample(registry, "slos_serve_draft_length", **{"class": "chat"}) == 3


def test_an_emulated_device_is_told_to_everybody(hub, registry):
    hub.feed({"snapshot": SNAPSHOT})
    assert sample(registry, "slos_serve_emulated_device") == 0
    assert "device" not in replies.status(hub)
    hub.feed({"snapshot": {**SNAPSHOT, "device": {"emulated": "h100-8b-derived"}}})
    assert sample(registry, "slos_serve_emulated_device") == 1
    assert replies.status(hub, whole=False)["device"] == {"emulated": "h100-8b-derived"}


def test_samples_of_the_planner_and_the_steps_fill_histograms(hub, registry):
    hub.feed({"plan_s": [0.001, 0.002], "steps": [[0.016, 0.02, 0.024, 5, 0, 0, 5]]})
    assert sample(registry, "slos_serve_plan_seconds_count") == 2
    assert sample(registry, "slos_serve_step_error_seconds_sum") == pytest.approx(0.004)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        "text",
        {},
        {"verdicts": 5},
        {"verdicts": [None, 5, {}, {"slo_id": "a"}]},
        {"verdicts": [{"slo_id": "a", "request_id": "b", "slo_class": ["x"], "verdict": "promised"}]},
        {"finished": [{"slo_id": "a"}]},
        {"snapshot": 5},
        {"snapshot": {"num_promised": "many"}},
        {"snapshot": {"planner_faults": [1]}},
        {"plan_s": ["x"]},
    ],
)
def test_a_malformed_message_costs_nothing_but_itself(hub, say, message):
    hub.feed(message)
    hub.feed({"verdicts": [say.verdict("good")]})
    assert hub.find("good")["verdict"] == "promised"


def test_good_items_beside_a_malformed_one_are_taken(hub, say):
    hub.feed({"verdicts": [{}, say.verdict("a")]})
    assert hub.find("a")
    assert hub.num_malformed == 1


@pytest.mark.parametrize(
    ("drain_s", "seconds"), [(None, 1), (0, 1), (0.2, 1), (2.4, 3), (29.5, 30), (400, 30), (math.inf, 30)]
)
def test_retry_after_is_whole_seconds_between_one_and_thirty(hub, drain_s, seconds):
    hub.feed({"snapshot": {"drain_s": drain_s}})
    assert hub.retry_after_s == seconds


def test_a_refusal_needs_a_fresh_snapshot_of_an_enforcing_engine(hub):
    hub.configure(slo={"config": SloConfig(max_best_effort_queue=4).to_json()})
    full = {**SNAPSHOT, "headroom_tokens_per_s": 0.0}

    def refusals():
        return (
            hub.refusal(best_effort=True, rejects=False),
            hub.refusal(best_effort=False, rejects=True),
            hub.refusal(best_effort=False, rejects=False),
        )

    assert refusals() == (None, None, None)
    hub.feed({"snapshot": full})
    assert refusals() == ("queue-full", "compute", None)
    hub.feed({"snapshot": {**full, "effective_mode": "observe"}})
    assert refusals() == (None, None, None)
    hub.feed({"snapshot": {**SNAPSHOT, "num_waiting": 3}})
    assert refusals() == (None, None, None)
    hub.feed({"snapshot": {**full, "steps": 7}})
    assert refusals() == ("queue-full", "compute", None)
    hub._snapshots._worked_s -= 60
    hub.feed({"snapshot": {**full, "steps": 7}})  # a sign of life without a step: the engine is idle
    assert refusals() == (None, None, None)


def test_profiling_ends_when_the_engine_has_the_profile(hub, tmp_path):
    assert not hub.is_profiling
    hub.configure(slo={"profile": str(tmp_path / "p.json"), "mode": "enforce"}, model="m")
    assert hub.is_profiling
    (tmp_path / "p.json").write_text("{}")
    assert not hub.is_profiling  # nothing heard yet, but the file is there to be loaded
    hub.feed({"snapshot": SNAPSHOT})
    assert hub.is_profiling  # it was not taken up
    hub.feed({"snapshot": {**SNAPSHOT, "profile": {"r2": 0.99}}})
    assert not hub.is_profiling


def test_many_threads_may_feed_while_requests_wait(hub, say):
    async def main():
        def feed(part):
            for i in range(part, 200, 4):
                hub.feed({"verdicts": [say.verdict(f"r{i}")], "finished": [say.finished(f"r{i}")]})

        waits = [asyncio.create_task(hub.wait_verdict(f"r{i}", 10)) for i in range(200)]
        await asyncio.sleep(0)
        threads = [threading.Thread(target=feed, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        records = await asyncio.gather(*waits)
        for thread in threads:
            thread.join()
        return records

    started = time.monotonic()
    assert [record["verdict"] for record in asyncio.run(main())] == ["promised"] * 200
    assert time.monotonic() - started < 10
    assert hub.num_waiting == 0
