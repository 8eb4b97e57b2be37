"""The dynamic programme finds what exhaustive search finds, and what it proposes is mended to something that holds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Engine, Item, best_set, best_set_milp, keeps_in_batches, loosened
from states import CONTEXT, TPOTS

from slos_serve.core.planning import admission
from slos_serve.core.planning import demand as columns
from slos_serve.core.planning import programme as reduced_model
from slos_serve.core.planning.demand import Machine, WorkBudget
from slos_serve.core.planning.dry_run import simulate

LINES = ((6.878e-5, 2.480e-2), (7.523e-5, 3.03e-3))
NAMES = ("dp", "greedy")


def make_machine(engine, **changes):
    """Return the machine of `batching` with the hardware of the reduced model."""
    values = {
        "lines": np.array([[slope, 0.0, 0.0, 0.0, 0.0, fixed] for slope, fixed in engine.lines]),
        "margin_prefill": 1.0,
        "margin_decode": 1.0,
        "token_budget": float(engine.token_budget),
        "max_seqs": 1e6,
        "block_size": 1e12,
        "free_blocks": min(engine.free_blocks, 1e12),
        "max_batch_s": math.inf,
    }
    return Machine(**(values | changes))


def make_demand(items, now_s=0.0):
    """Return the items as a demand, and their positions in its order."""
    order = sorted(range(len(items)), key=lambda i: (max(items[i].lives_from_s, -1e9), i))
    demand = np.zeros((columns.NUM_COLUMNS, len(items)))
    for k, i in enumerate(order):
        item = items[i]
        demand[columns.LEFT, k] = item.prefill
        demand[columns.DEADLINE, k] = item.lives_from_s
        demand[columns.DUE, k] = math.inf if item.prefill else now_s + item.tpot_s
        demand[columns.TPOT, k] = item.tpot_s
        demand[columns.GAP, k] = math.inf
        demand[columns.VERIFY, k] = demand[columns.GAIN, k] = 1.0
        demand[columns.OUTPUT_LEFT, k] = 1e9
        demand[columns.HELD, k] = float(item.running)
        demand[columns.START, k] = item.blocks
        demand[columns.VALUE, k] = item.weight
        demand[columns.REQUIRED, k] = float(item.running)
    return demand, order


def programme(engine, items, width=200, now_s=0.0):
    """Return (weight, chosen items) of the dynamic programme; (-inf, []) where it finds nothing feasible."""
    demand, order = make_demand(items, now_s)
    model = reduced_model.reduced(make_machine(engine), demand, now_s)
    value, _, parent, taken, _ = reduced_model.choose(now_s, model, width, 0.0)
    if not len(value):
        return -math.inf, []
    chosen = np.zeros(len(items), np.bool_)
    reduced_model.trace(parent, taken, 0, chosen)
    return float(value[0]), [items[order[k]] for k in np.flatnonzero(chosen)]


def density_greedy(engine, items):
    demand, order = make_demand(items)
    model = reduced_model.reduced(make_machine(engine), demand, 0.0)
    on = reduced_model.greedy(0.0, model, reduced_model.value_density(0.0, model))
    return sum(items[order[k]].weight for k in np.flatnonzero(on) if not items[order[k]].running)


items = st.builds(
    Item,
    prefill=st.integers(10, 4000).map(float),
    deadline_s=st.integers(5, 400).map(lambda n: n / 100),
    tpot_s=st.sampled_from(TPOTS),
    weight=st.sampled_from([1.0, 1.0, 2.0, 3.5]),
    blocks=st.integers(0, 80).map(float),
)
running = st.builds(
    Item, prefill=st.just(0.0), deadline_s=st.just(0.0), tpot_s=st.sampled_from(TPOTS), running=st.just(True)
)
started = st.builds(
    Item,
    prefill=st.integers(10, 1000).map(float),
    deadline_s=st.integers(20, 200).map(lambda n: n / 100),
    tpot_s=st.sampled_from(TPOTS),
    running=st.just(True),
)
engines = st.builds(
    Engine,
    lines=st.just(LINES),
    token_budget=st.sampled_from([256, 2048, 16384]),
    free_blocks=st.sampled_from([math.inf, 200.0, 60.0]),
)
queues = st.tuples(
    st.lists(items, min_size=1, max_size=7), st.lists(running, max_size=12), st.lists(started, max_size=1)
).map(lambda parts: parts[0] + parts[1] + parts[2])


@settings(max_examples=200, deadline=None)
@given(engines, queues)
def test_the_programme_finds_the_optimum_of_the_reduced_model(engine, queue):
    weight, chosen = programme(engine, queue)
    assert weight == pytest.approx(best_set(engine, queue, feasible=keeps_in_batches)[0])
    if math.isfinite(weight):
        assert keeps_in_batches(engine, chosen)


def test_a_beam_of_200_stays_exact_where_the_labels_no_longer_fit():
    rng = np.random.default_rng(0)
    for _ in range(12):
        engine = Engine(lines=LINES, token_budget=16384, free_blocks=float(rng.choice([math.inf, 300])))
        queue = [
            Item(
                prefill=float(rng.integers(50, 3000)),
                deadline_s=float(rng.uniform(0.2, 1.5)),
                tpot_s=float(rng.choice(TPOTS)),
                weight=float(rng.choice([1.0, 2.0, 3.0])),
                blocks=float(rng.integers(4, 60)),
            )
            for _ in range(11)
        ]
        assert programme(engine, queue)[0] == best_set(engine, queue, feasible=keeps_in_batches)[0]


def queues_of_twenty(seed):
    """Yield engines, each with a queue of twenty beside ten decodes."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        engine = Engine(lines=LINES, token_budget=8192, free_blocks=400.0)
        yield (
            engine,
            [Item(prefill=0.0, deadline_s=0.0, tpot_s=0.1, running=True)] * 10
            + [
                Item(
                    prefill=float(rng.integers(50, 3000)),
                    deadline_s=float(rng.uniform(0.2, 2.5)),
                    tpot_s=float(rng.choice(TPOTS)),
                    weight=float(rng.integers(1, 4)),
                    blocks=float(rng.integers(4, 60)),
                )
                for _ in range(20)
            ],
        )


def test_a_wide_beam_loses_nothing_on_queues_of_twenty_and_a_beam_of_200_little():
    for engine, queue in queues_of_twenty(seed=1):
        best = programme(engine, queue, width=20_000)[0]
        assert programme(engine, queue, width=2000)[0] == best
        assert programme(engine, queue)[0] >= 0.95 * best


def test_whole_batches_find_nearly_what_a_mixed_integer_programme_finds_for_a_fluid():
    pytest.importorskip("scipy")
    found = [(programme(engine, queue)[0], best_set_milp(engine, queue)) for engine, queue in queues_of_twenty(seed=2)]
    assert sum(value for value, _ in found) >= 0.95 * sum(optimum for _, optimum in found)


@settings(max_examples=60, deadline=None)
@given(engines, queues)
def test_the_two_oracles_of_the_fluid_model_agree(engine, queue):
    pytest.importorskip("scipy")
    assert best_set_milp(engine, queue) == pytest.approx(best_set(engine, queue)[0])


@settings(max_examples=150, deadline=None)
@given(engines, queues)
def test_the_programme_is_never_worse_than_taking_by_value_density(engine, queue):
    weight, _ = programme(engine, queue)
    if math.isfinite(weight):
        assert weight >= density_greedy(engine, queue) - 1e-9


@settings(max_examples=150, deadline=None)
@given(engines, queues, st.integers(0, 100), st.floats(0, 2), st.floats(1, 3))
def test_loosening_an_slo_never_lowers_the_optimum(engine, queue, which, later_s, slower):
    which %= len(queue)
    looser = list(queue)
    factor = slower if not queue[which].running or queue[which].prefill else 1.0
    later_s = later_s if queue[which].prefill else 0.0
    looser[which] = loosened(queue[which], ttft_s=later_s, tpot_factor=factor)
    assert best_set(engine, looser)[0] >= best_set(engine, queue)[0] - 1e-9


@settings(max_examples=150, deadline=None)
@given(engines, queues, st.integers(0, 200))
def test_adding_memory_never_lowers_the_optimum(engine, queue, more):
    larger = replace(engine, free_blocks=engine.free_blocks + more)
    assert best_set(larger, queue)[0] >= best_set(engine, queue)[0]
    assert programme(larger, queue, width=4096)[0] >= programme(engine, queue, width=4096)[0] - 1e-9


# -- what is chosen must hold in batches ------------------------------------------------------------


def chosen_by(name, engine, queue, *, limit=200_000, **changes):
    demand, _ = make_demand(queue)
    machine, work_budget = make_machine(engine, **changes), WorkBudget(limit)
    before = demand.copy()
    index, dry_run = admission.select(machine, demand, 0.0, work_budget, name=name, width=200)
    assert np.array_equal(demand, before)
    return index, dry_run, work_budget, demand, machine


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(engines, queues)
def test_the_selected_set_holds_in_batches_and_keeps_what_was_promised(name, engine, queue):
    index, dry_run, _, demand, machine = chosen_by(name, engine, queue)
    assert len(set(index.tolist())) == len(index)
    assert set(np.flatnonzero(demand[columns.REQUIRED])) <= set(index.tolist())
    if dry_run.kept:
        again = simulate(machine, demand[:, index], 0.0, WorkBudget(10**9), run_ahead=False)
        assert again.kept
        assert np.array_equal(again.finished_at, dry_run.finished_at)
        prefill = demand[columns.LEFT][index] > 0
        assert (again.finished_at[prefill] <= demand[columns.DEADLINE][index][prefill] + 1e-9).all()
    else:
        assert (demand[columns.REQUIRED][index] == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_selecting_among_thousands_stops_at_the_work_limit(name):
    rng = np.random.default_rng(2)
    queue = [
        Item(
            prefill=float(rng.integers(50, 3000)),
            deadline_s=float(rng.uniform(0.2, 60)),
            tpot_s=float(rng.choice(TPOTS)),
            weight=float(rng.choice([1.0, 2.0])),
        )
        for _ in range(3000)
    ]
    engine = Engine(lines=LINES, token_budget=8192)
    _, _, work_budget, _, _ = chosen_by(name, engine, queue, limit=100_000)
    assert work_budget.spent <= 150_000


@pytest.mark.parametrize("name", NAMES)
def test_selection_is_repeatable(name):
    rng = np.random.default_rng(3)
    queue = [
        Item(
            prefill=float(rng.integers(50, 3000)),
            deadline_s=float(rng.uniform(0.2, 3)),
            tpot_s=float(rng.choice(TPOTS)),
        )
        for _ in range(40)
    ]
    first, second = (chosen_by(name, Engine(lines=LINES, token_budget=8192), queue) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert first[2].spent == second[2].spent


def test_nobody_to_choose_from_is_a_kept_choice():
    index, dry_run, _, _, _ = chosen_by("dp", Engine(lines=LINES, token_budget=8192), [])
    assert (len(index), dry_run.kept) == (0, True)


def test_the_rates_of_a_tight_budget_are_those_of_short_batches_back_to_back():
    demand, _ = make_demand([Item(prefill=10.0, deadline_s=1.0, tpot_s=0.1)])
    for budget in (64, 256, 16384):
        engine = Engine(lines=LINES, token_budget=budget)
        rates = reduced_model.reduced(make_machine(engine), demand, 0.0).rates
        assert rates.tolist() == pytest.approx([engine.gross_rate(0.1), engine.gross_rate(math.inf)])


def test_context_and_attention_make_a_request_dearer():
    demand, _ = make_demand([Item(prefill=1000.0, deadline_s=1.0, tpot_s=0.1)])
    deep = demand.copy()
    deep[columns.CONTEXT] = 5000.0
    machine = make_machine(Engine(lines=LINES, token_budget=8192))._replace(lines=CONTEXT.as_array())
    assert reduced_model.reduced(machine, deep, 0.0).load[0] > reduced_model.reduced(machine, demand, 0.0).load[0]
    pairs = CONTEXT.as_array()
    pairs[:, 4] = 1e-8
    machine = machine._replace(lines=pairs)
    assert (
        reduced_model.reduced(machine, deep, 0.0).cost[0] > reduced_model.reduced(machine, demand, 0.0).cost[0] > 1000
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=60))
def test_many_tiers_become_few_and_none_becomes_looser(tpots):
    periods = np.array([*tpots, math.inf])
    tiers, index = reduced_model.tiers_of(periods)
    assert 2 <= len(tiers) <= reduced_model.MAX_TIERS + 1
    assert (np.diff(tiers) > 0).all()
    assert tiers[0] == min(tpots)
    assert set(tiers) <= set(periods)
    assert (tiers[index] <= periods).all()
    assert index[-1] == len(tiers) - 1
