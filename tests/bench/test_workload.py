from __future__ import annotations

import numpy as np
import pytest

from slos_serve.bench.scaled import LENGTHS, MIX, Scaled, fitted
from slos_serve.bench.workload import (
    build_requests,
    class_limits,
    parse_goodput,
    synthetic_trace,
)
from slos_serve.config import default_classes, load_slo_config
from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Slo
from slos_serve.records.profile import Profile
from slos_serve.traces.offered import parse_mix, with_classes
from slos_serve.traces.trace import Trace

TRACE = Trace.build(
    arrived_at_s=[0.0, 1.0, 2.0],
    prompt_tokens=[40, 60, 0],
    output_tokens=[5, 9, 3],
    session_id=["s", "s", ""],
    slo_class=["chat", "", "coding"],
)
CPU = PerfModel.from_terms(
    [{"per_token_s": 9e-4, "per_request_s": 5e-4, "per_context_token_s": 3e-6, "fixed_s": 18e-3}]
)


def rng():
    return np.random.default_rng(0)


def test_a_mix_is_shares_that_add_up_to_one():
    assert parse_mix("chat=1,coding=3") == {"chat": 0.25, "coding": 0.75}


@pytest.mark.parametrize("text", ["", "chat", "chat=0", "chat=-1", "chat=x", "chat=1,chat=2", "=1"])
def test_a_mix_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="expected CLASS=SHARE"):
        parse_mix(text)


def test_goodput_speaks_milliseconds():
    assert parse_goodput("ttft:400,tpot:50") == Slo(ttft_s=0.4, tpot_s=0.05)
    assert parse_goodput("e2el:5000") == Slo(e2e_s=5.0)
    with pytest.raises(ValueError, match="expected ttft:MS"):
        parse_goodput("latency:3")


def test_classes_fill_only_what_the_trace_left_open():
    assert with_classes(TRACE, {"tool": 1.0}, rng()).slo_class.tolist() == ["chat", "tool", "coding"]


def test_requests_carry_their_promises_and_exact_lengths():
    trace = with_classes(TRACE, {"coding": 1.0}, rng())
    requests = build_requests(trace, config=load_slo_config(), reference=lambda n: n / 1000, rng=rng())
    assert [len(r.prompt_token_ids) for r in requests] == [40, 60, 1]
    assert [r.output_tokens for r in requests] == [5, 9, 3]
    assert [r.slo.tpot_s for r in requests] == [0.1, 0.05, 0.05]
    assert requests[1].slo.ttft_s == pytest.approx(5 * 0.06 + 0.03)


def test_turns_of_a_session_share_their_prompt():
    trace = with_classes(TRACE, {"coding": 1.0}, rng())
    first, second, other = build_requests(trace, config=load_slo_config(), reference=lambda _: 0.1, rng=rng())
    assert second.prompt_token_ids[:40] == first.prompt_token_ids
    assert other.prompt_token_ids != first.prompt_token_ids[:1]


def test_the_limit_a_client_would_set_hides_the_true_length():
    trace = with_classes(TRACE, {"coding": 1.0}, rng())
    assert class_limits(trace) == {"chat": 8, "coding": 16}
    requests = build_requests(trace, config=load_slo_config(), reference=lambda _: 0.1, rng=rng())
    assert [r.hidden_max_tokens for r in requests] == [8, 16, 16]


def test_a_slowdown_without_a_profile_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="--profile FILE"):
        build_requests(TRACE.select(slice(1)), config=load_slo_config(), reference=None, rng=rng())
    fixed = build_requests(TRACE, config=load_slo_config(), reference=None, rng=rng(), slo=Slo(tpot_s=0.1))
    assert fixed[0].slo == Slo(tpot_s=0.1)


@pytest.fixture
def scaled():
    document = {"perf_model": CPU.to_json()}
    return Scaled(profile=Profile(perf_model=CPU, max_num_batched_tokens=2048, document=document))


def test_the_same_seed_offers_the_same_requests_and_another_seed_the_same_load(scaled):
    one, again, other = (scaled.requests(rate_rps=1.5, duration_s=40, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert len(one) == len(other) == 60
    assert all(0 <= r.offset_s < 40 for r in one)


def test_promises_are_as_many_decode_steps_as_on_the_gpu(scaled):
    step = scaled.profile.decode_step_s
    config = scaled.config
    assert config.classes["coding"].tpot_ms == pytest.approx(4 * step * 1e3)
    assert config.classes["chat"].tpot_ms == pytest.approx(8 * step * 1e3)
    assert config.ttft_floor_ms == pytest.approx(16 * step * 1e3)
    assert config.classes["chat"].ttft_slowdown == 5


def test_an_emulated_device_is_offered_published_lengths_and_the_classes_as_they_are():
    emulated = {"perf_model": CPU.to_json(), "key": {"hardware": "emulated h100-8b-derived #1"}}
    full = fitted(Profile(perf_model=CPU, max_num_batched_tokens=2048, document=emulated))
    shipped = default_classes()
    assert full.config.classes["chat"] == shipped["chat"]
    assert full.lengths["chat"].prompt_median == 1024
    small = fitted(Profile(perf_model=CPU, max_num_batched_tokens=2048, document={"key": {"hardware": "a CPU"}}))
    assert small.lengths["chat"].prompt_median == 64


def test_stock_gets_its_default_budget_and_two_that_fit_the_promises(scaled):
    default, loose, tight = scaled.budgets
    assert default == 2048
    seconds = [scaled.profile.perf_model.seconds(n, 1, attention_pairs=n * n / 2) for n in (loose, tight)]
    assert seconds[0] == pytest.approx(8 * scaled.profile.decode_step_s, rel=0.15)
    assert seconds[1] == pytest.approx(4 * scaled.profile.decode_step_s, rel=0.25)


def test_service_capacity_is_finite_and_falls_with_cost(scaled):
    slower = PerfModel(lines=tuple(tuple(2 * v for v in line) for line in CPU.lines))
    slow = Scaled(profile=Profile(perf_model=slower, max_num_batched_tokens=2048, document={}))
    assert 0.5 < scaled.service_capacity_rps < 10
    assert slow.service_capacity_rps == pytest.approx(scaled.service_capacity_rps / 2, rel=0.02)


def test_a_synthetic_trace_has_exactly_its_duration_and_classes():
    trace = synthetic_trace(
        LENGTHS,
        MIX, process="gamma:3", rate_rps=2.0, duration_s=50.0, rng=rng(),
    )  # fmt: skip
    assert (len(trace), trace.span_s) == (100, 50.0)
    assert set(trace.slo_class) <= set(MIX)
