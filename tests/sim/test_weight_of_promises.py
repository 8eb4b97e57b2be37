"""From end to end: what a kept promise costs the others is the work that it is, whatever its numbers."""

import math

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tests.sim.worlds import MODEL, hardware, sim, workload

from slos_serve.core.planner import SloPlanner
from slos_serve.core.types import Slo
from slos_serve.sim.run import run_workload

YEARS_30 = 30 * 365 * 86_400.0
seconds = st.floats(math.log(1e-6), math.log(YEARS_30)).map(math.exp)
PROMPT, OUTPUT = 40, 60


def serve(*arrivals):
    result = run_workload(workload(*arrivals), SloPlanner(), hardware())
    return {grade.slo_class: grade for grade in result.graded}


def free(count=6):
    return [sim(f"free{i}", 100, 40, ttft_s=None, tpot_s=None, slo_class=f"free{i}") for i in range(count)]


def asking(slo):
    one = sim("asks", PROMPT, OUTPUT, slo_class="asks", max_output_tokens=OUTPUT)
    object.__setattr__(one.request, "slo", Slo(**slo))
    return one


ALONE = serve(*free())
WORK_S = MODEL.seconds(PROMPT) + sum(MODEL.seconds(1, context_tokens=PROMPT + i) for i in range(OUTPUT))


@settings(deadline=None, max_examples=60, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(st.none() | seconds, st.none() | seconds, st.none() | seconds, st.none() | seconds)
@example(1e9, 1e-6, None, None)
@example(1e9, 1e-3, 5.0, None)
@example(3.0, 1e-6, None, None)
@example(None, None, None, 1e8)
def test_best_effort_work_ends_later_by_no_more_than_the_work_of_a_kept_promise(ttft, tpot, gap, e2e):
    slo = {"ttft_s": ttft, "tpot_s": tpot, "max_gap_s": gap, "e2e_s": e2e}
    grades = serve(asking(slo), *free())
    asks = grades.pop("asks")
    if not (asks.promised and asks.outcome == "met"):
        return
    last = max(grade.finish_s for grade in grades.values())
    assert last <= max(grade.finish_s for grade in ALONE.values()) + 1.1 * WORK_S
