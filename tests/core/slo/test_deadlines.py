"""Token streams are graded as the contract's rules say, in one pass and constant memory."""

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.core.slo.deadlines import (
    OUTCOMES,
    TOLERANCE_S,
    Grade,
    StreamGrader,
    due_s,
    granted_s,
    outcome,
)
from slos_serve.core.slo.next_due import next_due_s, pace_s
from slos_serve.core.types import Request, RequestTable, Slo

ARRIVAL = 100.0


def grade_all(times, num_thinking, slo, arrival=ARRIVAL):
    """Grade a stored stream (one time per token) by the text of the rules, with no cleverness."""
    n = len(times)
    tpot = math.inf if slo.tpot_s is None else slo.tpot_s
    thinking_tpot = tpot if slo.thinking_tpot_s is None else slo.thinking_tpot_s
    relative = [time - arrival for time in times]

    def budget(first, last):
        """Sum what the tokens first..last (1-based, of those after token 1) are granted."""
        return sum(thinking_tpot if m - 1 <= num_thinking else tpot for m in range(max(first, 2), last + 1))

    start = relative[0] if slo.ttft_s is None else max(slo.ttft_s, relative[0])

    def late(m):
        return m >= 2 and relative[m - 1] > start + budget(2, m) + TOLERANCE_S

    prefill_late = slo.ttft_s is not None and relative[0] > slo.ttft_s + TOLERANCE_S
    e2e_late = slo.e2e_s is not None and relative[-1] > slo.e2e_s + TOLERANCE_S
    checked = [m for m in range(2, n + 1) if m % 10 == 0 or m == n]
    late_tokens = set(filter(late, checked))
    gap_tokens = set()
    if slo.max_gap_s is not None:
        gap_tokens = {m + 1 for m in range(1, n) if relative[m] - relative[m - 1] > slo.max_gap_s + TOLERANCE_S}
    mean_late = relative[-1] - relative[0] > budget(2, n) + TOLERANCE_S
    window_late = (
        mean_late
        if n <= 10
        else any(relative[m - 1] - relative[m - 11] > budget(m - 9, m) + TOLERANCE_S for m in range(11, n + 1))
    )
    shared = prefill_late or e2e_late or bool(gap_tokens)
    bad = late_tokens | gap_tokens
    thinking_bad = any(m <= num_thinking for m in bad)
    gapped = slo.max_gap_s is not None

    def stage(promised, is_late):
        return ("missed" if is_late else "met") if promised else ""

    slack = {"prefill": math.inf if slo.ttft_s is None else slo.ttft_s - relative[0]}
    for name, which in (("thinking", range(2, num_thinking + 1)), ("answer", range(num_thinking + 1, n + 1))):
        spare = [start + budget(2, m) - relative[m - 1] for m in checked if m in which]
        slack[name] = min(spare, default=math.inf)

    return {
        "met": not (shared or late_tokens),
        "met_mean_tpot": not (shared or mean_late),
        "met_window": not (shared or window_late),
        "stages": {
            "prefill": stage(slo.ttft_s is not None, prefill_late),
            "thinking": stage(num_thinking and (gapped or thinking_tpot < math.inf), thinking_bad),
            "answer": stage(n > num_thinking and (gapped or tpot < math.inf), any(m > num_thinking for m in bad)),
        },
        "least_slack_s": pytest.approx({name: spare for name, spare in slack.items() if spare < math.inf}),
    }


def summary(grade: Grade):
    return {
        "met": grade.met,
        "met_mean_tpot": grade.met_mean_tpot,
        "met_window": grade.met_window,
        "stages": dict(grade.stages),
        "least_slack_s": dict(grade.least_slack_s),
    }


def feed_chunks(chunks, slo, thinks, arrival=ARRIVAL):
    grader = StreamGrader(arrival, slo, thinks)
    time = arrival
    for wait, count, thinking in chunks:
        time += wait
        grader.feed(time, count, thinking)
    return grader, time


def spread(chunks, arrival=ARRIVAL):
    """Return the time of each token and the number of thinking tokens that lead the stream."""
    times, flags = [], []
    time = arrival
    for wait, count, thinking in chunks:
        time += wait
        times += [time] * count
        flags += [True] * thinking + [False] * (count - thinking)
    return times, len(list(itertools.takewhile(bool, flags)))


promise = st.none() | st.sampled_from([0.02, 0.05, 0.1, 0.3])
slos = st.builds(
    Slo,
    ttft_s=st.none() | st.sampled_from([0.1, 0.5, 2.0]),
    tpot_s=promise,
    thinking_tpot_s=promise,
    e2e_s=st.none() | st.sampled_from([0.5, 1.5, 4.0]),
    max_gap_s=st.none() | st.sampled_from([0.15, 0.4]),
)


@st.composite
def streams(draw, max_chunk=25):
    """Chunks of (wait, tokens, thinking tokens): whole seconds in 1/64 so that sums are exact."""
    thinking_left = draw(st.integers(0, 40))
    chunks = []
    for _ in range(draw(st.integers(1, 40))):
        wait = draw(st.integers(0, 30)) / 64
        count = draw(st.integers(1, draw(st.sampled_from([1, 4, max_chunk]))))
        thinking = min(thinking_left, count)
        thinking_left -= thinking
        chunks.append((wait, count, thinking))
    return chunks


@settings(max_examples=400, deadline=None)
@given(streams(), slos)
def test_one_pass_agrees_with_the_rules_applied_to_the_whole_stream(chunks, slo):
    grader, end = feed_chunks(chunks, slo, thinks=True)
    times, num_thinking = spread(chunks)
    grade = grader.finish(end + 1.0)
    assert summary(grade) == grade_all(times, num_thinking, slo)
    assert grade.num_output_tokens == len(times)
    assert grade.ttft_s == times[0] - ARRIVAL
    assert grade.e2e_s == times[-1] - ARRIVAL
    assert grade.tpot_s == pytest.approx((times[-1] - times[0]) / max(len(times) - 1, 1))


@settings(max_examples=200, deadline=None)
@given(streams(), slos)
def test_tokens_of_a_chunk_fed_one_by_one_at_its_time_grade_alike(chunks, slo):
    whole, end = feed_chunks(chunks, slo, thinks=True)
    single = [(wait if i == 0 else 0.0, 1, int(i < thinking)) for wait, count, thinking in chunks for i in range(count)]
    apart, _ = feed_chunks(single, slo, thinks=True)
    assert apart.finish(end) == whole.finish(end)
    assert (apart.first_token_s, apart.last_token_s) == (whole.first_token_s, whole.last_token_s)


@settings(max_examples=200, deadline=None)
@given(streams(max_chunk=3), slos)
def test_missed_is_never_taken_back_and_the_grade_agrees_with_it(chunks, slo):
    grader = StreamGrader(ARRIVAL, slo, thinks=True)
    time, seen = ARRIVAL, False
    for wait, count, thinking in chunks:
        time += wait
        grader.feed(time, count, thinking)
        assert grader.missed or not seen
        seen = grader.missed
    grade = grader.finish(time)
    assert grade.met is not grader.missed
    assert not (seen and grade.met)


@settings(max_examples=100, deadline=None)
@given(streams(max_chunk=3), slos, st.floats(1.0, 3.0))
def test_loosening_every_promise_never_turns_met_into_missed(chunks, slo, factor):
    looser = Slo(**{name: value and value * factor for name, value in slo.items()})
    strict, end = feed_chunks(chunks, slo, thinks=True)
    loose, _ = feed_chunks(chunks, looser, thinks=True)
    before, after = strict.finish(end), loose.finish(end)
    assert (after.met, after.met_mean_tpot, after.met_window) >= (before.met, before.met_mean_tpot, before.met_window)


def tokens(grader, start, gap, count, thinking=0):
    for i in range(count):
        grader.feed(start + i * gap, 1, int(i < thinking))
    return start + (count - 1) * gap


def test_time_gained_before_the_ttft_deadline_is_kept_for_the_tokens():
    slo = Slo(ttft_s=2.0, tpot_s=0.1)
    grader = StreamGrader(ARRIVAL, slo)
    end = tokens(grader, ARRIVAL + 0.5, 0.15, 20)  # slower than TPOT, but 1.5 s ahead
    grade = grader.finish(end)
    assert grade.met
    assert not grade.met_mean_tpot
    assert not grade.met_window


def test_a_late_first_token_starts_the_clock_of_tpot_when_it_comes():
    slo = Slo(ttft_s=1.0, tpot_s=0.1)
    grader = StreamGrader(ARRIVAL, slo)
    grader.feed(ARRIVAL + 3.0, 1)
    assert grader.missed
    end = tokens(grader, ARRIVAL + 3.1, 0.1, 20)
    grade = grader.finish(end)
    assert grade.stages == {"prefill": "missed", "thinking": "", "answer": "met"}
    assert not grade.met


def test_without_a_ttft_promise_tpot_counts_from_the_first_token():
    grader = StreamGrader(ARRIVAL, Slo(tpot_s=0.1))
    grader.feed(ARRIVAL + 50.0, 1)
    grader.feed(ARRIVAL + 50.9, 8)
    grader.feed(ARRIVAL + 50.9 + 0.001, 1)
    assert grader.missed is True  # token 10 is due 0.9 s after the first
    assert grader.finish(0.0).stages == {"prefill": "", "thinking": "", "answer": "missed"}


def test_between_checks_a_token_may_be_late_unless_it_is_the_last():
    def run(count):
        grader = StreamGrader(ARRIVAL, Slo(ttft_s=0.5, tpot_s=0.1))
        grader.feed(ARRIVAL + 0.5, 1)
        grader.feed(ARRIVAL + 0.5 + 0.85, count - 1)  # token 9 is due after 0.8 s, token 10 after 0.9 s
        return grader

    assert run(10).finish(0.0).met
    nine = run(9)
    assert not nine.missed
    assert not nine.finish(0.0).met


def test_a_token_due_at_the_very_moment_is_on_time_on_a_wall_clock():
    arrival = 1_790_000_000.123456
    slo = Slo(ttft_s=0.1, tpot_s=0.05, e2e_s=0.1 + 0.05 * 99, max_gap_s=0.05)
    grader = StreamGrader(arrival, slo)
    for n in range(100):
        grader.feed(arrival + 0.1 + 0.05 * n, 1)
    grade = grader.finish(arrival + 10)
    assert grade.met
    assert grade.met_mean_tpot
    assert grade.met_window


def test_thinking_tokens_have_their_own_pace_and_stage():
    slo = Slo(ttft_s=1.0, tpot_s=0.1, thinking_tpot_s=0.05)
    grader = StreamGrader(ARRIVAL, slo, thinks=True)
    end = tokens(grader, ARRIVAL + 1.0, 0.05, 30, thinking=30)
    for i in range(1, 31):
        grader.feed(end + 0.1 * i - 0.05, 1)
    assert grader.finish(0.0).stages == {"prefill": "met", "thinking": "met", "answer": "met"}
    slow = StreamGrader(ARRIVAL, slo, thinks=True)
    tokens(slow, ARRIVAL + 1.0, 0.1, 30, thinking=30)
    assert slow.finish(0.0).stages == {"prefill": "met", "thinking": "missed", "answer": ""}


def test_thinking_without_a_pace_of_its_own_keeps_the_tpot():
    grader = StreamGrader(ARRIVAL, Slo(tpot_s=0.05), thinks=True)
    tokens(grader, ARRIVAL, 0.1, 30, thinking=30)
    assert grader.missed


def test_an_answer_without_tpot_is_never_late_after_paced_thinking():
    grader = StreamGrader(ARRIVAL, Slo(thinking_tpot_s=0.05), thinks=True)
    tokens(grader, ARRIVAL, 0.05, 15, thinking=15)
    grader.feed(ARRIVAL + 1000.0, 40)
    grade = grader.finish(ARRIVAL + 1000.0)
    assert grade.met
    assert grade.stages == {"prefill": "", "thinking": "met", "answer": ""}


def test_thinking_counts_are_ignored_where_the_request_does_not_think_or_has_ended_thinking():
    slo = Slo(tpot_s=0.2, thinking_tpot_s=0.01)
    plain = StreamGrader(ARRIVAL, slo)
    tokens(plain, ARRIVAL, 0.1, 20, thinking=20)
    assert not plain.missed
    answered = StreamGrader(ARRIVAL, slo, thinks=True)
    answered.feed(ARRIVAL, 2, 1)
    tokens(answered, ARRIVAL + 0.1, 0.1, 20, thinking=20)
    assert not answered.missed


def test_end_to_end_is_missed_as_soon_as_a_token_comes_after_it():
    grader = StreamGrader(ARRIVAL, Slo(e2e_s=1.0))
    grader.feed(ARRIVAL + 0.9, 5)
    assert not grader.missed
    grader.feed(ARRIVAL + 1.1, 1)
    assert grader.missed
    grade = grader.finish(ARRIVAL + 1.1)
    assert (grade.met, grade.met_mean_tpot, grade.met_window) == (False, False, False)
    assert grade.stages == {"prefill": "", "thinking": "", "answer": ""}


def test_a_silence_longer_than_max_gap_is_missed_even_with_slack():
    grader = StreamGrader(ARRIVAL, Slo(ttft_s=60.0, tpot_s=1.0, max_gap_s=0.5))
    grader.feed(ARRIVAL + 10.0, 5)  # the wait for the first token is no gap
    grader.feed(ARRIVAL + 10.6, 1)
    assert grader.missed
    assert grader.finish(ARRIVAL + 11).stages["answer"] == "missed"


def test_without_promises_everything_is_met():
    grader = StreamGrader(ARRIVAL, Slo())
    grader.feed(ARRIVAL + 1e6, 3)
    grade = grader.finish(ARRIVAL + 2e6)
    assert grade.met
    assert grade.met_mean_tpot
    assert grade.met_window
    assert set(grade.stages.values()) == {""}


def test_a_stream_that_ends_without_a_token_is_missed_only_if_a_deadline_passed():
    slo = Slo(ttft_s=1.0, tpot_s=0.1)
    early = StreamGrader(ARRIVAL, slo).finish(ARRIVAL + 0.5)
    assert early.met
    assert early.stages["prefill"] == ""
    assert early.ttft_s == math.inf
    late = StreamGrader(ARRIVAL, slo).finish(ARRIVAL + 1.5)
    assert not late.met
    assert late.stages["prefill"] == "missed"
    assert not StreamGrader(ARRIVAL, Slo(e2e_s=1.0)).finish(ARRIVAL + 1.5).met


def test_one_output_token_counts_as_a_tpot_of_zero():
    grader = StreamGrader(ARRIVAL, Slo(ttft_s=1.0, tpot_s=0.01))
    grader.feed(ARRIVAL + 0.9, 1)
    grade = grader.finish(ARRIVAL + 5.0)
    assert grade.tpot_s == 0.0
    assert grade.met
    assert grade.met_mean_tpot
    assert grade.met_window


def test_empty_chunks_change_nothing():
    grader = StreamGrader(ARRIVAL, Slo(ttft_s=0.1))
    grader.feed(ARRIVAL + 5.0, 0)
    assert not grader.missed
    assert grader.first_token_s == math.inf
    assert grader.last_token_s == math.inf


def test_a_grader_needs_no_more_memory_for_a_longer_stream():
    def size(count):
        grader = StreamGrader(ARRIVAL, Slo(ttft_s=1, tpot_s=0.1, max_gap_s=1.0), thinks=True)
        tokens(grader, ARRIVAL, 0.01, count)
        values = [getattr(grader, name) for name in grader.__slots__]
        return sum(sys.getsizeof(value) for value in values if isinstance(value, list)), len(grader.ring)

    assert size(20) == size(20_000)


def test_due_times_follow_the_formula():
    slo = Slo(ttft_s=1.0, tpot_s=0.1, thinking_tpot_s=0.05)
    assert due_s(1, 10.0, math.inf, slo) == 11.0
    assert due_s(2, 10.0, 10.5, slo) == pytest.approx(11.1)
    assert due_s(21, 10.0, 12.0, slo, num_thinking_tokens=5) == pytest.approx(12.0 + 5 * 0.05 + 15 * 0.1)
    assert due_s(1, 10.0, math.inf, Slo(tpot_s=0.1)) == math.inf
    assert due_s(11, 10.0, 12.0, Slo(tpot_s=0.1)) == pytest.approx(13.0)
    assert due_s(5, 10.0, 12.0, Slo(ttft_s=1.0)) == math.inf
    assert granted_s(1, 0, math.inf, math.inf) == 0.0


def a_grade(met):
    grader = StreamGrader(0.0, Slo(ttft_s=1.0))
    grader.feed(0.5 if met else 1.5, 1)
    return grader.finish(2.0)


@pytest.mark.parametrize(
    ("kwargs", "met", "expected"),
    [
        ({"has_slo": True, "promised": True}, True, "met"),
        ({"has_slo": True, "promised": True}, False, "missed"),
        ({"has_slo": True, "promised": False}, True, "declined"),
        ({"has_slo": True, "promised": False}, False, "declined"),
        ({"has_slo": True, "promised": True, "cancelled": True}, True, "cancelled"),
        ({"has_slo": True, "promised": True, "failed": True}, True, "failed"),
        ({"has_slo": True, "promised": False, "rejected": True}, None, "rejected"),
        ({"has_slo": True, "promised": True}, None, "failed"),
        ({"has_slo": False, "promised": False}, True, "none"),
        ({"has_slo": False, "promised": False, "cancelled": True}, True, "none"),
    ],
)
def test_every_request_ends_in_one_outcome(kwargs, met, expected):
    grade = None if met is None else a_grade(met)
    assert outcome(grade, **kwargs) == expected
    assert expected in OUTCOMES


def table_with(slo, *, produced=0, thinking=0, first=math.inf, last=math.inf, predicted=100.0, thinks=False):
    table = RequestTable()
    table.add(
        Request(
            request_id="a",
            arrival_s=ARRIVAL,
            num_prompt_tokens=10,
            max_output_tokens=1000,
            slo=slo,
            slo_class="c",
            thinks=thinks,
        ),
        predicted_output_tokens=predicted,
    )
    row = table.rows[0]
    row["num_output_tokens"], row["num_thinking_tokens"] = produced, thinking
    row["first_token_s"], row["last_token_s"] = first, last
    row["is_thinking"] = int(thinks and thinking == produced)
    return table.rows


@settings(max_examples=200, deadline=None)
@given(slos, st.integers(0, 60), st.integers(0, 60), st.floats(0.0, 5.0), st.booleans())
def test_the_next_token_of_a_row_is_due_when_the_formula_says(slo, produced, thinking, first, thinks):
    slo = Slo(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, thinking_tpot_s=slo.thinking_tpot_s)
    thinking = min(thinking, produced) if thinks else 0
    first_token_s = ARRIVAL + first if produced else math.inf
    with np.errstate(all="raise"):
        rows = table_with(
            slo, produced=produced, thinking=thinking, first=first_token_s, last=ARRIVAL + 9, thinks=thinks
        )
        due = next_due_s(rows)
    assert due.shape == (1,)
    assert due[0] == pytest.approx(due_s(produced + 1, ARRIVAL, first_token_s, slo, thinking))


def test_a_gap_promise_bounds_the_next_token_once_there_is_one():
    slo = Slo(ttft_s=5.0, tpot_s=1.0, max_gap_s=0.5)
    assert next_due_s(table_with(slo))[0] == ARRIVAL + 5.0
    rows = table_with(slo, produced=3, first=ARRIVAL + 1, last=ARRIVAL + 2)
    assert next_due_s(rows)[0] == ARRIVAL + 2.5


@settings(max_examples=100, deadline=None)
@given(
    slos,
    st.tuples(st.integers(1, 200), st.integers(0, 250)),
    st.floats(0.01, 0.4),
    st.sampled_from([0.0, 0.01]),
    st.booleans(),
)
def test_no_token_is_due_after_an_end_to_end_deadline(slo, tokens, first, min_token_s, thinks):
    predicted, produced = tokens
    slo = Slo(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, e2e_s=2.0, max_gap_s=slo.max_gap_s)
    first_token_s = ARRIVAL + first if produced else math.inf
    last = first_token_s + 0.01
    with np.errstate(all="raise"):
        rows = table_with(
            slo, produced=produced, first=first_token_s, last=last, predicted=float(predicted), thinks=thinks
        )
        due = next_due_s(rows, min_token_s)[0]
        assert due <= ARRIVAL + 2.0 + 1e-9
        assert pace_s(rows)[0] >= 0.0


def test_behind_every_token_of_an_end_to_end_promise_the_predicted_rest_still_fits():
    slo = Slo(e2e_s=10.1)
    rows = table_with(slo, produced=1, first=ARRIVAL + 1, last=ARRIVAL + 1, predicted=101.0)
    assert pace_s(rows)[0] == pytest.approx(0.05)
    assert next_due_s(rows)[0] == pytest.approx(ARRIVAL + 10.1 - 99 * 0.05)
    rows["num_output_tokens"], rows["last_token_s"] = 51, ARRIVAL + 2  # far ahead: the gain is kept
    assert next_due_s(rows)[0] == pytest.approx(ARRIVAL + 10.1 - 49 * 0.05)
    rows["num_output_tokens"] = 100
    assert next_due_s(rows)[0] == pytest.approx(ARRIVAL + 10.1)
    rows["num_output_tokens"] = 150  # longer than predicted: any token may be the last
    assert next_due_s(rows)[0] == pytest.approx(ARRIVAL + 10.1)


def test_before_the_first_token_an_end_to_end_promise_leaves_room_for_the_others():
    alone = table_with(Slo(e2e_s=10.0), predicted=100.0)
    assert next_due_s(alone)[0] == pytest.approx(ARRIVAL + 10 - 99 * 0.05)
    paced = table_with(Slo(e2e_s=10.0, tpot_s=0.02), predicted=100.0)
    assert next_due_s(paced)[0] == pytest.approx(ARRIVAL + 10 - 99 * 0.02)
    assert next_due_s(alone, min_token_s=0.08)[0] == pytest.approx(ARRIVAL + 10 - 99 * 0.08)
    assert next_due_s(table_with(Slo(ttft_s=0.3, e2e_s=10.0)))[0] == pytest.approx(ARRIVAL + 0.3)


def test_the_pace_of_a_row_is_that_of_its_span():
    slo = Slo(tpot_s=0.1, thinking_tpot_s=0.05)
    assert pace_s(table_with(slo, produced=5, thinking=5, first=ARRIVAL, last=ARRIVAL, thinks=True))[0] == 0.05
    assert pace_s(table_with(slo, produced=5, thinking=4, first=ARRIVAL, last=ARRIVAL, thinks=True))[0] == 0.1
    assert pace_s(table_with(Slo(ttft_s=1.0)))[0] == math.inf


def test_deadlines_of_no_rows_are_no_deadlines():
    rows = RequestTable().rows
    assert next_due_s(rows).shape == (0,)
    assert pace_s(rows).shape == (0,)
