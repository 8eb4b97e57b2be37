"""From end to end: how long a tenant's best-effort request takes does not grow with what another tenant piles up."""

import dataclasses

from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tests.sim.worlds import hardware, sim, workload

from slos_serve.core.planner import SloPlanner
from slos_serve.sim.run import run_workload

MANY, ALONE_IN_LINE = 1, 2
PILE = 40  # more than is done before the other tenant comes


def best_effort(name, prompt, output, *, at_s, tenant):
    one = sim(name, prompt, output, at_s=at_s, ttft_s=None, tpot_s=None, slo_class=name, max_output_tokens=output)
    return dataclasses.replace(one, request=dataclasses.replace(one.request, tenant=tenant))


def ends(pile, prompt, output, *, tenant=ALONE_IN_LINE, num_promised=20, **engine):
    """Return when the one request is served that comes after so many of another tenant, beside promised work."""
    piled = [best_effort(f"many{i}", prompt, output, at_s=0.0, tenant=MANY) for i in range(pile)]
    promised = [sim(f"kept{i}", 100, 40, at_s=0.1 * i, slo_class=f"kept{i}") for i in range(num_promised)]
    one = best_effort("one", 200, 30, at_s=1.0, tenant=tenant)
    arrivals = sorted([*piled, *promised, one], key=lambda each: each.request.arrival_s)
    result = run_workload(workload(*arrivals), SloPlanner(), hardware(**engine))
    return {grade.slo_class: grade for grade in result.graded}["one"].finish_s


sizes = {"prompt": st.integers(100, 800), "output": st.integers(20, 120)}
engines = st.sampled_from([{}, {"max_num_seqs": 8}, {"kv_tokens": 3000}])


@settings(deadline=None, max_examples=8, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(more=st.integers(1, 100), engine=engines, **sizes)
@example(more=100, prompt=200, output=100, engine={"max_num_seqs": 8})
@example(more=100, prompt=200, output=100, engine={"kv_tokens": 3000})
def test_another_tenants_pile_may_be_any_size(more, prompt, output, engine):
    assert ends(PILE + more, prompt, output, **engine) <= 1.02 * ends(PILE, prompt, output, **engine) + 0.1


def test_a_tenants_own_pile_comes_first():
    assert ends(PILE, 200, 60, tenant=MANY) > 2 * ends(PILE, 200, 60)
