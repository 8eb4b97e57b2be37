"""What decodes need after the last prefill: context and blocks that grow, requests that end, time that runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from states import MODELS, add_decode, make_limits, make_request, make_state
from tests.core.planning.test_batching import decode, demand_of, machine_of, prefill

from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import batching
from slos_serve.core.planning import demand as columns
from slos_serve.core.planning.decode_walk import walk_decodes
from slos_serve.core.planning.demand import FULL, KEPT, MISSED, WorkBudget
from slos_serve.core.planning.dry_run import simulate
from slos_serve.core.types import RequestTable, Tier


def walk(machine, *rows, free_blocks=math.inf):
    """Return how the decodes fare, all promised, from 0 s on."""
    demand = demand_of(*rows)
    return walk_decodes(machine, demand, np.arange(demand.shape[1]), free_blocks, 0.0)[0]


def most_that_keep(build, machine, most=300):
    """Return the largest number of equal decodes that can go on."""
    kept = [count for count in range(1, most) if walk(machine, *[build() for _ in range(count)]) == KEPT]
    assert kept == list(range(1, len(kept) + 1))
    return len(kept)


def test_as_many_decodes_go_on_for_ever_as_a_step_of_their_pace_can_hold():
    machine = machine_of()
    most = most_that_keep(lambda: decode(0.03, tpot=0.03, output_left=1e7), machine)
    assert machine.lines[0] @ [most, most, 0, 0, 0, 1] <= 0.03 < machine.lines[0] @ [most + 1, most + 1, 0, 0, 0, 1]


def test_context_that_grows_leaves_room_for_fewer():
    machine = machine_of("attention")
    few, more, most = (
        most_that_keep(lambda n=n: decode(0.03, tpot=0.03, context=16, output_left=n), machine) for n in (1000, 300, 3)
    )
    assert few < more < most
    # back to back, the last of 300 tokens comes after 300 mean steps
    shape = [more, more, more * (16 + 149.5), 0, 0, 1]
    assert 300 * (machine.lines[0] @ shape) <= 300 * 0.03 + 1e-9


def test_requests_that_end_soon_are_not_in_the_way_for_ever():
    machine = machine_of(max_seqs=512.0)
    long = [decode(0.1, tpot=0.03, output_left=500) for _ in range(60)]
    assert walk(machine, *long, *[decode(0.08, tpot=0.03, output_left=3) for _ in range(60)]) == KEPT
    assert walk(machine, *long, *[decode(0.08, tpot=0.03, output_left=500) for _ in range(60)]) == MISSED


def test_slow_decodes_that_are_all_due_at_once_do_not_fit_although_they_would_on_average():
    machine = machine_of(max_seqs=512.0, free_blocks=1e6)
    fast = [decode(0.03 + 0.0001 * k, tpot=0.03, output_left=400) for k in range(8)]

    def outcome(slow_due):
        slow = [decode(due, tpot=0.1, output_left=400) for due in slow_due]
        return simulate(machine, demand_of(*fast, *slow), 0.0, WorkBudget(10**7), run_ahead=False).outcome

    most = most_that_keep(lambda: decode(0.03, tpot=0.03), machine)
    crowd = 2 * most  # 0.6 of a batch of 30 ms each 30 ms, but two batches of 30 ms before the first is due again
    assert outcome([0.03 + 0.1 * k / crowd for k in range(crowd)]) == KEPT
    assert outcome([0.045] * crowd) == MISSED


def test_one_fast_decode_goes_on_beside_slow_ones_that_skip_batches():
    machine = machine_of(max_seqs=512.0)
    slow = [decode(0.1, output_left=400) for _ in range(120)]
    assert walk(machine, *slow, decode(0.03, tpot=0.03, output_left=400)) == KEPT
    assert walk(machine, *slow, *[decode(0.03, tpot=0.03, output_left=400) for _ in range(60)]) == MISSED


def test_what_is_ahead_of_schedule_may_run_slower_than_its_pace():
    machine = machine_of()
    assert walk(machine, decode(0.03, tpot=0.02, output_left=200)) == MISSED
    assert walk(machine, decode(0.03 + 200 * 0.006, tpot=0.02, output_left=200)) == KEPT


def test_a_longest_silence_shorter_than_a_step_cannot_be_kept():
    assert walk(machine_of(), decode(0.05, gap=0.024, output_left=20)) == MISSED
    assert walk(machine_of(), decode(0.05, gap=0.026, output_left=20)) == KEPT


def test_blocks_are_counted_at_their_peak_and_come_back_when_a_request_ends():
    rows = [decode(0.1, context=160, held=10, output_left=160), decode(0.1, context=160, held=10, output_left=80)]
    # the short one ends at 15 blocks each and gives 15 back before the long one has taken 5 more
    assert walk(machine_of(), *rows, free_blocks=10.0) == KEPT
    assert walk(machine_of(), *rows, free_blocks=9.0) == FULL


def test_decodes_without_a_pace_take_memory_and_no_time():
    free = {"tpot": math.inf, "output_left": 500}
    assert walk(machine_of(), *[decode(math.inf, **free) for _ in range(100)]) == KEPT
    assert walk(machine_of(), *[decode(math.inf, **free) for _ in range(3)], free_blocks=20.0) == FULL


# -- one state after another ------------------------------------------------------------------------


def after(demand, tokens, end, gap=columns.GAP):
    """Return the demand after a batch, as a host would report it."""
    demand = demand.copy()
    for i in np.flatnonzero(tokens):
        if demand[columns.LEFT, i] > 0:
            demand[columns.HELD, i] = max(demand[columns.HELD, i], demand[columns.START, i])
            demand[columns.LEFT, i] -= tokens[i]
            demand[columns.CONTEXT, i] += tokens[i]
            if demand[columns.LEFT, i] > 0:
                continue
            due = max(demand[columns.DEADLINE, i], end) + demand[columns.TPOT, i]
            demand[columns.DEADLINE, i] = -math.inf
        else:
            demand[columns.CONTEXT, i] += 1
            demand[columns.HELD, i] = max(demand[columns.HELD, i], math.ceil(demand[columns.CONTEXT, i] / 16))
            due = demand[columns.DUE, i] + demand[columns.TPOT, i]
        demand[columns.DUE, i] = min(due, end + demand[gap, i])
        demand[columns.OUTPUT_LEFT, i] -= 1
    live = (demand[columns.LEFT] > 0) | (demand[columns.OUTPUT_LEFT] > 0)
    demand = demand[:, live]
    return demand[:, np.argsort(demand[columns.DEADLINE], kind="stable")]


tight = st.sampled_from([0.026, 0.03, 0.05, 0.1])
lives = st.integers(1, 40)
mixtures = st.lists(
    st.one_of(
        st.builds(
            prefill,
            left=st.integers(1, 1500),
            deadline=st.integers(5, 60).map(lambda n: n / 50),
            tpot=tight,
            output_left=lives,
            gap=st.sampled_from([math.inf, 0.2]),
        ),
        st.builds(
            decode, due=st.integers(3, 30).map(lambda n: n / 100), tpot=tight, output_left=lives,
            context=st.integers(1, 1000).map(lambda n: 320 - n % 300), held=st.just(20),
        ),
    ),
    min_size=1,
    max_size=24,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mixtures, st.sampled_from(sorted(MODELS)), st.sampled_from([60.0, 200.0, 1e4]), st.booleans())
def test_what_is_kept_once_is_kept_to_the_end(rows, model, total_blocks, run_ahead):
    demand = demand_of(*rows)
    machine = machine_of(model, max_seqs=16.0)
    now = 0.0

    def dry_run():
        free = total_blocks + 400 - demand[columns.HELD].sum()
        return machine._replace(free_blocks=free), simulate(
            machine._replace(free_blocks=free), demand, now, WorkBudget(10**7), run_ahead=run_ahead
        )

    if not dry_run()[1].kept:
        return
    for _ in range(4000):
        if not demand.shape[1]:
            return
        machine, result = dry_run()
        assert result.kept, f"no longer kept at {now}"
        tokens, totals = np.zeros(demand.shape[1]), np.zeros(columns.NUM_TOTALS)
        end = batching.compose(
            machine, demand, *batching.sides(demand), machine.free_blocks, run_ahead, now, tokens, totals
        )
        assert end > now
        late = np.where(tokens > 0, np.minimum(demand[columns.DUE], 1e9), math.inf) < end - 1e-6
        assert not (late & (demand[columns.LEFT] == 0)).any()
        demand, now = after(demand, tokens, end), end
    pytest.fail("the decodes never ended")


def test_room_is_filled_only_as_far_as_the_promised_can_spare_it_later():
    table = RequestTable()
    for i in range(53):
        add_decode(table, f"r{i}", prompt=20, produced=2, tpot_s=0.03, predicted=304)
    for i in range(3):
        table.add(make_request(f"free{i}", prompt=3000), tier=Tier.BEST_EFFORT)
    limits = make_limits(max_num_seqs=256)
    growing = SloPlanner().plan(make_state(table, model=MODELS["attention"], limits=limits))
    # by their end they take 38 ms a step: what they gain until then is not for others
    assert growing.batch.predicted_s < 0.023
    table.rows["predicted_output_tokens"] = 20
    ending = SloPlanner().plan(make_state(table, model=MODELS["attention"], limits=limits))
    assert ending.batch.predicted_s > 0.028
