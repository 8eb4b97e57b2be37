"""A planner of somebody's own steers vLLM, by the name of its class."""

from __future__ import annotations

import sys
from pathlib import Path

from slos_serve.vllm_plugin.testing import Engine, make_request

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_planner_of_ones_own_decides_what_vllm_runs(build, monkeypatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "own_scheduler:ShortestPromptFirst"
    scheduler = build(slo={"planner": name, "planner_options": {"token_budget": 64}})
    engine = Engine(scheduler)
    for name, tokens in (("long", 200), ("short", 40)):
        scheduler.add_request(make_request(name, prompt_tokens=tokens, max_tokens=2))
    assert engine.step().num_scheduled_tokens == {"short": 40, "long": 24}
    engine.run()
    assert not scheduler.slo.faults.counts
    sys.modules.pop("own_scheduler")
