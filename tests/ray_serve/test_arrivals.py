from types import SimpleNamespace

import pytest
from parts import START_S, replica_state, stats

from slos_serve.config import SloConfig
from slos_serve.ray_serve.arrivals import Estimator


@pytest.fixture
def estimator():
    return Estimator(SloConfig())


def completion(prompt="word " * 40, **more):
    return SimpleNamespace(prompt=prompt, **more)


def test_token_ids_are_counted_and_text_is_guessed(estimator):
    assert estimator.prompt_tokens(completion([1, 2, 3])) == 3
    assert estimator.prompt_tokens(completion([[1, 2], [3, 4, 5]])) == 5
    assert estimator.prompt_tokens(completion("x" * 400)) == 100
    messages = [
        {"role": "user", "content": "x" * 40},
        {"role": "user", "content": [{"type": "text", "text": "y" * 40}]},
    ]
    assert estimator.prompt_tokens(SimpleNamespace(messages=messages)) == 28


@pytest.mark.parametrize("prompt", [None, "", [], [[]]])
def test_an_empty_prompt_is_one_token(estimator, prompt):
    assert estimator.prompt_tokens(completion(prompt)) == 1


def test_the_guess_of_text_follows_what_the_engine_counted(estimator):
    body = completion("x" * 400)
    for _ in range(200):
        estimator.learn(body, {"class": "chat", "num_prompt_tokens": 200, "num_output_tokens": 5, "outcome": "met"})
    assert estimator.prompt_tokens(body) == pytest.approx(200, rel=0.02)


def test_absolute_promises_become_deadlines_from_the_arrival_at_the_front_door(estimator, fleet):
    asked = {"slo_class": "chat", "slo_ttft_ms": 400, "slo_tpot_ms": 50, "slo_arrival_s": START_S}
    one = estimator.arrival(completion(vllm_xargs=asked), fleet, request_id="r", slo_class="chat")
    assert one.ttft_deadline_s == pytest.approx(START_S + 0.4)
    assert one.tpot_s == pytest.approx(0.05)
    assert one.slo_class == "chat"


def test_slowdowns_are_resolved_with_the_pinned_profile_before_any_replicas_own(fleet, clocks):
    profile = {"perf_model": {"lines": [{"per_token_s": 0.01, "fixed_s": 0.1}]}, "max_num_batched_tokens": 4096}
    fleet.update({"a": stats(clocks.now, replica=replica_state(clocks.now))})
    body = completion([1] * 100, vllm_xargs={"slo_class": "chat", "slo_arrival_s": START_S})
    pinned = Estimator(SloConfig(), profile).arrival(body, fleet, request_id="r")
    assert pinned.ttft_deadline_s == pytest.approx(START_S + 5 * 1.1 + 0.03)
    guessed = Estimator(SloConfig()).arrival(body, fleet, request_id="r")
    assert guessed.ttft_deadline_s == pytest.approx(START_S + 5 * 0.12 + 0.03)


@pytest.mark.parametrize(
    "asked", [{}, {"slo_class": "nobody"}, {"slo_ttft_ms": "soon"}, {"slo_class": "chat"}], ids=str
)
def test_what_cannot_be_resolved_is_routed_as_a_request_without_a_promise(estimator, fleet, asked):
    one = estimator.arrival(completion(vllm_xargs=asked), fleet, request_id="r")
    assert not one.has_slo


def test_output_lengths_are_learnt_by_class_and_bounded_by_what_the_client_allows(estimator, fleet):
    for _ in range(200):
        record = {"class": "chat", "num_prompt_tokens": 10, "num_output_tokens": 20, "outcome": "met"}
        estimator.learn(completion([1] * 10), record)
    free = estimator.arrival(completion([1] * 10), fleet, request_id="r", slo_class="chat")
    assert free.predicted_output_tokens == pytest.approx(20, rel=0.25)
    bound = estimator.arrival(completion([1] * 10, max_tokens=5), fleet, request_id="r", slo_class="chat")
    assert bound.predicted_output_tokens <= 5


def test_a_request_that_failed_teaches_nothing(estimator):
    before = estimator.prompt_tokens(completion("x" * 400))
    estimator.learn(completion("x" * 400), {"num_prompt_tokens": 400, "num_output_tokens": 1, "outcome": "cancelled"})
    assert estimator.prompt_tokens(completion("x" * 400)) == before


def test_the_limit_that_a_benchmark_hides_stands_for_the_true_length(estimator, fleet):
    body = completion([1] * 10, max_tokens=7, vllm_xargs={"hidden_max_tokens": 512})
    one = estimator.arrival(body, fleet, request_id="r", slo_class="chat")
    assert one.predicted_output_tokens > 7


@pytest.mark.parametrize("hidden", ["many", float("inf"), float("nan"), -5, 0, 10**400, [1], {}, None])
def test_a_hidden_limit_that_is_none_is_ignored(estimator, fleet, hidden):
    body = completion([1] * 10, max_tokens=7, vllm_xargs={"hidden_max_tokens": hidden})
    assert estimator.arrival(body, fleet, request_id="r").predicted_output_tokens <= 7
