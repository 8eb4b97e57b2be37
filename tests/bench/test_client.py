from __future__ import annotations

import json

import numpy as np
import pytest

from slos_serve.bench.client import (
    BenchRequest,
    StreamResult,
    TargetError,
    discover_model,
    offer,
    random_prompt,
    request_body,
    take_event,
)
from slos_serve.core.types import Slo


def make(count, *, gap_s=0.02, prompt=50, output=12, **more):
    rng = np.random.default_rng(0)
    return [
        BenchRequest(
            request_id=f"r{i}",
            offset_s=i * gap_s,
            prompt_token_ids=random_prompt(prompt, rng),
            output_tokens=output,
            hidden_max_tokens=256,
            **more,
        )
        for i in range(count)
    ]


async def test_every_request_comes_back_with_its_exact_lengths(engine, serve):
    async with serve(engine) as url:
        results = await offer(url, "fake", make(5))
    assert [result.request_id for result in results] == [f"r{i}" for i in range(5)]
    for result in results:
        assert result.error is None
        assert (result.prompt_tokens, result.num_output_tokens) == (50, 12)
        assert result.counted_by == "usage"
        times = [at for at, _ in result.chunks]
        assert times == sorted(times)
        assert result.sent_s <= times[0] <= times[-1] <= result.finished_s


async def test_requests_leave_at_their_times_whatever_is_still_running(engine, serve):
    async with serve(engine) as url:
        results = await offer(url, "fake", make(6, gap_s=0.03, output=150))
    assert [result.sent_s for result in results] == pytest.approx([0.03 * i for i in range(6)], abs=0.02)
    assert results[5].sent_s < results[0].finished_s
    assert all(result.lag_s < 0.02 for result in results)


async def test_the_true_length_goes_to_the_engine_and_the_class_limit_beside_it(engine, serve):
    async with serve(engine) as url:
        await offer(url, "fake", make(1, slo=Slo(ttft_s=0.4, tpot_s=0.05), slo_class="coding"))
    (body,) = engine.bodies
    assert (body["max_tokens"], body["ignore_eos"]) == (12, True)
    assert body["vllm_xargs"] == {"hidden_max_tokens": 256}
    assert body["slo"] == {"class": "coding", "ttft_ms": 400.0, "tpot_ms": 50.0}


def test_without_a_middleware_the_slo_travels_in_xargs():
    (request,) = make(1, slo=Slo(tpot_s=0.05), slo_class="coding")
    body = request_body(request, "m", "completions", "xargs")
    assert body["vllm_xargs"] == {"slo_class": "coding", "slo_tpot_ms": 50.0, "hidden_max_tokens": 256}
    assert "slo" not in body
    assert "vllm_xargs" not in request_body(request, "m", "completions", "none")


async def test_the_chat_endpoint_works_too(engine, serve):
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1), endpoint="chat")
    assert result.num_output_tokens == 12


async def test_a_server_that_counts_only_at_the_end_is_counted_by_chunks(engine, serve):
    engine.usage = "final"
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1))
    assert result.num_output_tokens == 12
    assert result.counted_by == "chunks"


async def test_verdicts_are_kept(engine, serve):
    engine.slo_of = lambda body: {"verdict": "promised", "class": body["slo"]["class"]}
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1, slo_class="chat"))
    assert result.headers == {"x-slo-verdict": "promised"}
    assert result.slo == {"verdict": "promised", "class": "chat"}


async def test_a_refusal_is_noted_with_its_status(engine, serve):
    engine.status = 429
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1))
    assert result.status == 429
    assert "HTTP 429" in result.error


async def test_an_error_in_the_stream_is_noted(engine, serve):
    engine.break_after = 5
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1))
    assert result.error == "engine died"


async def test_streams_that_never_end_are_cut_after_the_drain(engine, serve):
    async with serve(engine) as url:
        (result,) = await offer(url, "fake", make(1, output=100_000), drain_timeout_s=0.1)
    assert "cut off" in result.error


async def test_an_absent_server_is_a_failed_request_and_a_clear_error():
    url = "http://127.0.0.1:9"
    (result,) = await offer(url, "fake", make(1))
    assert "Connect" in result.error
    with pytest.raises(TargetError, match="is the server up"):
        await discover_model(url)
    with pytest.raises(ValueError, match="expected a URL"):
        await discover_model("localhost:8000")


async def test_the_model_is_discovered(engine, serve):
    async with serve(engine) as url:
        assert await discover_model(url + "/v1/") == "fake"


def test_a_chunk_of_several_tokens_counts_them_all():
    result = StreamResult(request_id="r", sent_s=0.0)
    take_event({"choices": [{"text": ""}], "usage": {"prompt_tokens": 9, "completion_tokens": 0}}, result, 1.0)
    take_event({"choices": [{"text": "a"}], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}, result, 2.0)
    take_event({"choices": [{"text": "bcd"}], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}, result, 3.0)
    take_event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}, result, 3.1)
    assert result.chunks == [(2.0, 1), (3.0, 4)]


def test_results_survive_json():
    result = StreamResult(request_id="r", sent_s=0.5, chunks=[(1.0, 1), (1.5, 3)], slo={"verdict": "promised"})
    again = StreamResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
