"""A profile that was measured on short prompts says what long contexts take, whatever kind of device it is."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.fit import StepSample, fit_perf_model
from slos_serve.core.perf import PerfModel

BUDGET = 2048
SIZES = [16 << i for i in range(9)] + [24 << i for i in range(8)]
DECODES = [(1, 64), (2, 256), (4, 64), (3, 640), (8, 64), (8, 256), (16, 48), (32, 32), (1, 1024)]
BENDING = {"per_token_s": 1.7e-5, "fixed_s": 1.6e-3}
DEVICES = {
    "two regimes and attention": [
        {"per_token_s": 3.4e-6, "fixed_s": 5.9e-3, "per_context_token_s": 4.5e-8, "per_pair_s": 1e-9},
        {**BENDING, "per_context_token_s": 4.5e-8, "per_pair_s": 1e-9},
    ],
    "two regimes without attention": [
        {"per_token_s": 7e-5, "fixed_s": 2.5e-2},
        {"per_token_s": 7.5e-5, "fixed_s": 3e-3},
    ],
    "quadratic": [{"per_token_s": 1e-5, "fixed_s": 8e-3, "per_context_token_s": 2e-7, "per_pair_s": 5e-8}],
    "flat, then linear": [
        {"fixed_s": 1.2e-2, "per_pair_s": 1e-9},
        {"per_token_s": 3e-5, "fixed_s": 4e-3, "per_pair_s": 1e-9},
    ],
    "two regimes that few steps tell apart": [
        {"per_token_s": 4.8e-6, "per_context_token_s": 2.235e-8, "per_pair_s": 4.892e-10, "fixed_s": 1.78e-2},
        {"per_token_s": 1.77e-5, "per_context_token_s": 2.235e-8, "per_pair_s": 4.892e-10, "fixed_s": 1.98e-3},
    ],
}
# What few long steps leave of a coefficient: more than that is said by its doubt.
NOISY = {"two regimes that few steps tell apart": 0.98}


class Profiling:
    """The steps that `slos-serve profile` drives an engine through, with 2 % of noise."""

    def __init__(self, truth: PerfModel, seed: int) -> None:
        self.truth = truth
        self.rng = np.random.default_rng(seed)

    def step(self, decodes=(), chunks=()) -> StepSample:
        tokens, pairs = sum(n for _, n in chunks), sum(n * (at + n / 2) for at, n in chunks)
        size = len(decodes) + tokens, len(decodes) + len(chunks)
        seconds = self.truth.seconds(*size, context_tokens=sum(decodes), attention_pairs=pairs)
        return StepSample(*size, sum(decodes), 0, pairs, bool(chunks), seconds * self.rng.lognormal(0, 0.02))

    def prompt(self, size, decodes=()) -> list[StepSample]:
        room = BUDGET - len(decodes)
        return [self.step(decodes, [(at, min(room, size - at))]) for at in range(0, size, room)]

    def run(self) -> list[StepSample]:
        samples = []
        for _ in range(6):
            for size in SIZES + [s for s in SIZES if s <= 1024]:
                samples += self.prompt(size)
            for batch, context in DECODES:
                samples += [self.step([context + i] * batch) for i in range(23)]
            for batch in (2, 8, 20):
                for i, size in enumerate((16, 32, 64, 128, 256, 512)):
                    samples += [self.step([34 + 3 * i] * batch), *self.prompt(size, [36 + 3 * i] * batch)]
        return samples


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("device", DEVICES)
def test_a_chunk_behind_a_hundred_thousand_tokens_is_predicted_from_prompts_of_four_thousand(device, seed) -> None:
    truth = PerfModel.from_terms(DEVICES[device])
    report = fit_perf_model(Profiling(truth, seed).run(), rng=np.random.default_rng(0))
    pairs = 512 * (100_000 + 256)
    assert report.r2 > NOISY.get(device, 0.99)
    assert report.mape_heldout < 0.03
    assert max(report.model.margin_decode, report.model.margin_prefill) < 1.15
    found = report.model.seconds(512, 1, attention_pairs=pairs)
    assert found == pytest.approx(truth.seconds(512, 1, attention_pairs=pairs), rel=0.15)


def test_a_device_that_does_not_feel_context_is_given_no_term_for_it() -> None:
    truth = PerfModel.from_terms(DEVICES["two regimes without attention"])
    for seed in range(6):
        report = fit_perf_model(Profiling(truth, seed).run(), rng=np.random.default_rng(0))
        assert set(report.terms) == {"per_token_s", "fixed_s"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("device", DEVICES)
def test_plans_count_with_what_far_contexts_may_cost_and_hardly_with_more_for_measured_ones(device, seed) -> None:
    truth = PerfModel.from_terms(DEVICES[device])
    report = fit_perf_model(Profiling(truth, seed).run(), rng=np.random.default_rng(0))
    assert report.longest_context == pytest.approx(4096, abs=1)
    pairs = 512 * (100_000 + 256)
    chunk, decodes = [512, 1, 0, 0, pairs, 1], [32, 32, 32 * 100_000, 0, 0, 1]
    for far in np.array([chunk, decodes], np.float64):
        assert (report.model.planned() @ far).max() >= (truth.as_array() @ far).max()
    for near in np.array([[512, 1, 0, 0, 512 * 256, 1], [8, 8, 8 * 640, 0, 0, 1], [1, 1, 1024, 0, 0, 1]], np.float64):
        assert (report.model.planned() @ near).max() <= 1.02 * (report.model.as_array() @ near).max()
