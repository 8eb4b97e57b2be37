from __future__ import annotations

import itertools
import logging
import os
import time

import pytest

pytest.importorskip("vllm")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def perf():
    """Return a model of an engine that is slow enough for a mock to keep up with."""
    from slos_serve.core.perf import PerfModel

    return PerfModel.from_terms([{"per_token_s": 50e-6, "per_request_s": 20e-6, "fixed_s": 4e-3}])


@pytest.fixture
def build(tmp_path, perf):
    """Build schedulers that enforce a planner's plans; they are shut down afterwards."""
    from slos_serve.core.types import Planner
    from slos_serve.vllm_plugin.scheduler import SloScheduler
    from slos_serve.vllm_plugin.testing import make_scheduler, write_profile

    made = []

    def _build(
        planner: Planner | None = None, *, slo: dict | None = None, ready: bool = True, cls=SloScheduler, **options
    ):
        profile = write_profile(tmp_path / "profile.json", perf)
        document = {
            "mode": "enforce",
            "profile": str(profile),
            "safety": {"is_enabled": False},
            "fault_dir": str(tmp_path / "faults"),
            "always_plan": True,
            "planner": "slos_serve.core.baselines.VllmPlanner",
            **(slo or {}),
        }
        scheduler = make_scheduler(
            tmp_path, cls=cls, slo={k: v for k, v in document.items() if v is not None}, **options
        )
        made.append(scheduler)
        scheduler.slo.outbox.sender.close()  # what is published is published by then
        if planner is not None:
            scheduler.slo.planner = planner
        ticks = itertools.count(time.time(), 1e-4)
        scheduler.slo.clock._read = lambda: next(ticks)  # on a loaded machine nothing is late
        if ready:
            scheduler.slo.learner.poll()
        return scheduler

    yield _build
    for scheduler in made:
        scheduler.shutdown()


@pytest.fixture
def vllm_log(caplog, monkeypatch):
    """Return what is logged below vLLM's own logger: once, whether that one passes on what it gets or not."""
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
