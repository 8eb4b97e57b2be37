from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from slos_serve.bench.client import TargetError
from slos_serve.bench.plots import plot_fit
from slos_serve.bench.profiling import profile_server
from slos_serve.cache import write_json
from slos_serve.core.fit import fit_perf_model, from_records
from slos_serve.errors import ConfigError
from slos_serve.records.profile import Profile, profile_document, read_records


class Server:
    """Serve a fake engine from a thread of its own, as a real server would be."""

    def __init__(self, engine, serve):
        self.ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.main(engine, serve),))

    async def main(self, engine, serve):
        self.stopped = asyncio.Event()
        async with serve(engine) as self.url:
            self.ready.set()
            await self.stopped.wait()

    def __enter__(self):
        self.thread.start()
        self.ready.wait(10)
        return self.url

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join(10)
        self.loop.close()


def test_a_profiled_server_is_predicted_well(engine, serve, true_model, tmp_path):
    engine.record = tmp_path / "steps.jsonl"
    engine.record.write_text('{"from": "an earlier run"}\n')
    out = tmp_path / "profile.json"
    shares = []
    with Server(engine, serve) as url:
        report = profile_server(
            url, engine.record, out, "fake", key={"model": "fake"}, budget_s=4, on_progress=shares.append
        )
    assert report.r2 > 0.99
    assert report.mape_heldout < 0.02
    assert shares == sorted(shares)
    profile = Profile.load(out)
    assert profile.max_num_batched_tokens == engine.budget
    assert profile.document["key"] == {"model": "fake"}
    for tokens in (30, 200, 900):
        assert profile.reference_s(tokens) == pytest.approx(true_model.prefill_seconds(tokens, 256), rel=0.1)
    assert profile.decode_step_s == pytest.approx(true_model.seconds(1, 1, context_tokens=256), rel=0.1)


def test_the_recorded_shapes_are_well_spread(engine, serve, tmp_path):
    engine.record = tmp_path / "steps.jsonl"
    with Server(engine, serve) as url:
        profile_server(url, engine.record, tmp_path / "p.json", "fake", key="k", budget_s=3)
    records = read_records(engine.record)
    assert max(r["num_requests"] for r in records if not r["has_prefill"]) == 32
    assert {16, 32, 64, 128, 256} <= {r["num_tokens"] for r in records if r["num_requests"] == 1}
    assert any(r["has_prefill"] and r["num_requests"] > 8 for r in records)
    assert max(r["context_tokens"] for r in records) > 1500


def test_a_server_that_records_nothing_is_told(engine, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("slos_serve.bench.profiling.FLUSH_TIMEOUT_S", 0.3)
    with Server(engine, serve) as url, pytest.raises(TargetError, match="started with --record"):
        profile_server(url, tmp_path / "steps.jsonl", tmp_path / "p.json", "fake", key="k", budget_s=0.1)


def test_a_failing_server_is_told(engine, serve, tmp_path):
    engine.status = 500
    with Server(engine, serve) as url, pytest.raises(TargetError, match="HTTP 500"):
        profile_server(url, tmp_path / "steps.jsonl", tmp_path / "p.json", "fake", key="k", budget_s=0.1)


def sample_records(true_model, count=300):
    rng = np.random.default_rng(0)
    records = []
    for _ in range(count):
        decodes, chunk = int(rng.integers(0, 16)), int(rng.choice([0, 16, 64, 128, 256]))
        if decodes + chunk == 0:
            continue
        seconds = true_model.seconds(
            decodes + chunk, decodes + bool(chunk), context_tokens=decodes * 100, attention_pairs=chunk * chunk / 2
        )
        records.append(
            {
                "num_tokens": decodes + chunk,
                "num_requests": decodes + bool(chunk),
                "context_tokens": decodes * 100,
                "attention_pairs": chunk * chunk / 2,
                "has_prefill": int(chunk > 0),
                "seconds": seconds * float(np.exp(rng.normal(0, 0.02))),
            }
        )
    return records


@pytest.fixture
def profile(true_model):
    report = fit_perf_model(from_records(sample_records(true_model)), rng=np.random.default_rng(0))
    return Profile.from_json(profile_document(report, key="k", max_num_batched_tokens=256), where="here")


def test_the_largest_chunk_ends_in_time_and_one_more_token_would_not(profile):
    tokens = profile.largest_chunk_tokens(0.01, num_decodes=4)
    model = profile.perf_model

    def seconds(n):
        return model.seconds(n + 4, 5, context_tokens=1024, attention_pairs=n * n / 2)

    assert seconds(tokens) <= 0.01 < seconds(tokens + 1)
    assert profile.largest_chunk_tokens(1e-9) == 0


def test_a_profile_file_that_is_none_is_refused_by_name(tmp_path):
    bad = tmp_path / "bad.json"
    for text, key in (("{}", "schema"), ("[1]", "schema"), ("nonsense", "--profile")):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=key):
            Profile.load(bad)
    bad.write_text(json.dumps({"schema": "slos-serve-profile/1", "perf_model": {"lines": []}}))
    with pytest.raises(ConfigError, match="perf_model"):
        Profile.load(bad)
    with pytest.raises(ConfigError, match="absent"):
        Profile.load(tmp_path / "absent.json")


def test_files_are_replaced_at_once(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json({"a": 1}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_records_are_read_up_to_the_line_still_being_written(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"num_tokens": 1, "seconds": 0.1}\n{"num_tok')
    assert read_records(path) == [{"num_tokens": 1, "seconds": 0.1}]
    path.write_text('{"num_tokens": 1}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl:1"):
        read_records(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path / "absent")


def test_the_fit_is_drawn(profile, true_model, tmp_path):
    plot_fit(profile.perf_model, from_records(sample_records(true_model)), tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
