"""The compiled start of a step does what the engine's own rules do, or leaves the batch to them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.worlds import sim

from slos_serve.core.types import BatchPlan, Limits, Status
from slos_serve.sim.engine import Engine

LIMITS = Limits(
    max_num_batched_tokens=64, max_num_seqs=8, max_model_len=100, block_size=4, num_kv_blocks=60, max_draft_length=4
)


@st.composite
def batches(draw):
    """Draw live requests (status, prompt, outputs, computed, blocks) and a batch of some of them."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, outputs = draw(st.integers(1, 40)), draw(st.integers(0, 12))
        computed = prompt + outputs - 1 if outputs and draw(st.booleans()) else draw(st.integers(0, prompt - 1))
        runs = draw(st.integers(0, 9)) > 0
        blocks = -(-computed // 4) + draw(st.integers(0, 1)) if runs else 0
        rows.append((runs, prompt, outputs, computed if runs else 0, min(blocks, 12)))
    chosen = draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True))
    tokens = draw(st.lists(st.integers(1, 50), min_size=len(chosen), max_size=len(chosen)))
    drafts = draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen)))
    return rows, chosen, tokens, drafts


def engine_of(rows):
    engine = Engine(LIMITS)
    for i, (runs, prompt, outputs, computed, blocks) in enumerate(rows):
        request = sim(f"r{i}", prompt, 30).request
        engine.add(request, predicted_output_tokens=30.0, cached_tokens=0, session_id="")
        row = engine.table.rows[i]
        row["num_output_tokens"], row["num_computed_tokens"] = outputs, computed
        if runs:
            row["status"] = Status.RUNNING
            row["num_kv_blocks"] = blocks
            engine.pool.take(blocks)
    return engine


@settings(deadline=None, max_examples=300)
@given(batches())
def test_a_batch_starts_alike_compiled_and_by_the_engines_rules(drawn):
    rows, chosen, tokens, drafts = drawn
    plan = BatchPlan(
        request_ids=tuple(f"r{i}" for i in chosen),
        num_tokens=np.array(tokens, np.int64),
        draft_lengths=np.array(drafts, np.int64),
    )
    compiled, plain = engine_of(rows), engine_of(rows)
    plain._start_all = lambda *_: None
    one, two = compiled.start(plan), plain.start(plan)
    assert (compiled.table.rows == plain.table.rows).all()
    assert (compiled.pool.num_free, compiled.num_preemptions) == (plain.pool.num_free, plain.num_preemptions)
    assert (one is None) == (two is None)
    if one is not None:
        assert one.shape() == two.shape()
        for name in ("rows", "start", "tokens", "drafts", "emits", "is_decode", "outputs_before"):
            assert getattr(one, name).tolist() == getattr(two, name).tolist()
