"""What a replica publishes for routers."""

from __future__ import annotations

import pytest

from slos_serve.core.routing.routers import ReplicaSnapshot
from slos_serve.vllm_plugin.snapshot import replica
from slos_serve.vllm_plugin.testing import Engine, make_request


def test_a_busy_replica_says_how_long_its_step_takes_and_an_idle_one_has_none_under_way(build) -> None:
    scheduler = build(slo={"publish_replica": True, "planner": "slos_serve.core.planner.SloPlanner"})
    published = []
    scheduler.slo.outbox.publisher.send = lambda message: published.append(message["snapshot"]["replica"])
    engine = Engine(scheduler)
    promise = {"slo_ttft_ms": 5000, "slo_tpot_ms": 500}
    scheduler.add_request(make_request("a", prompt_tokens=200, max_tokens=3, args=promise))
    engine.step()
    predicted_s = scheduler.slo.last_plan.batch.predicted_s
    assert predicted_s > 0
    assert ReplicaSnapshot.from_json(replica(scheduler.slo)).step_s == pytest.approx(predicted_s)
    engine.run()
    assert replica(scheduler.slo)["step_s"] == 0.0
    assert published[-1]["step_s"] == 0.0
