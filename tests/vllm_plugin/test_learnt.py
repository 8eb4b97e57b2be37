"""What was learnt outlives a restart of the same engine, and of no other."""

from __future__ import annotations

import json

import pytest

from slos_serve.vllm_plugin.testing import Engine, make_request, write_profile


@pytest.fixture
def serve(build):
    """Serve some requests whose steps take twice what the profile says; the file is written at the end."""

    def _serve(*, slowdown=2.0, steps=True, **slo):
        scheduler = build(slo=slo, speculative_tokens=2)
        learn = scheduler.slo._learn
        scheduler.slo._learn = lambda entry, _, overhead, now: learn(
            entry, (entry.predicted_s or 0.01) * slowdown, overhead, now
        )
        engine = Engine(scheduler)
        if steps:
            for i in range(20):
                scheduler.add_request(make_request(f"r{i}", max_tokens=30, args={"slo_class": "chat"}))
            engine.run()
        else:
            engine.scheduler.add_request(make_request("r", max_tokens=2, args={"slo_class": "chat"}))
            engine.step()
        return scheduler

    return _serve


@pytest.fixture
def file(tmp_path):
    return tmp_path / "profile.learnt.json"


def test_correction_lengths_and_acceptance_are_there_again_after_a_restart(serve, file) -> None:
    before = serve().slo
    for _ in range(30):
        before.drafts.observe("chat", 3, 2)
    before.shutdown()
    assert file.exists()
    after = serve(steps=False).slo
    assert after.learner.correction.factor == pytest.approx(before.learner.correction.factor, rel=0.05)
    assert after.learner.correction.num_steps >= before.learner.correction.num_steps > 20
    assert after.learner.correction.factor > 1.02
    assert after.learner.reference == before.learner.reference  # slowdown SLOs mean the same as ever
    assert after.tracker.lengths.num_observations("chat") == pytest.approx(
        before.tracker.lengths.num_observations("chat")
    )
    assert after.drafts.acceptance["chat"] == pytest.approx(before.drafts.acceptance["chat"], rel=0.05)
    assert after.drafts.acceptance["chat"] < 0.58


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": "other/1"}', '{"schema": "slos-serve-learnt/1", "key": "test"}']
)
def test_a_file_that_cannot_be_read_is_a_warning_and_a_fresh_start(serve, file, text, vllm_log) -> None:
    file.write_text(text)
    slo = serve(steps=False).slo
    assert slo.learner.correction.num_steps <= 1
    assert "learning starts afresh" in vllm_log.text
    assert not slo.faults.counts


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("key",), "another engine"),
        (("correction", "base", "lines", 0, "fixed_s"), 1.0),
        (("correction", "ratios", "decode"), [0.0]),
        (("lengths", "classes", "chat"), [{}]),
        (("acceptance", "chat"), [5, 1]),
    ],
)
def test_nothing_of_another_engines_or_a_damaged_file_is_used(serve, file, path, value, vllm_log) -> None:
    serve().slo.shutdown()
    document = json.loads(file.read_text())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))
    slo = serve(steps=False).slo
    assert "learning starts afresh" in vllm_log.text
    assert slo.learner.correction.num_steps <= 1
    assert slo.tracker.lengths.num_observations("chat") == 0
    assert slo.drafts.to_json() == {}


def test_a_new_profile_makes_the_old_file_worthless_and_takes_its_place(serve, file, tmp_path, perf) -> None:
    serve().slo.shutdown()
    other = write_profile(tmp_path / "other.json", perf, key="other")
    slo = serve(profile=str(other), state=str(file), steps=False).slo
    assert slo.learner.correction.num_steps <= 1
    serve(profile=str(other), state=str(file)).slo.shutdown()
    assert json.loads(file.read_text())["key"] == "other"


def test_nothing_is_kept_where_the_operator_says_so(serve, file) -> None:
    serve(state=False).slo.shutdown()
    assert not file.exists()


def test_a_disk_that_refuses_is_a_warning(serve, tmp_path, vllm_log) -> None:
    serve(state=str(tmp_path / "no" / "such" / "folder.json")).slo.shutdown()
    assert "cannot be kept" in vllm_log.text


def test_the_file_is_replaced_as_a_whole(serve, file, tmp_path) -> None:
    scheduler = serve()
    for _ in range(3):
        scheduler.slo.learnt.save()
    scheduler.slo.shutdown()
    assert [path.name for path in tmp_path.glob("*.part")] == []
    assert json.loads(file.read_text())["schema"] == "slos-serve-learnt/1"
