"""Clock, settings, records, the channel, counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from slos_serve.errors import ConfigError
from slos_serve.records.writer import MAX_BUFFERED, BatchShape, StepRecorder
from slos_serve.vllm_plugin import stats
from slos_serve.vllm_plugin.engine.clock import Clock
from slos_serve.vllm_plugin.report import Ring, Tally
from slos_serve.vllm_plugin.settings import Settings
from slos_serve.vllm_plugin.wire import channel

SHAPE = BatchShape(
    num_tokens=10, num_requests=3, context_tokens=100, draft_steps=0, attention_pairs=32.0, has_prefill=True
)


def test_a_clock_that_steps_back_goes_on_from_where_it_was() -> None:
    times = iter([100.0, 101.0, 50.0, 51.0, 49.0, 60.0])
    clock = Clock(lambda: next(times))
    assert [clock.now() for _ in range(5)] == [101.0, 101.0, 102.0, 102.0, 113.0]
    assert clock.place(60.0) == 113.0  # stamped just now by a process that sees the new time
    assert clock.place(58.0) == 111.0
    assert clock.place(1e9) == 113.0


@pytest.mark.parametrize("seconds", [-3600.0, -5.0, 5.0, 3600.0])
def test_a_system_clock_that_is_set_moves_neither_the_time_nor_what_others_stamp(monkeypatch, seconds) -> None:
    clock, read = Clock(), time.time
    before = clock.now()
    monkeypatch.setattr(time, "time", lambda: read() + seconds)
    assert before <= clock.now() < before + 1.0
    assert clock.take_step_back() == 0.0
    assert clock.place(time.time() - 2.0) == pytest.approx(clock.now() - 2.0, abs=0.1)


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"modus": "enforce"}, "modus"),
        ({"mode": "on"}, "mode"),
        ({"class_modes": {"chat": "on"}}, "class_modes.chat"),
        ({"class_modes": {"nobody": "observe"}}, "class"),
        ({"class_modes": "observe"}, "class_modes"),
        ({"guard_ms": "5"}, "guard_ms"),
        ({"guard_ms": -5}, "guard_ms"),
        ({"planner": "nowhere.Planner"}, "planner"),
        ({"planner": "slos_serve.core.planner.NoSuchPlanner"}, "planner"),
        ({"planner": "slos_serve.core.baselines.VllmPlanner", "planner_options": {"no": 1}}, "planner_options"),
        ({"safety": {"no_such_limit": 1}}, "safety"),
        ({"safety": 5}, "safety"),
        ({"config": {"no_such_key": 1}}, "no_such_key"),
        ({"thinking_end": [1.5, "x"]}, "thinking_end"),
        ([], "slo"),
    ],
)
def test_settings_that_make_no_sense_are_named(document, key) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse(document).make_planner()
    assert caught.value.key == key


def test_each_of_several_engines_has_a_record_of_its_own() -> None:
    records = [Settings.parse({"record": "/tmp/steps.jsonl"}).record_path(index) for index in range(3)]
    assert [path.name for path in records] == ["steps.jsonl", "steps-1.jsonl", "steps-2.jsonl"]
    assert Settings.parse({}).record_path(1) is None


def test_what_was_learnt_is_kept_beside_the_profile_by_engine_or_where_the_operator_says() -> None:
    paths = [
        Settings.parse(document).state_path(index)
        for document, index in (
            ({"profile": "/p/model.json"}, 0),
            ({"profile": "/p/model.json"}, 2),
            ({"profile": "/p/model.json", "state": "/q/state.json"}, 0),
            ({"profile": "/p/model.json", "state": False}, 0),
            ({}, 0),
        )
    ]
    assert [None if path is None else str(path) for path in paths] == [
        "/p/model.learnt.json",
        "/p/model.learnt-2.json",
        "/q/state.json",
        None,
        None,
    ]


def test_the_mode_is_enforce_on_cpus_observe_on_gpus_and_observe_when_nothing_was_said() -> None:
    settings = Settings.parse({})
    assert settings.resolved_modes(given=True, is_cpu=True).engine == "enforce"
    assert settings.resolved_modes(given=True, is_cpu=False).engine == "observe"
    assert settings.resolved_modes(given=False, is_cpu=True).engine == "observe"
    assert Settings.parse({"mode": "enforce"}).resolved_modes(given=True, is_cpu=False).engine == "enforce"


def test_step_records_are_lines_of_json(tmp_path) -> None:
    recorder = StepRecorder(tmp_path / "new" / "steps.jsonl")
    recorder.add(1, 5.0, SHAPE, 0.02, None, 0.018)
    recorder.flush()
    recorder.add(2, 5.1, SHAPE, 0.03, 0.017, None)
    recorder.flush()
    lines = [json.loads(line) for line in (tmp_path / "new" / "steps.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 1, "t": 5.0, "num_tokens": 10, "num_requests": 3, "context_tokens": 100, "draft_steps": 0,
        "attention_pairs": 32.0, "has_prefill": 1, "num_prompt_tokens": 0,
        "seconds": 0.02, "planned_s": None, "predicted_s": 0.018,
    }  # fmt: skip
    assert [line["step"] for line in lines] == [1, 2]


def test_a_recorder_with_a_full_disk_stays_silent_and_bounded(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    recorder = StepRecorder(tmp_path / "file" / "steps.jsonl")
    for step in range(MAX_BUFFERED + 5):
        recorder.add(step, 0.0, SHAPE, 0.02, None, None)
    assert recorder.num_dropped == 5
    recorder.flush()
    recorder.add(1, 0.0, SHAPE, 0.02, None, None)
    recorder.flush()


@pytest.fixture
def where():
    seat = channel.Seat(channel.engine_folder(f"test-{time.time_ns()}", 0))
    yield f"ipc://{seat.folder}/out.sock"
    seat.leave()


def test_messages_cross_the_channel_and_the_socket_file_goes_away(where) -> None:
    publisher = channel.Publisher(where)
    got: list[dict] = []
    listener = stats.Listener(where, got.append)
    deadline = time.monotonic() + 10
    while len(got) < 3 and time.monotonic() < deadline:
        publisher.send({"v": 1, "snapshot": {"drain_s": float("inf")}})
        time.sleep(0.01)
    assert got[0] == {"v": 1, "snapshot": {"drain_s": None}}
    listener.close()
    publisher.close()
    publisher.send({"v": 1})
    assert publisher.num_dropped == 0
    assert not channel.Path(where.removeprefix("ipc://")).exists()


def test_nobody_listening_costs_nothing_and_what_cannot_be_sent_is_counted(where) -> None:
    publisher = channel.Publisher(where)
    for _ in range(5000):
        publisher.send({"v": 1})
    publisher.send({"v": object()})
    assert publisher.num_dropped == 1
    publisher.close()


def test_a_listener_survives_what_it_does_not_understand(where) -> None:
    publisher = channel.Publisher(where)
    got: list[dict] = []

    def feed(message: dict) -> None:
        if message["v"] == 2:
            raise KeyError("verdicts")
        got.append(message)

    listener = stats.Listener(where, feed)
    deadline = time.monotonic() + 10
    while not got and time.monotonic() < deadline:
        publisher.send({"v": 2})
        publisher.send({"v": 1})
        time.sleep(0.01)
    assert got
    assert listener.num_bad
    listener.close()
    publisher.close()


def test_addresses_fit_into_a_socket_path(monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/" + "x" * 100)
    assert len(channel.address("1234567890123456789" * 9, 0, "control").removeprefix("ipc://")) <= 107
    assert channel.address("a", 0) != channel.address("a", 1)


def test_the_stat_logger_is_inert_for_other_schedulers(tmp_path) -> None:
    from slos_serve.vllm_plugin.testing import make_config

    config = make_config(tmp_path)
    assert stats.SloStatLogger(config).listener is None
    config.scheduler_config.scheduler_cls = "somebody.else.Scheduler"
    assert stats.SloStatLogger(config, 0).listener is None
    assert stats.is_ours("slos_serve.vllm_plugin.scheduler.SloScheduler")
    assert not stats.is_ours(None)


def test_one_of_several_api_servers_knows_its_number_and_the_way_into_its_engine(tmp_path, monkeypatch) -> None:
    from slos_serve.http.hub import HUB
    from slos_serve.vllm_plugin.stats import SloStatLogger
    from slos_serve.vllm_plugin.testing import make_config

    config = make_config(tmp_path, slo={"mode": "observe"})
    config.scheduler_config.scheduler_cls = "slos_serve.vllm_plugin.scheduler.SloScheduler"
    config.parallel_config._api_process_count, config.parallel_config._api_process_rank = 3, 2
    monkeypatch.setattr(HUB, "controls", [])
    stats = SloStatLogger(config, 1)
    try:
        assert HUB._client == 2
        with pytest.raises(TimeoutError, match="-1/control"):
            HUB.controls[0]({"mode": "observe"}, timeout_s=0.01)
    finally:
        stats.listener.close()
        HUB.configure()


COMPILED = """
import slos_serve.core as core
from slos_serve.core import perf
from slos_serve.core.planning import admission
from slos_serve.core.planning import batching
from slos_serve.core.planning import draft
from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Limits
from slos_serve.core.warmup import warm_up

limits = Limits(
    max_num_batched_tokens=512, max_num_seqs=16, max_model_len=4096, block_size=16, num_kv_blocks=2000,
    max_draft_length=3,
)
warm_up(SloPlanner(), limits)
found = {f"{m.__name__}.{name}": thing for m in (admission, batching, draft, perf) for name, thing in vars(m).items()}
print(sorted(name for name, thing in found.items() if not getattr(thing, "signatures", True)))
"""


def test_no_loop_of_the_planner_is_left_to_compile_while_requests_wait(tmp_path) -> None:
    # Without a cache: what is found there hides which inner loops it holds.
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_counts_by_class_read_as_text() -> None:
    tally = Tally()
    for outcome, promised in (
        ("met", True),
        ("met", True),
        ("missed", True),
        ("declined", False),
        ("cancelled", False),
    ):
        tally.add("chat", outcome, promised=promised)
    tally.add("best-effort", "none", promised=False)
    text = tally.text(
        {"effective_mode": "enforce", "steps": 12, "plan_s": {"p99": 0.0021}, "model_error": {"mape": 0.05}}
    )
    assert text.splitlines() == [
        "SLO report: mode enforce, 12 steps, step times predicted within 5%, planning p99 2.10 ms",
        "  chat: 1 cancelled, 1 declined, 2 met, 1 missed; attained 50.0%; kept 2 of 3 promises",
        "  best-effort: 1 none",
    ]
    assert not tally.is_news


def test_a_ring_forgets_what_is_old() -> None:
    ring = Ring(4)
    assert ring.quantiles() == {"p50": None, "p99": None}
    for value in (100.0, 1.0, 2.0, 3.0, 4.0):
        ring.add(value)
    assert ring.quantiles()["p50"] == 2.5


def test_acceptance_is_measured_by_class_and_forgotten_in_time() -> None:
    from slos_serve.vllm_plugin.learning.drafting import PRIOR, DraftWatch

    watch = DraftWatch()
    for _ in range(200):
        watch.observe("chat", 4, 5)  # all four accepted
        watch.observe("coding", 4, 1)  # none
        watch.observe("none", 0, 1)  # the drafter had nothing
    known = watch.known(["chat", "coding", "none", "new"])
    assert known["chat"] > 0.97
    assert known["coding"] < 0.07
    assert known["none"] < 0.07
    assert known["new"] == PRIOR
    for _ in range(5000):
        watch.fade()
    assert watch.acceptance["coding"] == pytest.approx(PRIOR, abs=0.01)


def test_the_next_draft_length_is_what_the_longest_class_verifies() -> None:
    from slos_serve.vllm_plugin.learning.drafting import DraftWatch

    watch = DraftWatch()
    watch.note_plan({"chat": 2, "coding": 0})
    assert (watch.next_length, watch.lengths) == (2, {"chat": 2, "coding": 0})
    watch.note_plan({})  # prefills only: the drafter goes on as before
    assert watch.next_length == 2
    watch.note_plan({"chat": 0})
    assert watch.next_length == 0


def test_planning_saves_up_for_bursts_and_is_held_to_its_share() -> None:
    from slos_serve.vllm_plugin.safety.work_limit import LEAST, MOST_S, SHARE, WorkLimit

    limit = WorkLimit()
    burst = limit.value
    assert burst == round(MOST_S / 50e-9)
    limit.spend(burst, MOST_S)
    assert limit.value == LEAST
    for _ in range(100):  # cheap plans: what is earned is kept
        limit.earn(0.02)
        limit.spend(0, 0.0001)
    assert limit.value == pytest.approx(burst, rel=0.01)
    spent = 0.0
    for _ in range(1000):  # plans that take all they may, beside what every plan costs
        limit.earn(0.05)
        seconds = 0.0001 + limit.value * 50e-9
        spent += seconds
        limit.spend(limit.value, seconds)
    assert spent <= MOST_S + 1000 * (SHARE * 0.05 + 0.0001) + 1e-6


def test_the_work_limit_follows_the_price_of_work() -> None:
    from slos_serve.vllm_plugin.safety.work_limit import WorkLimit

    limit = WorkLimit()
    before = limit.value
    for _ in range(100):
        limit.earn(100.0)
        limit.spend(10_000, 0.001)  # twice as dear as thought
    limit.earn(100.0)
    assert limit.value == pytest.approx(before / 2, rel=0.01)


def test_in_a_flood_new_promises_are_searched_for_when_that_is_paid_for_and_now_and_then_in_any_case() -> None:
    from slos_serve.vllm_plugin.safety.work_limit import MOST_S, PATIENCE, WorkLimit

    limit = WorkLimit()
    assert all(limit.affords_new(800) for _ in range(10))  # much is saved
    limit.spend(400_000, MOST_S)
    assert [limit.affords_new(800) for _ in range(2 * PATIENCE + 2)] == 2 * ([False] * PATIENCE + [True])
    assert limit.affords_new(0)
    limit.earn(1.0)
    assert limit.affords_new(800)


def test_what_a_plan_costs_beside_its_work_is_neither_saved_for_nor_a_price_of_work() -> None:
    from slos_serve.vllm_plugin.safety.work_limit import LEAST, WorkLimit

    limit = WorkLimit()
    for _ in range(100):
        limit.spend(0, 0.002)
    for _ in range(100):
        limit.earn(0.02)
        limit.spend(0, 0.002)
    before = limit.value
    limit.spend(10_000, 0.002 + 10_000 * 50e-9)
    assert LEAST < limit.value == pytest.approx(before - 10_000, rel=0.02)
