"""What an output longer than predicted breaks is counted apart and is no evidence against the planner."""

from __future__ import annotations

from slos_serve.core.types import BatchPlan, Plan, Verdict
from slos_serve.vllm_plugin.testing import Engine, make_request


def promise_all(scheduler, outcome_at):
    """Promise everything, with outputs predicted to be `outcome_at` tokens long."""

    class Planner:
        def plan(self, state):
            rows = state.requests.rows
            new = rows["tier"] == 0
            rows["predicted_output_tokens"][new] = outcome_at
            from slos_serve.core.baselines import VllmPlanner

            batch: BatchPlan = VllmPlanner().plan(state).batch
            names = [state.requests.request_ids[i] for i in new.nonzero()[0].tolist()]
            return Plan(batch=batch, verdicts=tuple(Verdict(request_id=name, promised=True) for name in names))

    scheduler.slo.planner = Planner()


def serve(build, predicted):
    scheduler = build(max_num_seqs=8, max_num_batched_tokens=256)
    promise_all(scheduler, predicted)
    engine = Engine(scheduler)
    scheduler.add_request(make_request("long", max_tokens=40, args={"slo_e2e_ms": 2}))
    ends = []
    send = scheduler.slo.outbox.publisher.send
    scheduler.slo.outbox.publisher.send = lambda message: (ends.extend(message["finished"]), send(message))
    engine.run()
    return scheduler.slo, ends


def test_a_miss_beyond_the_predicted_length_is_counted_apart(build) -> None:
    slo, ends = serve(build, predicted=3)
    assert [(end["promised"], end["outcome"]) for end in ends] == [(True, "missed")]
    assert slo.promises.num_outrun == 1
    assert slo.snapshot()["outrun"] == 1
    assert not slo.safety._promises


def test_a_miss_within_the_predicted_length_is_ours(build) -> None:
    slo, ends = serve(build, predicted=40)
    assert [(end["promised"], end["outcome"]) for end in ends] == [(True, "missed")]
    assert slo.promises.num_outrun == 0
    assert list(slo.safety._promises) == [(False, "")]
