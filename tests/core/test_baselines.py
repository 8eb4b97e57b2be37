"""Each baseline does what its system is known for, and never more than the engine allows."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.baselines import (
    EdfPlanner,
    PriorityPlanner,
    SarathiPlanner,
    VllmPlanner,
    WholePromptPlanner,
    tokens_needed,
)
from slos_serve.core.perf import PerfModel
from slos_serve.core.types import Limits, ReplicaState, Request, RequestTable, Slo, Status

MODEL = PerfModel.from_terms([{"per_token_s": 1e-4, "per_context_token_s": 1e-7, "fixed_s": 0.01}])
PLANNERS = [
    VllmPlanner(token_budget=64),
    VllmPlanner(token_budget=64, draft_length=3),
    VllmPlanner(token_budget=64, chunk_limit=20, max_num_seqs=4),
    PriorityPlanner(token_budget=64, priorities={"a": 1}),
    WholePromptPlanner(token_budget=64),
    SarathiPlanner(token_budget=64),
    EdfPlanner(token_budget=64),
]


def limits(**changes):
    values = {
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 64,
        "max_model_len": 2048,
        "block_size": 16,
        "num_kv_blocks": 1000,
        "max_draft_length": 4,
    }
    return Limits(**{**values, **changes})


class World:
    """A table to fill by hand."""

    def __init__(self, **changes):
        self.table = RequestTable()
        self.limits = limits(**changes)

    def add(self, name, prompt, *, slo_class="a", tpot_s=0.1, ttft_s=1.0, arrival_s=0.0, cached=0):
        request = Request(
            request_id=name,
            arrival_s=arrival_s,
            num_prompt_tokens=prompt,
            max_output_tokens=1000,
            slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s),
            slo_class=slo_class,
        )
        index = self.table.add(request)
        self.table.rows["num_cached_tokens"][index] = cached

    def run(self, name, computed, outputs=0):
        row = self.table.rows[self.table.index(name)]
        row["status"] = Status.RUNNING
        row["num_computed_tokens"] = computed
        row["num_output_tokens"] = outputs
        row["num_kv_blocks"] = -(-computed // self.limits.block_size)

    def decode(self, name, prompt, outputs=1, **more):
        self.add(name, prompt, **more)
        self.run(name, prompt + outputs - 1, outputs)

    def state(self, now_s=0.5):
        held = int(self.table.rows["num_kv_blocks"].sum())
        return ReplicaState(
            now_s=now_s,
            requests=self.table,
            num_free_kv_blocks=self.limits.num_kv_blocks - held,
            limits=self.limits,
            perf_model=MODEL,
        )


def batch_of(planner, world):
    plan = planner.plan(world.state())
    return [(entry.request_id, entry.num_tokens) for entry in plan.batch.entries]


def test_vllm_serves_decodes_then_the_started_prompt_then_waiting_ones_in_order_of_arrival():
    world = World()
    world.decode("decode", 30)
    world.add("started", 100)
    world.run("started", 64)
    world.add("first", 20)
    world.add("second", 50)
    assert batch_of(VllmPlanner(token_budget=80), world) == [
        ("decode", 1),
        ("started", 36),
        ("first", 20),
        ("second", 23),
    ]


def test_vllm_cuts_every_prompt_at_the_long_prefill_threshold():
    world = World()
    world.add("a", 100)
    world.add("b", 30)
    assert batch_of(VllmPlanner(token_budget=128, chunk_limit=40), world) == [("a", 40), ("b", 30)]


def test_vllm_admits_no_more_than_its_seats():
    world = World(max_num_seqs=2)
    for name in "abc":
        world.add(name, 10)
    assert [name for name, _ in batch_of(VllmPlanner(), world)] == ["a", "b"]
    assert [name for name, _ in batch_of(VllmPlanner(max_num_seqs=1), world)] == ["a"]


def test_a_prompt_whose_blocks_do_not_fit_keeps_everyone_behind_it_waiting():
    world = World(num_kv_blocks=10)
    world.add("fits", 64)
    world.add("too-long", 200)
    world.add("short", 10)
    assert batch_of(VllmPlanner(), world) == [("fits", 64)]


def test_running_out_of_blocks_preempts_the_last_running_request_and_admits_nobody():
    world = World(num_kv_blocks=8)
    world.decode("old", 64)
    world.decode("new", 64)
    world.add("waiting", 1)
    plan = VllmPlanner().plan(world.state())
    assert plan.batch.preempted == ["new"]
    assert [entry.request_id for entry in plan.batch.entries] == ["old"]


def test_a_request_that_cannot_get_a_block_and_is_last_preempts_itself():
    world = World(num_kv_blocks=4)
    world.decode("only", 64)
    plan = VllmPlanner().plan(world.state())
    assert plan.batch.preempted == ["only"]
    assert not plan.batch.entries


def test_a_prefix_hit_is_not_computed_again_but_needs_its_blocks():
    world = World()
    world.add("hit", 100, cached=64)
    assert batch_of(VllmPlanner(), world) == [("hit", 36)]
    world = World(num_kv_blocks=6)  # its 100 tokens take 7
    world.add("hit", 100, cached=64)
    assert batch_of(VllmPlanner(), world) == []


def test_a_preempted_request_recomputes_its_own_output_too():
    world = World()
    world.add("back", 50)
    world.table.rows["num_output_tokens"][0] = 7
    assert batch_of(VllmPlanner(), world) == [("back", 57)]


def test_fixed_drafts_go_to_decodes_only_and_count_against_the_budget():
    world = World()
    world.decode("decode", 30)
    world.add("prompt", 40)
    plan = VllmPlanner(token_budget=20, draft_length=3).plan(world.state())
    assert [(e.request_id, e.num_tokens, e.draft_length) for e in plan.batch.entries] == [
        ("decode", 1, 3),
        ("prompt", 16, 0),
    ]


def test_the_last_allowed_token_is_not_drafted_beyond():
    world = World()
    world.decode("nearly", 30, outputs=998)
    plan = VllmPlanner(draft_length=4).plan(world.state())
    assert plan.batch.entries[0].draft_length == 1


def test_priority_serves_the_smaller_number_first_and_preempts_from_the_other_end():
    world = World(num_kv_blocks=8)
    world.decode("batch", 64, slo_class="bulk")
    world.decode("chat", 64, slo_class="chat")
    plan = PriorityPlanner(priorities={"chat": 0, "bulk": 9}).plan(world.state())
    assert plan.batch.preempted == ["batch"]
    assert [entry.request_id for entry in plan.batch.entries] == ["chat"]


def test_priority_ranks_unlisted_classes_by_tight_tpot():
    world = World()
    world.add("loose", 10, slo_class="x", tpot_s=0.1)
    world.add("tight", 10, slo_class="y", tpot_s=0.05)
    assert [name for name, _ in batch_of(PriorityPlanner(), world)] == ["tight", "loose"]


def test_whole_prompts_run_alone_and_decodes_wait():
    world = World(max_model_len=128)
    world.decode("decode", 30)
    world.add("a", 60)
    world.add("b", 60)
    world.add("c", 60)
    assert batch_of(WholePromptPlanner(token_budget=128), world) == [("a", 60), ("b", 60)]


def test_whole_prompts_let_decodes_run_when_no_prompt_fits():
    world = World(num_kv_blocks=6)
    world.decode("decode", 30)
    world.add("a", 100)
    assert batch_of(WholePromptPlanner(), world) == [("decode", 1)]


def test_sarathi_fills_the_step_up_to_the_tightest_tpot():
    world = World()
    for i in range(8):
        world.decode(f"d{i}", 100, tpot_s=0.05)
    world.add("prompt", 2000, tpot_s=0.1)
    plan = SarathiPlanner().plan(world.state())
    tokens = int(plan.batch.num_tokens.sum())
    seconds = MODEL.seconds(tokens, 9, context_tokens=800)
    assert seconds <= 0.05
    assert MODEL.seconds(tokens + 1, 9, context_tokens=800) > 0.05


def test_edf_gives_the_prompt_that_is_due_first_the_tokens_of_a_started_one():
    world = World()
    world.add("started", 500, ttft_s=9.0)
    world.run("started", 100)
    world.add("urgent", 50, ttft_s=0.6)
    assert batch_of(EdfPlanner(token_budget=64), world) == [("started", 14), ("urgent", 50)]


def test_edf_serves_what_is_late_last():
    world = World()
    world.add("late", 50, ttft_s=0.1)
    world.add("in-time", 50, ttft_s=2.0)
    assert [name for name, _ in batch_of(EdfPlanner(token_budget=64), world)] == ["in-time", "late"]


@st.composite
def worlds(draw):
    world = World(num_kv_blocks=draw(st.integers(8, 60)), max_num_seqs=draw(st.integers(1, 12)), max_model_len=256)
    free = world.limits.num_kv_blocks
    running = 0
    for i in range(draw(st.integers(0, 14))):
        prompt = draw(st.integers(1, 120))
        world.add(f"r{i}", prompt, slo_class=draw(st.sampled_from("abc")), ttft_s=draw(st.floats(0.1, 5.0)))
        outputs = draw(st.integers(0, 40))
        computed = draw(st.integers(1, prompt)) if outputs == 0 else prompt + outputs - 1
        computed = min(computed, prompt + outputs - 1)
        blocks = -(-computed // 16)
        if draw(st.booleans()) and running < world.limits.max_num_seqs and 0 < blocks <= free:
            world.run(f"r{i}", computed, outputs)
            free -= blocks
            running += 1
    return world


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: type(planner).__name__)
@settings(max_examples=60, deadline=None)
@given(world=worlds())
def test_no_plan_exceeds_tokens_seats_or_blocks_and_the_state_is_left_alone(planner, world):
    state = world.state()
    before = json.dumps(state.to_json())
    plan = planner.plan(state)
    assert json.dumps(state.to_json()) == before
    assert plan.verdicts == ()
    rows, limit = world.table.rows, world.limits
    index = [world.table.index(name) for name in plan.batch.request_ids]
    assert len(set(index)) == len(index)
    assert not set(plan.batch.request_ids) & set(plan.batch.preempted)
    chosen = rows[index]
    tokens, drafts = plan.batch.num_tokens, plan.batch.draft_lengths
    assert (tokens > 0).all()
    assert (tokens <= tokens_needed(chosen)).all()
    assert (drafts >= 0).all()
    budget = 256 if isinstance(planner, WholePromptPlanner) else 64
    assert int((tokens + drafts).sum()) <= budget
    running = set(np.flatnonzero(rows["status"] == Status.RUNNING).tolist())
    lost = {world.table.index(name) for name in plan.batch.preempted}
    assert lost <= running
    assert len((running | set(index)) - lost) <= limit.max_num_seqs or set(index) <= running
    start = np.where(chosen["num_computed_tokens"] == 0, chosen["num_cached_tokens"], chosen["num_computed_tokens"])
    extra = np.maximum(-(-(start + tokens + drafts) // 16) - chosen["num_kv_blocks"], 0)
    freed = int(rows["num_kv_blocks"][sorted(lost)].sum())
    assert int(extra.sum()) <= state.num_free_kv_blocks + freed


def test_an_empty_table_gives_an_empty_plan():
    for planner in PLANNERS:
        assert not planner.plan(World().state()).batch.entries


def test_sarathi_without_any_tpot_uses_its_upper_limit():
    world = World()
    world.add("free", 1000, tpot_s=None)
    assert math.isinf(world.table.rows["tpot_s"][0])
    assert batch_of(SarathiPlanner(token_budget=300), world) == [("free", 300)]
