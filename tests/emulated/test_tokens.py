"""Made-up tokens: the same for the same prompt, ending by themselves, with drafts accepted at the given chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.emulated.tokens import (
    MadeUpOutput,
    accepted,
    allowed_token,
    made_up_logprobs,
    natural_length,
    plain_tokens,
    seed_of,
)

WORDS = plain_tokens(1000)


def test_the_ends_of_the_vocabulary_where_special_tokens_are_are_not_used():
    assert (WORDS.start, WORDS.stop) == (250, 750)
    assert len(plain_tokens(1)) == 1


def test_a_prompt_always_gets_the_same_tokens_and_another_one_others():
    first, again, other = (
        MadeUpOutput(num_prompt_tokens=3, seed=seed_of(p)) for p in ([1, 2, 3], [1, 2, 3], [1, 2, 4])
    )
    assert first.take(20, WORDS) == again.take(20, WORDS)
    assert other.take(20, WORDS) != MadeUpOutput(num_prompt_tokens=3, seed=seed_of([1, 2, 3])).take(20, WORDS)


def test_sampled_requests_with_one_prompt_differ_by_their_name():
    assert seed_of([1, 2], "0_a") != seed_of([1, 2], "1_a")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_tokens_depend_on_their_place_not_on_how_many_come_at_once(counts):
    whole = MadeUpOutput(num_prompt_tokens=1, seed=9).take(sum(counts), WORDS)
    parts = MadeUpOutput(num_prompt_tokens=1, seed=9)
    assert [token for count in counts for token in parts.take(count, WORDS)] == whole
    assert all(token in WORDS for token in whole)


def test_a_request_ends_with_its_end_token_and_takes_no_draft_behind_it():
    progress = MadeUpOutput(num_prompt_tokens=1, seed=9, ends_at=3, end_token=2)
    assert len(progress.take(2, WORDS)) == 2
    assert progress.take(4, WORDS) == [2]


def test_a_preempted_request_goes_on_where_it_was():
    whole = MadeUpOutput(num_prompt_tokens=1, seed=9).take(10, WORDS)
    assert MadeUpOutput(num_prompt_tokens=1, seed=9, emitted=6).take(4, WORDS) == whole[6:]


def test_lengths_have_the_mean_asked_for_and_respect_the_least():
    lengths = [natural_length(seed_of([seed]), 100) for seed in range(4000)]
    assert np.mean(lengths) == pytest.approx(100, rel=0.05)
    assert min(lengths) >= 1
    assert min(natural_length(seed_of([seed]), 100, 30) for seed in range(300)) >= 30


def test_drafts_are_accepted_at_the_given_chance_up_to_the_first_that_is_not():
    random = np.random.default_rng(0)
    counts = [accepted(4, 0.7, random) for _ in range(4000)]
    assert np.mean(counts) == pytest.approx(sum(0.7**i for i in range(1, 5)), rel=0.05)
    assert accepted(4, 1.0, random) == 4
    assert accepted(4, 0.0, random) == 0


def test_a_grammar_is_obeyed_and_ended_as_soon_as_it_may_end():
    row = np.zeros(4, np.int32)
    row[1] = (1 << 3) | (1 << 9)  # tokens 35 and 41
    assert {allowed_token(row, seed, 2) for seed in range(50)} == {35, 41}
    row[0] = 1 << 2
    assert allowed_token(row, 5, 2) == 2


def test_logprobs_hold_the_token_itself_first_and_are_those_of_equal_chances():
    ids, values = made_up_logprobs([300, 400], 3)
    assert ids[:, 0].tolist() == [300, 400]
    assert ids.shape == values.shape == (2, 4)
    assert np.exp(values).sum(axis=1) == pytest.approx([1, 1])
