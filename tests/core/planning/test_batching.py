"""One batch and many: what joins, when it ends, and how a run of batches is judged."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MODELS

from slos_serve.core.perf import batch_seconds
from slos_serve.core.planning import batching
from slos_serve.core.planning import demand as columns
from slos_serve.core.planning.demand import CUT_OFF, FULL, KEPT, MISSED, STUCK, Machine, WorkBudget
from slos_serve.core.planning.dry_run import NO_BATCH, run, simulate

COLUMNS = {
    "left": columns.LEFT,
    "context": columns.CONTEXT,
    "deadline": columns.DEADLINE,
    "due": columns.DUE,
    "tpot": columns.TPOT,
    "gap": columns.GAP,
    "verify": columns.VERIFY,
    "gain": columns.GAIN,
    "steps": columns.STEPS,
    "output_left": columns.OUTPUT_LEFT,
    "held": columns.HELD,
    "start": columns.START,
    "value": columns.VALUE,
    "required": columns.REQUIRED,
}


def prefill(left, deadline, **changes):
    return {
        "left": left, "context": 0, "deadline": deadline, "due": math.inf, "tpot": 0.1, "gap": math.inf, "verify": 1,
        "gain": 1, "steps": 0, "output_left": 100, "held": 0, "start": -(-(left + 1) // 16), "value": 1, "required": 0,
    } | changes  # fmt: skip


def decode(due, **changes):
    return prefill(0, -math.inf, **({"due": due, "context": 320, "held": 20} | changes))


def demand_of(*rows):
    """Return the rows as a demand, in order of deadline."""
    demand = np.zeros((columns.NUM_COLUMNS, len(rows)))
    for k, row in enumerate(sorted(rows, key=lambda row: row["deadline"])):
        for name, column in COLUMNS.items():
            demand[column, k] = row[name]
    return demand


def machine_of(model="stepped", **changes):
    values = {
        "lines": MODELS[model].as_array(),
        "margin_prefill": 1.0,
        "margin_decode": 1.0,
        "token_budget": 2048.0,
        "max_seqs": 64.0,
        "block_size": 16.0,
        "free_blocks": 1000.0,
        "max_batch_s": 0.2,
    }
    return Machine(**(values | changes))


def compose_batch(machine, demand, *, run_ahead=False, now_s=0.0):
    """Return (tokens by request, totals, end)."""
    tokens, totals = np.zeros(demand.shape[1]), np.zeros(columns.NUM_TOTALS)
    before = demand.copy()
    sides = batching.sides(demand)
    end = batching.compose(machine, demand, *sides, machine.free_blocks, run_ahead, now_s, tokens, totals)
    assert np.array_equal(demand, before)
    return tokens, totals, end


def run_batches(machine, demand, *, run_ahead=False, until_s=0.0, max_work=10**6):
    """Return (outcome, request that missed, ends of prefills, tokens by batch, ends of batches)."""
    count = demand.shape[1]
    log_tokens, log_end, finished = np.zeros((500, count)), np.zeros(500), np.full(count, math.inf)
    outcome, missed, batches, work = run(
        machine, demand.copy(), run_ahead, 0.0, until_s, max_work, NO_BATCH, -math.inf, finished, log_tokens, log_end
    )
    assert work <= max_work + 100 * count
    return outcome, missed, finished, log_tokens[:batches], log_end[:batches]


times = st.integers(20, 400).map(lambda n: n / 1000)
requests = st.one_of(
    st.builds(
        prefill,
        left=st.integers(1, 3000),
        deadline=times.map(lambda s: 3 * s),
        held=st.sampled_from([0, 0, 200]),
        context=st.sampled_from([0, 500]),
    ),
    st.builds(decode, due=times, tpot=st.sampled_from([0.03, 0.05, 0.1]), context=st.integers(1, 4000)),
)
demands = st.lists(requests, min_size=1, max_size=30).map(lambda rows: demand_of(*rows))
machines = st.builds(
    machine_of,
    model=st.sampled_from(sorted(MODELS)),
    token_budget=st.sampled_from([64.0, 512.0, 8192.0]),
    max_seqs=st.sampled_from([8.0, 64.0]),
    free_blocks=st.sampled_from([20.0, 150.0, 1e4]),
    margin_prefill=st.sampled_from([1.0, 1.3]),
)


@settings(max_examples=300, deadline=None)
@given(machines, demands, st.booleans())
def test_a_batch_holds_no_more_than_an_engine_step(machine, demand, run_ahead):
    tokens, _, end = compose_batch(machine, demand, run_ahead=run_ahead)
    left = demand[columns.LEFT]
    is_prefill = left > 0
    assert (tokens == np.floor(tokens)).all()
    assert (tokens >= 0).all()
    assert tokens.sum() <= machine.token_budget
    assert (tokens[is_prefill] <= left[is_prefill]).all()
    assert (tokens[~is_prefill] <= demand[columns.VERIFY][~is_prefill]).all()
    new = (tokens > 0) & is_prefill & (demand[columns.HELD] == 0)
    assert demand[columns.START][new].sum() <= machine.free_blocks
    started = (~is_prefill | (demand[columns.HELD] > 0)).sum()
    assert new.sum() <= max(0, machine.max_seqs - started)
    if tokens.any():
        context = demand[columns.CONTEXT]
        chunk = tokens * (context + 0.5 * tokens)
        seconds = batch_seconds(
            machine.lines,
            tokens.sum(),
            float((tokens > 0).sum()),
            float(context[(tokens > 0) & ~is_prefill].sum()),
            float(demand[columns.STEPS][tokens > 0].max()),
            float(chunk[is_prefill].sum()),
        )
        margin = machine.margin_prefill if (tokens[is_prefill] > 0).any() else machine.margin_decode
        assert end == pytest.approx(margin * seconds)
    else:
        assert end == 0.0


@settings(max_examples=200, deadline=None)
@given(machines, demands, st.booleans())
def test_prefill_never_makes_a_batch_end_after_the_token_that_is_due_first(machine, demand, run_ahead):
    tokens, totals, end = compose_batch(machine, demand, run_ahead=run_ahead)
    if (tokens[demand[columns.LEFT] > 0] > 0).any():
        assert end <= totals[columns.LIMIT] + 1e-6
        assert totals[columns.LIMIT] <= demand[columns.DUE][demand[columns.LEFT] == 0].min(initial=math.inf)


@settings(max_examples=200, deadline=None)
@given(machines, demands, st.booleans())
def test_prompts_are_served_in_order_of_deadline(machine, demand, run_ahead):
    tokens, _, _ = compose_batch(machine, demand, run_ahead=run_ahead)
    can_start = (demand[columns.LEFT] > 0) & (demand[columns.HELD] > 0)
    order = np.flatnonzero(can_start)
    cut = [tokens[i] < demand[columns.LEFT, i] for i in order]
    for k in range(len(order) - 1):
        if cut[k]:
            assert (tokens[order[k + 1 :]] == 0).all()


def test_decodes_run_ahead_when_eager_and_wait_when_not():
    rows = [decode(0.9) for _ in range(20)] + [prefill(4000, 1.0)]
    machine = machine_of(token_budget=2000.0)
    lazy, _, _ = compose_batch(machine, demand_of(*rows))
    run_ahead, _, _ = compose_batch(machine, demand_of(*rows), run_ahead=True)
    assert (lazy[:20].sum(), run_ahead[:20].sum()) == (0, 20)
    assert lazy.sum() == run_ahead.sum() == 2000


def test_a_decode_that_the_next_batch_would_deliver_late_joins_this_one():
    tokens, _, end = compose_batch(machine_of(), demand_of(decode(0.05), decode(0.12), decode(5.0), prefill(3000, 1.0)))
    assert tokens[:3].tolist() == [1, 1, 0]
    assert tokens[3] > 0
    assert end <= 0.05


def test_a_longer_draft_counts_as_the_tokens_it_verifies():
    plain, _, _ = compose_batch(machine_of(), demand_of(*[decode(0.05) for _ in range(10)]))
    drafted, totals, _ = compose_batch(
        machine_of("attention"), demand_of(*[decode(0.05, verify=4, gain=2.5, steps=3) for _ in range(10)])
    )
    assert (plain.sum(), drafted.sum()) == (10, 40)
    assert totals[columns.DRAFTS] == 3


# -- runs -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(machines, demands, st.booleans())
def test_a_run_that_is_kept_computes_every_prompt_by_its_deadline(machine, demand, run_ahead):
    outcome, missed, finished, log_tokens, log_end = run_batches(machine, demand, run_ahead=run_ahead)
    prefills = demand[columns.LEFT] > 0
    assert (np.diff(log_end) > 0).all()
    assert (log_tokens.sum(axis=1) <= machine.token_budget).all()
    if outcome == KEPT:
        # decodes come after the prefill, one token each: what is above the prompt
        assert (finished[prefills] <= demand[columns.DEADLINE][prefills] + 1e-9).all()
        assert (log_tokens.sum(axis=0)[prefills] >= demand[columns.LEFT][prefills]).all()
        for i in np.flatnonzero(prefills):
            done = np.cumsum(log_tokens[:, i])
            assert log_end[np.searchsorted(done, demand[columns.LEFT, i])] == finished[i]
    else:
        assert missed < demand.shape[1]


def test_a_run_says_how_it_ended():
    machine = machine_of()
    assert run_batches(machine, demand_of(prefill(500, 1.0)))[0] == KEPT
    assert run_batches(machine, demand_of(prefill(5000, 0.3)))[0] in (MISSED, STUCK)
    assert run_batches(machine, demand_of(decode(0.001), prefill(5, 1.0)))[:2] == (MISSED, 0)
    assert run_batches(machine_of(free_blocks=10.0), demand_of(prefill(500, 1.0)))[0] in (STUCK, MISSED)
    assert run_batches(machine, demand_of(prefill(500, 1.0)), max_work=5)[0] == CUT_OFF
    crowded = [decode(0.05 + 0.001 * i) for i in range(10)] + [prefill(4000, 2.0, held=300)]
    assert run_batches(machine_of(free_blocks=4.0), demand_of(*crowded), until_s=2.0)[0] == FULL


def test_blocks_come_back_when_a_request_ends_and_let_the_next_one_start():
    rows = [decode(0.05, output_left=8, held=20, required=1), prefill(300, 2.0, output_left=50)]
    outcome, _, finished, _, _ = run_batches(machine_of(free_blocks=2.0), demand_of(*rows))
    assert outcome == KEPT
    assert finished[1] > 7 * machine_of().lines[0, 5]


def test_decodes_that_cannot_go_on_together_are_not_a_kept_run():
    rows = [prefill(16, 1.0, tpot=0.03, output_left=5000) for _ in range(150)]
    machine = machine_of(max_seqs=256.0, free_blocks=1e6)
    assert run_batches(machine, demand_of(*rows))[0] == MISSED
    assert run_batches(machine, demand_of(*rows[:60]))[0] == KEPT


@settings(max_examples=60, deadline=None)
@given(machines, demands)
def test_simulating_leaves_the_demand_alone_and_counts_its_work(machine, demand):
    before, work_budget = demand.copy(), WorkBudget(5000)
    first = simulate(machine, demand, 0.0, work_budget, run_ahead=False)
    assert np.array_equal(demand, before)
    assert 0 <= work_budget.spent <= 5000 + 100 * demand.shape[1]
    assert work_budget.left == max(0, 5000 - work_budget.spent)
    again = simulate(machine, demand, 0.0, WorkBudget(5000), run_ahead=False)
    assert first.outcome == again.outcome
    assert np.array_equal(first.finished_at, again.finished_at)


# -- filling up -------------------------------------------------------------------------------------


def fill_up(demand, *, seats=10, free_blocks=1000.0, reserve=0.0, seconds=0.05, totals=None, machine=None):
    """Return (tokens by request, totals)."""
    totals = np.zeros(columns.NUM_TOTALS) if totals is None else totals
    tokens = np.zeros(demand.shape[1])
    batching.fill(machine or machine_of(), demand, seats, free_blocks, reserve, seconds, tokens, totals)
    return tokens, totals


def in_order(*rows):
    return np.concatenate([demand_of(row) for row in rows], axis=1)


@settings(max_examples=200, deadline=None)
@given(
    machines,
    st.lists(requests, min_size=1, max_size=12),
    st.integers(0, 4),
    st.sampled_from([0.0, 10.0, 500.0]),
    st.floats(0.0, 0.2),
)
def test_filling_stays_within_time_budget_seats_and_blocks(machine, rows, seats, free_blocks, seconds):
    demand = in_order(*rows)
    tokens, totals = fill_up(demand, seats=seats, free_blocks=free_blocks, seconds=seconds, machine=machine)
    left, held = demand[columns.LEFT], demand[columns.HELD]
    assert tokens.sum() == totals[columns.TOKENS] <= machine.token_budget
    assert (tokens <= np.where(left > 0, left, demand[columns.VERIFY])).all()
    used = tokens > 0
    assert (used & (left > 0) & (held == 0)).sum() <= seats
    after = np.where(left > 0, demand[columns.CONTEXT] + left + 1, demand[columns.CONTEXT] + demand[columns.VERIFY])
    assert (np.ceil(after / 16) - held).clip(min=0)[used].sum() <= free_blocks
    if used.any():
        margin = machine.margin_prefill if totals[columns.HAS_PREFILL] else machine.margin_decode
        shape = (float(value) for value in totals[: columns.HAS_PREFILL])
        assert margin * batch_seconds(machine.lines, *shape) <= seconds + 1e-6


def test_filling_goes_by_the_order_given_and_cuts_the_last_prompt():
    tokens, _ = fill_up(in_order(prefill(200, 9.0), prefill(3000, 1.0), prefill(100, 0.5)))
    assert tokens[0] == 200
    assert 0 < tokens[1] < 3000
    assert tokens[2] == 0


def test_a_prompt_that_finds_no_room_does_not_stop_those_behind_it():
    tokens, _ = fill_up(in_order(prefill(4000, 1.0), prefill(50, 1.0)), free_blocks=10.0)
    assert tokens.tolist() == [0, 50]


def test_a_new_prompt_leaves_the_reserve_to_those_that_run():
    rows = in_order(prefill(100, 1.0), decode(0.1, context=320, held=20))
    tokens, _ = fill_up(rows, free_blocks=7.0, reserve=1.0)
    assert tokens.tolist() == [0, 1]
