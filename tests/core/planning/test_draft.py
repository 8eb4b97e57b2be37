"""Draft lengths: every draft token is priced, and the cheapest way to keep every pace wins."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MODELS, STEPPED, add_decode, make_limits, make_request, make_state
from tests.core.planning.test_batching import machine_of

from slos_serve.core.perf import batch_seconds
from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import draft
from slos_serve.core.planning.columns import Columns
from slos_serve.core.types import RequestTable, Tier

acceptances = st.sampled_from([0.0, 0.3, 0.6, 0.8, 0.95])
groups = st.lists(
    st.tuples(st.sampled_from([0.02, 0.03, 0.05, 0.1]), acceptances, st.integers(0, 40)), min_size=1, max_size=3
)


def choose(rows, machine, max_verify, **options):
    tpot, acceptance, counts = (np.array(column, float) for column in zip(*rows, strict=True))
    return draft.lengths(tpot, acceptance, counts, machine, max_verify, **options)


def expected(acceptance, verify):
    return sum(acceptance**k for k in range(verify))


def rate_of(rows, verify, machine):
    """Return the prefill rate left beside the given lengths; None where they cannot keep up within the period."""
    live = [(row, s) for row, s in zip(rows, verify, strict=True) if row[2] > 0]
    period = min(expected(row[1], s) * row[0] for row, s in live)
    load, steps = sum(row[2] * s for row, s in live), max(s for _, s in live) - 1
    count = sum(row[2] for row, _ in live) + 1
    low, high = 0.0, machine.token_budget
    for _ in range(50):
        middle = (low + high) / 2
        # of these tokens all but the load are one prompt, which attends to itself
        pairs = 0.5 * max(0.0, middle - load) ** 2
        fits = batch_seconds(machine.lines, middle, count, 0.0, steps, pairs) * machine.margin_prefill <= period
        low, high = (middle, high) if fits else (low, middle)
    return (low - load) / period if low > load else None


@settings(deadline=None)
@given(acceptances, st.integers(1, 8))
def test_the_expected_tokens_are_a_geometric_sum(acceptance, verify):
    assert draft.expected_tokens(acceptance, verify) == pytest.approx(expected(acceptance, verify))


@settings(max_examples=150, deadline=None)
@given(groups, st.sampled_from(sorted(MODELS)), st.integers(1, 5))
def test_lengths_are_those_with_the_most_prefill_left(rows, model, max_verify):
    machine = machine_of(model, token_budget=8192.0)
    verify = choose(rows, machine, max_verify)
    assert ((verify >= 1) & (verify <= max_verify)).all()
    live = [k for k, row in enumerate(rows) if row[2] > 0]
    if not live:
        assert (verify == 1).all()
        return
    options = product(*[range(1, max_verify + 1) if k in live else [1] for k in range(len(rows))])
    rates = [rate for rate in (rate_of(rows, option, machine) for option in options) if rate is not None]
    if rates:
        assert rate_of(rows, verify.tolist(), machine) == pytest.approx(max(rates), rel=1e-6, abs=1e-3)


def test_without_acceptance_or_permission_nothing_is_drafted():
    machine = machine_of()
    assert choose([(0.05, 0.0, 10)], machine, 6).tolist() == [1]
    assert choose([(0.05, 0.9, 10)], machine, 1).tolist() == [1]
    assert choose([(math.inf, 0.9, 10)], machine, 6).tolist() == [1]


def test_where_tokens_cost_more_than_steps_nothing_is_drafted():
    dear = machine_of()._replace(lines=np.array([[1e-3, 0.0, 0.0, 0.0, 0.0, 1e-3]]))
    assert choose([(0.05, 0.7, 10)], dear, 6).tolist() == [1]


def test_where_a_step_is_dear_drafts_are_used_and_shrink_with_load():
    machine = machine_of(token_budget=8192.0)
    few, many = (choose([(0.05, 0.7, count)], machine, 6)[0] for count in (2, 300))
    assert few > many >= 1


def test_while_no_prompt_waits_a_loose_tier_goes_as_far_as_a_tight_one_where_tokens_are_cheap():
    machine = machine_of(token_budget=8192.0)
    rows = [(0.03, 0.7, 4), (0.1, 0.7, 4)]
    waiting, idle = (choose(rows, machine, 5, waiting=waits).tolist() for waits in (True, False))
    assert waiting[1] < waiting[0]
    assert idle[1] == idle[0] > 1


def test_a_length_in_use_stays_until_another_is_clearly_better():
    machine = machine_of(token_budget=8192.0)
    rows = [(0.05, 0.7, 10)]
    best = int(choose(rows, machine, 6)[0])
    rates = {s: rate_of(rows, [s], machine) for s in range(1, 7)}
    for s, rate in rates.items():
        kept = choose(rows, machine, 6, current=np.array([s]))[0]
        assert kept == (s if rates[best] < rate * (1 + draft.SWITCH_GAIN) else best)


def test_a_length_that_is_no_longer_allowed_is_left():
    assert choose([(0.05, 0.7, 10)], machine_of(), 2, current=np.array([6])).tolist()[0] <= 2


def plan_drafts(**changes):
    table = RequestTable()
    for i in range(3):
        add_decode(table, f"r{i}", tpot_s=0.05)
    add_decode(table, "free", tpot_s=None, ttft_s=None, tier=Tier.BEST_EFFORT)
    state = make_state(table, limits=make_limits(max_draft_length=4), **changes)
    batch = SloPlanner().plan(state).batch
    return dict(zip(batch.request_ids, batch.draft_lengths.tolist(), strict=True))


def test_a_plan_drafts_in_decodes_with_the_measured_acceptance():
    assert set(plan_drafts(acceptance={"chat": 0.8}).values()) - {0}
    assert set(plan_drafts().values()) == {0}
    assert set(plan_drafts(acceptance={"chat": 0.0}).values()) == {0}


@pytest.mark.parametrize("bad", [-0.5, 1.0, 7.0])
def test_an_acceptance_outside_its_range_is_taken_to_its_edge(bad):
    drafts = plan_drafts(acceptance={"chat": bad})
    assert all(0 <= length <= 4 for length in drafts.values())


def test_a_prompt_that_finds_no_memory_does_not_make_drafts_shorter():
    table = RequestTable()
    for i in range(3):
        add_decode(table, f"r{i}", tpot_s=0.05, prompt=1600, predicted=60)
    table.add(make_request("waits", prompt=4000, ttft_s=9.0, tpot_s=0.05), predicted_output_tokens=60)
    held = int(table.rows["num_kv_blocks"].sum())
    drafts = {}
    for blocks in (held + 30, 20_000):
        limits = make_limits(max_draft_length=4, num_kv_blocks=blocks)
        state = make_state(
            table, limits=limits, num_free_kv_blocks=blocks - held, acceptance={"chat": 0.7}, model=STEPPED
        )
        columns = Columns(state, 8.0)
        assert columns.prompts_wait(np.arange(4)) == (blocks == 20_000)
        drafts[blocks] = int(columns.verify[0])
    assert drafts[held + 30] >= drafts[20_000]
