"""Ten defects of the published planner, one test each (a few have two); each fails on a planner that has the defect."""

import math
from itertools import product

import numpy as np
import pytest
from oracles import Engine, Item, best_set, keeps_in_batches
from referee import Referee, check_plan
from states import CONTEXT, STEPPED, TPOTS, add_decode, make_limits, make_request, make_state
from tests.core.planning.test_admission import LINES, programme

from slos_serve.core.planner import SloPlanner
from slos_serve.core.planning import draft
from slos_serve.core.types import REQUEST_DTYPE, RequestTable, Tier

ENGINE = Engine(lines=LINES, token_budget=16384)


def label_programme(items, *, better=max, own_clocks=False, pace=lambda item: item.tpot_s):
    """Return what a textbook programme over counts per tier chooses; its options are the defects.

    A label is (unspent budget, clock, chosen); of two labels with the same counts the one with the `better`
    budget stays. With `own_clocks` a label that skips a request does not earn until the next one it takes.
    """
    labels = {(): (0.0, 0.0, ())}
    for item in sorted(items, key=lambda item: item.deadline_s):
        following = {}
        for counts, (budget, clock, chosen) in labels.items():
            earned = budget + ENGINE.rate(counts) * (item.deadline_s - clock)
            skipped = (budget, clock, chosen) if own_clocks else (earned, item.deadline_s, chosen)
            taken = (earned - item.prefill, item.deadline_s, (*chosen, item))
            for key, label in ((counts, skipped), (tuple(sorted((*counts, pace(item)))), taken)):
                if label is taken and (taken[0] < 0 or ENGINE.rate(key) < 0):
                    continue
                old = following.get(key)
                following[key] = label if old is None or better(old[0], label[0]) == label[0] else old
        labels = following
    return max(labels.values(), key=lambda label: (len(label[2]), label[0]))[2]


def queues(count, seed=0, latest_s=1.2):
    """Return small queues in which not everyone fits."""
    rng = np.random.default_rng(seed)
    return [
        [
            Item(
                prefill=float(rng.integers(200, 5000)),
                deadline_s=float(rng.uniform(0.2, latest_s)),
                tpot_s=float(rng.choice([0.05, 0.1])),
            )
            for _ in range(8)
        ]
        for _ in range(count)
    ]


def admitted(items):
    return programme(ENGINE, items)[0]


def test_1_of_two_equal_sets_the_one_with_more_unspent_budget_stays():
    inverted = 0
    for items in queues(40):
        best, _ = best_set(ENGINE, items)
        assert admitted(items) == best_set(ENGINE, items, feasible=keeps_in_batches)[0]
        assert len(label_programme(items)) == best
        inverted += best - len(label_programme(items, better=min))
    assert inverted > 0


def test_2_sets_are_compared_at_one_clock():
    lost = 0
    for items in queues(40, latest_s=0.8):
        best, _ = best_set(ENGINE, items)
        assert admitted(items) == best_set(ENGINE, items, feasible=keeps_in_batches)[0]
        lost += best - len(label_programme(items, own_clocks=True))
    assert lost > 0


def test_3_a_far_deadline_does_not_make_a_tight_pace_loose():
    items = [Item(prefill=100.0, deadline_s=2.0 + 0.01 * i, tpot_s=0.03) for i in range(90)]
    by_deadline = label_programme(items, pace=lambda item: 0.1 if item.deadline_s > 1 else item.tpot_s)
    assert not keeps_in_batches(ENGINE, by_deadline)
    _, chosen = programme(ENGINE, items)
    assert keeps_in_batches(ENGINE, chosen)
    assert 0 < len(chosen) < len(by_deadline)


@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.7, 0.9])
def test_4_a_draft_of_one_token_is_worth_its_chance(acceptance):
    assert draft.expected_tokens(acceptance, 2) == pytest.approx(1 + acceptance)
    table = RequestTable()
    for i in range(4):
        add_decode(table, f"r{i}", tpot_s=0.022)  # a step alone takes 25 ms
    state = make_state(
        table, limits=make_limits(max_draft_length=1), acceptance={"chat": acceptance}, draft_lengths={"chat": 0}
    )
    assert SloPlanner().plan(state).batch.draft_lengths.tolist() == [1, 1, 1, 1]


def test_5_context_read_by_decodes_counts():
    promised = []
    for prompt in (100, 1200):
        table = RequestTable()
        for i in range(40):
            add_decode(table, f"d{i}", prompt=prompt, tpot_s=0.05)
        for i in range(40):
            table.add(make_request(f"c{i}", prompt=500, ttft_s=1.0, tpot_s=0.05))
        plan = SloPlanner(reserve=1.0).plan(make_state(table, model=CONTEXT, limits=make_limits(max_num_seqs=256)))
        promised.append(sum(v.promised for v in plan.verdicts))
    assert promised[0] > promised[1] > 0


def test_5_no_column_tells_the_planner_how_long_an_output_will_be():
    columns = {name for name in REQUEST_DTYPE.names if "output" in name}
    assert columns == {"max_output_tokens", "num_output_tokens", "predicted_output_tokens", "drawn_output_tokens"}


def test_5_best_effort_prompts_are_cut_to_what_the_promised_leave():
    table = RequestTable()
    for i in range(10):
        add_decode(table, f"d{i}", tpot_s=0.05)
    table.add(make_request("long", prompt=6000))
    plan = SloPlanner().plan(make_state(table))
    share = {entry.request_id: entry.num_tokens for entry in plan.batch.entries}
    assert 0 < share["long"] < 1000
    assert plan.batch.predicted_s <= 0.05


def test_5_a_running_set_that_cannot_be_kept_gets_a_fresh_plan():
    table = RequestTable()
    for i in range(6):
        table.add(make_request(f"r{i}", prompt=2000, ttft_s=0.4, tpot_s=0.1), tier=Tier.PROMISED)
    add_decode(table, "decode")
    state = make_state(table)
    plan = SloPlanner().plan(state)
    check_plan(state, plan)
    assert plan.at_risk
    assert plan.batch.num_tokens.sum() > 1
    later = SloPlanner().plan(make_state(table, now_s=0.05))
    assert later.at_risk


@pytest.mark.parametrize(("count", "slack_s"), list(product((8, 16, 32, 64), (0.5, 6.0))))
def test_6_a_plan_costs_bounded_work_whatever_the_slack(count, slack_s):
    rng = np.random.default_rng(count)
    table = RequestTable()
    for i in range(count):
        if i % 2:
            add_decode(table, f"r{i}", tpot_s=float(rng.choice(TPOTS[1:])))
        else:
            ttft = float(rng.uniform(0.2, slack_s))
            prompt = int(rng.integers(100, 3000))
            table.add(make_request(f"r{i}", prompt=prompt, ttft_s=ttft, tpot_s=float(rng.choice(TPOTS[1:]))))
    state = make_state(table)
    assert SloPlanner().plan(state).work <= 1.5 * state.limits.work_limit
    hurried = make_state(table, limits=make_limits(work_limit=20_000))
    plan = SloPlanner().plan(hurried)
    check_plan(hurried, plan)
    assert plan.work <= 1.5 * 20_000


def test_6_a_search_that_is_cut_off_promises_what_it_has_found():
    rng = np.random.default_rng(64)
    table = RequestTable()
    for i in range(64):
        if i % 2:
            add_decode(table, f"r{i}", tpot_s=float(rng.choice(TPOTS[1:])))
        else:
            ttft, prompt = float(rng.uniform(0.2, 6.0)), int(rng.integers(100, 3000))
            table.add(make_request(f"r{i}", prompt=prompt, ttft_s=ttft, tpot_s=float(rng.choice(TPOTS[1:]))))
    planner = SloPlanner(reserve=1.0)
    at_leisure = planner.plan(make_state(table))
    assert sum(v.promised for v in at_leisure.verdicts) >= 20
    plan = planner.plan(make_state(table, limits=make_limits(work_limit=20_000)))
    assert sum(v.promised for v in plan.verdicts) >= 10


@pytest.mark.parametrize("decodes", [8, 50, 200])
def test_7_a_short_last_batch_does_not_make_a_running_set_infeasible(decodes):
    rng = np.random.default_rng(decodes)
    for _ in range(30):
        table = RequestTable()
        for i in range(decodes):
            add_decode(table, f"d{i}", prompt=100, ahead_s=float(rng.uniform(0.0, 0.3)))
        ttft = float(rng.uniform(0.15, 0.9))
        table.add(make_request("prefill", prompt=int(500 * ttft), ttft_s=ttft, tpot_s=0.1), tier=Tier.PROMISED)
        plan = SloPlanner().plan(make_state(table, limits=make_limits(max_num_seqs=256)))
        assert plan.at_risk == ()
        assert plan.batch.num_tokens.sum() > 0


@pytest.mark.parametrize("slow", [60, 75, 90, 120])
def test_8_one_fast_decode_beside_many_slow_ones_is_promised_and_kept(slow):
    assert STEPPED.seconds(slow + 1) > 0.03 or slow < 75
    arrivals = [(make_request(f"s{i}", prompt=40, ttft_s=1.0, tpot_s=0.1), 60) for i in range(slow)]
    arrivals.append((make_request("fast", arrival_s=1.5, prompt=40, ttft_s=1.0, tpot_s=0.03), 60))
    referee = Referee(planner=SloPlanner(), limits=make_limits(max_num_seqs=256), model=STEPPED)
    referee.serve(arrivals)
    assert referee.outcomes["fast"].promised
    assert referee.broken == []


@pytest.mark.parametrize("slow", [75, 120])
def test_8_such_a_running_set_is_not_at_risk(slow):
    table = RequestTable()
    add_decode(table, "fast", tpot_s=0.03)
    for i in range(slow):
        add_decode(table, f"s{i}", tpot_s=0.1, ahead_s=0.1 * i / slow)
    assert SloPlanner().plan(make_state(table, limits=make_limits(max_num_seqs=256))).at_risk == ()


def test_9_nothing_new_and_nothing_kept_are_two_answers():
    full, broken = RequestTable(), RequestTable()
    for table, tpot in ((full, 0.1), (broken, 0.03)):
        for i in range(150):
            add_decode(table, f"d{i}", tpot_s=tpot, predicted=1000)
        table.add(make_request("new", prompt=4000, ttft_s=0.36, tpot_s=0.1))
    limits = make_limits(max_num_seqs=256, max_num_batched_tokens=8192)
    for table, at_risk in ((full, False), (broken, True)):
        plan = SloPlanner().plan(make_state(table, limits=limits))
        assert not any(v.promised for v in plan.verdicts)
        assert bool(plan.at_risk) == at_risk


def test_10_tokens_that_come_in_bursts_count_against_cumulative_deadlines():
    # No step is as short as the pace: token by token every one would be late.
    assert STEPPED.seconds(1) > 0.022
    arrivals = [
        (make_request(f"r{i}", arrival_s=0.5 * i, prompt=200, ttft_s=1.0, tpot_s=0.022, most=512), 150)
        for i in range(12)
    ]
    with_drafts = Referee(
        planner=SloPlanner(),
        limits=make_limits(max_draft_length=4),
        model=STEPPED,
        acceptance=0.8,
        rng=np.random.default_rng(0),
    )
    with_drafts.serve(arrivals)
    assert sum(outcome.promised for outcome in with_drafts.outcomes.values()) == 12
    assert with_drafts.kept_share >= 0.9


def test_10_what_a_burst_gained_is_slack():
    table = RequestTable()
    add_decode(table, "ahead", tpot_s=0.1, ahead_s=0.5)
    table.add(make_request("new", prompt=2500, ttft_s=0.26, tpot_s=0.1))
    plan = SloPlanner(reserve=1.0).plan(make_state(table, limits=make_limits(max_num_batched_tokens=8192)))
    assert [v.promised for v in plan.verdicts] == [True]
    assert math.isfinite(plan.verdicts[0].predicted_ttft_s)
