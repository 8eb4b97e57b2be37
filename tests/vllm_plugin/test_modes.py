"""Profiles, learning from live steps, promises and what clients are told."""

from __future__ import annotations

import json
import time

import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Plan, ReplicaState, Status, Tier, Verdict
from slos_serve.http.seal import sealed
from slos_serve.vllm_plugin.learning.learner import FIT_STEPS
from slos_serve.vllm_plugin.scheduler import SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler, write_profile

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


class Says:
    """VLLM's batches with a fixed verdict for every pending request."""

    def __init__(self, *, promised: bool, reason: str = "") -> None:
        self.inner = VllmPlanner()
        self.promised = promised
        self.reason = reason

    def plan(self, state):
        rows, ids = state.requests.rows, state.requests.request_ids
        verdicts = tuple(
            Verdict(request_id=ids[i], promised=self.promised, reason=self.reason)
            for i, tier in enumerate(rows["tier"].tolist())
            if tier == Tier.PENDING
        )
        return Plan(batch=self.inner.plan(state).batch, verdicts=verdicts)


class Messages(list):
    """Stands in for the publisher."""

    def send(self, message) -> None:
        self.append(json.loads(json.dumps(message)))

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[dict]:
        return [entry for message in self for entry in message[kind]]


@pytest.fixture
def listen():
    def _listen(scheduler) -> Messages:
        scheduler.slo.outbox.publisher.close()
        scheduler.slo.outbox.publisher = Messages()
        return scheduler.slo.outbox.publisher

    return _listen


def test_without_its_profile_it_observes_and_slowdown_promises_wait_for_it(build, tmp_path, perf) -> None:
    missing = tmp_path / "later.json"
    scheduler = build(Says(promised=True), slo={"profile": str(missing)})
    engine = Engine(scheduler)
    scheduler.add_request(make_request("early", args={"slo_class": "chat"}, max_tokens=4))
    scheduler.add_request(make_request("long", prompt_tokens=900, args={"slo_class": "chat"}, max_tokens=4))
    engine.step()
    assert scheduler.slo.snapshot()["reason"] == "no performance profile yet"
    assert scheduler.slo.snapshot()["profile"] is None
    assert not scheduler.slo.tracker.live["long"].has_slo
    write_profile(missing, perf)
    scheduler.slo.learner.poll()
    engine.step()
    assert scheduler.slo.effective_mode == "enforce"
    assert scheduler.slo.snapshot()["profile"]["key"] == "test"
    live = scheduler.slo.tracker.live["long"]
    wanted = max(0.2, 5 * perf.prefill_seconds(900, 256) + 0.03)
    assert live.slo.ttft_s == pytest.approx(wanted)
    assert live.was_promised
    engine.run()
    assert scheduler.slo.promises.tally.classes["chat"].outcomes == {"met": 1, "none": 1}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "other/1"}', '{"schema": "slos-serve-profile/1", "perf_model": {"lines": []}}']
)
def test_a_corrupt_profile_is_ignored(build, tmp_path, text) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    scheduler = build(slo={"profile": str(bad)})
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_class": "chat"}))
    engine.run()
    assert scheduler.slo.effective_mode == "observe"
    assert not scheduler.slo.faults.counts


def test_a_profile_of_another_engine_is_ignored_until_it_is_replaced(build, tmp_path, perf) -> None:
    path = write_profile(tmp_path / "p.json", perf, key="other engine")
    scheduler = build(slo={"profile": str(path), "profile_key": "this engine"})
    assert not scheduler.slo.learner.has_model
    write_profile(path, perf, key="this engine")
    scheduler.slo.learner.poll()
    assert scheduler.slo.learner.has_model


def test_bare_use_observes_learns_from_live_steps_and_says_so(tmp_path) -> None:
    scheduler = make_scheduler(tmp_path, cls=SloScheduler)
    try:
        engine = Engine(scheduler)
        plain = engine.execute
        engine.execute = lambda output: (time.sleep(0.0005 + 1e-6 * output.total_num_scheduled_tokens), plain(output))[
            1
        ]
        for i in range(60):
            scheduler.add_request(
                make_request(f"r{i}", prompt_tokens=20 + 9 * i, max_tokens=60, args={"slo_class": "chat"})
            )
        engine.run()
        assert scheduler.slo.num_steps > FIT_STEPS
        deadline = time.monotonic() + 60
        while not scheduler.slo.learner.has_model and time.monotonic() < deadline:
            time.sleep(0.1)  # it is fitted on another thread
        scheduler.add_request(make_request("after", args={"slo_class": "chat"}))
        engine.run()
        snapshot = scheduler.slo.snapshot()
        assert (snapshot["mode"], snapshot["effective_mode"]) == ("observe", "observe")
        assert snapshot["profile"]["key"] == "live"
        assert snapshot["profile"]["num_steps"] > 100
        assert sum(snapshot["would_be"].values()) == 1
        assert scheduler.slo.promises.tally.classes["chat"].outcomes["met"] == 1
        assert not scheduler.slo.faults.counts
    finally:
        scheduler.shutdown()


def test_a_promise_and_its_outcome_reach_the_http_edge(build, listen) -> None:
    scheduler = build(Says(promised=True))
    messages = listen(scheduler)
    engine = Engine(scheduler)
    now = scheduler.slo.clock.now()
    args = sealed({"slo_id": "abc", "slo_class": "coding", "slo_tenant": "acme", "slo_arrival_s": now - 0.05})
    scheduler.add_request(make_request("r", args=args, max_tokens=3, arrival_s=now))
    engine.run()
    (verdict,) = messages.of("verdicts")
    assert (verdict["slo_id"], verdict["verdict"], verdict["reason"]) == ("abc", "promised", "")
    assert (verdict["slo_class"], verdict["tenant"]) == ("coding", "acme")
    (finished,) = messages.of("finished")
    assert finished["outcome"] == "met"
    assert finished["promised"] is True
    assert finished["stages"] == {"prefill": "met", "thinking": "", "answer": "met"}
    assert (finished["num_prompt_tokens"], finished["num_output_tokens"]) == (32, 3)
    assert finished["ttft_ms"] > 50
    assert 0 < finished["promise_lead_ms"] < 200
    assert engine.finished["r"].stop_reason is None  # the edge says it better


def test_a_refused_promise_is_declined_even_when_it_was_in_time(build, listen) -> None:
    scheduler = build(Says(promised=False, reason="memory"))
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_class": "coding"}))
    engine.run()
    (verdict,) = messages.of("verdicts")
    assert (verdict["verdict"], verdict["reason"]) == ("best-effort", "memory")
    (finished,) = messages.of("finished")
    assert (finished["outcome"], finished["promised"]) == ("declined", False)
    assert engine.finished["r"].stop_reason == "slo:best-effort:declined"


def test_a_promotion_before_the_first_token_counts_as_a_promise(build, listen) -> None:
    planner = Says(promised=False, reason="compute")
    scheduler = build(planner, max_num_batched_tokens=64)
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", prompt_tokens=200, args={"slo_class": "chat"}))
    engine.step()

    class Promote(Says):
        def plan(self, state):
            plan = super().plan(state)
            return Plan(
                batch=plan.batch,
                verdicts=tuple(Verdict(request_id=i, promised=True) for i in state.requests.request_ids),
            )

    scheduler.slo.planner = Promote(promised=True)
    engine.run()
    assert [v["verdict"] for v in messages.of("verdicts")] == ["best-effort", "promoted"]
    assert messages.of("finished")[0]["outcome"] == "met"


def test_a_promise_that_is_broken_is_missed(build, listen) -> None:
    scheduler = build(Says(promised=True))
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("r", args={"slo_ttft_ms": 1}, arrival_s=scheduler.slo.clock.now() - 1))
    engine.step()
    assert scheduler.slo.tracker.table.rows["missed"].tolist() == [1]
    engine.run()
    (finished,) = messages.of("finished")
    assert (finished["outcome"], finished["promised"]) == ("missed", True)
    assert finished["stages"]["prefill"] == "missed"


def test_requests_without_promises_are_best_effort_at_once_and_get_no_stop_reason(build, listen) -> None:
    scheduler = build(Says(promised=True))
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("plain"))
    scheduler.add_request(make_request("asked", args={"slo_class": "best-effort"}))
    engine.run()
    assert [(v["verdict"], v["reason"]) for v in messages.of("verdicts")] == [("best-effort", "requested")] * 2
    assert {f["outcome"] for f in messages.of("finished")} == {"none"}
    assert engine.finished["plain"].stop_reason is None
    assert engine.finished["asked"].stop_reason == "slo:best-effort:requested"


def test_a_stop_reason_that_vllm_gives_is_left_alone(build) -> None:
    scheduler = build(Says(promised=True))
    engine = Engine(scheduler)
    request = make_request("r", args={"slo_class": "chat"}, max_tokens=50)
    request.sampling_params.stop_token_ids = [7]
    scheduler.add_request(request)
    engine.run()
    assert engine.finished["r"].stop_reason == 7


def test_thinking_ends_at_its_token(build, listen) -> None:
    scheduler = build(Says(promised=True), slo={"thinking_end": [7]})
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.slo.tracker.thinking_end = frozenset({7})
    scheduler.add_request(make_request("r", args={"slo_class": "reasoning"}, max_tokens=5))
    engine.step()
    engine.step()
    rows = scheduler.slo.tracker.table.rows
    assert (rows["is_thinking"][0], rows["num_thinking_tokens"][0], rows["num_output_tokens"][0]) == (0, 1, 1)
    engine.run()
    assert messages.of("finished")[0]["stages"] == {"prefill": "met", "thinking": "met", "answer": "met"}


def test_too_many_broken_promises_step_down_with_an_alert_and_service_goes_on(build) -> None:
    scheduler = build(Says(promised=True), slo={"safety": {"num_promises": 5, "hold_s": 3600}})
    engine = Engine(scheduler)
    for i in range(12):
        scheduler.add_request(
            make_request(f"r{i}", args={"slo_ttft_ms": 1}, arrival_s=scheduler.slo.clock.now() - 1, max_tokens=2)
        )
    engine.run()
    snapshot = scheduler.slo.snapshot()
    assert snapshot["effective_mode"] == "observe"
    assert snapshot["reason"].startswith("promises kept 0.0%")
    assert snapshot["step_downs"] == 1
    scheduler.add_request(make_request("later", args={"slo_class": "chat"}))
    engine.run()
    assert "later" in engine.finished


def test_the_columns_are_what_vllm_knows(build) -> None:
    seen: list[ReplicaState] = []

    class Look(VllmPlanner):
        def plan(self, state):
            for i, name in enumerate(state.requests.request_ids):
                row, request = state.requests.rows[i], scheduler.requests[name]
                assert row["num_computed_tokens"] == request.num_computed_tokens
                assert row["num_output_tokens"] == request.num_output_tokens
                assert row["num_prompt_tokens"] == request.num_prompt_tokens
                assert (row["status"] == Status.RUNNING) == (request in scheduler.running)
                assert row["predicted_output_tokens"] > min(row["num_output_tokens"], row["max_output_tokens"] - 1)
            seen.append(state)
            return super().plan(state)

    scheduler = build(Look(), num_blocks=60)
    engine = Engine(scheduler)
    for i in range(25):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=7 * (i + 1), max_tokens=3 * i + 1))
    engine.run()
    assert len(seen) > 20
    assert not scheduler.slo.faults.counts


def test_a_state_recorded_from_vllm_replays_to_the_same_plan(build) -> None:
    from slos_serve.core.planner import SloPlanner

    pairs: list[tuple[str, Plan]] = []

    class Keep(SloPlanner):
        def plan(self, state):
            plan = super().plan(state)
            pairs.append((json.dumps(state.to_json()), plan))
            return plan

    scheduler = build(Keep(), num_blocks=200)
    engine = Engine(scheduler)
    for i in range(30):
        args = {"slo_class": ("chat", "coding", "best-effort")[i % 3]}
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=20 + 10 * i, max_tokens=10, args=args))
    engine.run()
    assert len(engine.finished) == 30
    assert not scheduler.slo.faults.counts
    assert not scheduler.slo.divergences
    for text, plan in pairs:
        again = SloPlanner().plan(ReplicaState.from_json(text))
        assert again.batch.entries == plan.batch.entries
        assert again.verdicts == plan.verdicts


def test_recorded_steps_can_be_fitted(build, tmp_path) -> None:
    from slos_serve.core.fit import from_records

    scheduler = build(slo={"record": str(tmp_path / "steps.jsonl")})
    engine = Engine(scheduler)
    for i in range(20):
        scheduler.add_request(make_request(f"r{i}", prompt_tokens=20 + 10 * i, max_tokens=10))
    engine.run()
    scheduler.slo.recorder.flush()
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    samples = from_records(record for record in records if "kind" not in record)
    assert sum(s.num_tokens for s in samples) == sum(sum(b.values()) for b in engine.batches)
    prompts = sum(20 + 10 * i for i in range(20))
    assert sum(s.num_tokens for s in samples) == prompts + 20 * 9
    assert all(s.seconds > 0 for s in samples)
    model = PerfModel.from_terms([{"per_pair_s": 1.0}])
    whole = sum((20 + 10 * i) ** 2 / 2 for i in range(20))
    assert sum(s.attention_pairs for s in samples) == pytest.approx(whole)
    assert model.seconds(0, 0, attention_pairs=1) == 1


def test_what_an_idle_engine_could_not_do_is_too_tight_and_not_busy(build, listen) -> None:
    scheduler = build(Says(promised=False, reason="compute"))
    messages = listen(scheduler)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("tight", args={"slo_ttft_ms": 1, "slo_tpot_ms": 50}))
    scheduler.add_request(make_request("busy", args={"slo_ttft_ms": 5000, "slo_tpot_ms": 50}))
    engine.run()
    told = {verdict["request_id"]: verdict for verdict in messages.of("verdicts")}
    assert {name: verdict["reason"] for name, verdict in told.items()} == {"tight": "too-tight", "busy": "compute"}
    assert told["busy"]["asked"] == {"ttft_ms": 5000.0, "tpot_ms": 50.0}
    assert told["busy"]["slack_ms"] is None


def test_what_plans_would_say_is_counted_by_class(build) -> None:
    scheduler = build(Says(promised=True), slo={"mode": "observe"})
    for name, slo_class in (("a", "chat"), ("b", "coding"), ("c", "coding")):
        scheduler.add_request(make_request(name, args={"slo_class": slo_class}))
    Engine(scheduler).run()
    snapshot = scheduler.slo.snapshot()
    assert snapshot["would_be_by_class"] == {"chat": {"promised": 1}, "coding": {"promised": 2}}
    assert snapshot["would_be"] == {"promised": 3}
    assert "coding: 2 met; attained 100.0%; would have promised 2 and not 0" in scheduler.slo.promises.tally.text(
        snapshot
    )
