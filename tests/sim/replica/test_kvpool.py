"""Blocks are conserved, and idle prefixes go oldest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.sim.replica.kvpool import KvPool


def test_a_session_finds_the_full_blocks_of_its_history():
    pool = KvPool(10, 16)
    pool.take(4)
    pool.give(4, "s", 50)
    assert pool.cached_tokens("s") == 48
    assert pool.num_free == 10


def test_the_oldest_idle_prefix_is_lost_first():
    pool = KvPool(10, 16)
    for name in ("old", "new"):
        pool.take(4)
        pool.give(4, name, 64)
    assert pool.take(3) == ["old"]
    assert pool.cached_tokens("old") == 0
    assert pool.cached_tokens("new") == 64


def test_a_claimed_prefix_is_no_longer_idle():
    pool = KvPool(10, 16)
    pool.take(4)
    pool.give(4, "s", 64)
    pool.claim("s")
    assert pool.take(10) == []


def test_more_blocks_than_are_free_are_refused():
    with pytest.raises(ValueError, match="are free"):
        KvPool(2, 16).take(3)


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["", "a", "b", "c"])), max_size=30))
def test_blocks_are_conserved_whatever_is_taken_and_given(moves):
    pool, held = KvPool(20, 16), []
    for blocks, session in moves:
        if blocks <= pool.num_free:
            pool.take(blocks)
            held.append((blocks, session))
        elif held:
            count, name = held.pop(0)
            pool.give(count, name, count * 16)
        assert pool.num_free + sum(count for count, _ in held) == 20
        assert 0 <= pool.num_cached <= pool.num_free
        assert pool.lowest_free <= pool.num_free
