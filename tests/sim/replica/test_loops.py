"""The compiled loops do what the engine's own rules and the grader of streams do."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.worlds import sim

from slos_serve.core.jit import jit
from slos_serve.core.slo.deadlines import StreamGrader, feed_stream
from slos_serve.core.types import BatchPlan, Limits, Slo, Status
from slos_serve.sim.replica import loops
from slos_serve.sim.replica.engine import Engine

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
        engine.add(request, cached_tokens=0, session_id="")
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
    one = compiled.start(plan)
    two = plain._start_in_part(plain.table.find(plan.request_ids), plan.num_tokens, plan.draft_lengths)
    assert (compiled.table.rows == plain.table.rows).all()
    assert (compiled.pool.num_free, compiled.num_preemptions) == (plain.pool.num_free, plain.num_preemptions)
    assert (one is None) == (two is None)
    if one is not None:
        assert one.rows.tolist() == two.rows.tolist()
        assert one.batch.tolist() == two.batch.tolist()
        assert one.totals[: loops.NUM_NEW] == two.totals[: loops.NUM_NEW]


def state_of(row):
    return tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in row.item()[:-2])


@jit
def feed_row(live, row, time_s, num_tokens, num_thinking):
    feed_stream(live[row], time_s, num_tokens, num_thinking)


promises = st.one_of(st.none(), st.floats(0.01, 2.0))


@settings(deadline=None, max_examples=300)
@given(
    slo=st.builds(Slo, ttft_s=promises, tpot_s=promises, thinking_tpot_s=promises, e2e_s=promises, max_gap_s=promises),
    thinks=st.booleans(),
    thinking=st.integers(0, 40),
    chunks=st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 14)), max_size=40),
)
def test_a_row_is_graded_as_its_stream(slo, thinks, thinking, chunks):
    grader = StreamGrader(5.0, slo, thinks)
    live = np.zeros(2, loops.LIVE_DTYPE)
    live[1] = (*grader.state, 0, 0)
    at_s, produced = 5.0, 0
    for gap_s, tokens in chunks:
        at_s += gap_s
        new_thinking = min(produced + tokens, thinking) - min(produced, thinking)
        produced += tokens
        grader.feed(at_s, tokens, new_thinking)
        feed_row(live, 1, at_s, tokens, new_thinking)
        assert state_of(live[1]) == grader.state
    copy = StreamGrader(5.0, slo, thinks)
    copy.state = state_of(live[1])
    assert copy.finish(at_s) == grader.finish(at_s)
    assert not live[0]["num_output_tokens"]
