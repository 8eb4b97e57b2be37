"""Pytest plug-in of `scripts/conformance.py`: put one of our scheduler classes in the place of vLLM's own.

`CONFORMANCE_KIND` says which: `stock` (vLLM's), `observe` (ours, no plan) or `enforce` (ours, steered in every
step by a first-come-first-served plan of everything). Outcomes go to the JSON file `CONFORMANCE_OUT`. Configurations of
the models that the tests name lie in the working directory, so that nothing is looked up on a hub.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from vllm.model_executor.models import qwen2_vl
from vllm.v1.core.sched import async_scheduler, scheduler

KIND = os.environ["CONFORMANCE_KIND"]
OUTCOMES: dict[str, str] = {}
STEPS: Counter[str] = Counter()
FAULTS: Counter[str] = Counter()
DIVERGENCES: Counter[str] = Counter()
DIVERGED: dict[str, Counter[str]] = {}  # by test
RUNTIMES: list[Any] = []


# What a model's image processor answers to the scheduler's one question; its files cannot be had offline, and one image
# model, whose module can be imported everywhere, stands in for both (see conformance_models.json).
IMAGE_TOKENS = {"llava": 576, "Qwen": 16384}


def _image_tokens(info: Any, **_: Any) -> dict[str, int]:
    tokens = next(count for name, count in IMAGE_TOKENS.items() if info.ctx.model_config.model.startswith(name))
    return {"image": tokens, "video": tokens}


qwen2_vl.Qwen2VLProcessingInfo.get_mm_max_tokens_per_item = _image_tokens

if KIND != "stock":
    from slos_serve.core.baselines import VllmPlanner
    from slos_serve.core.perf import PerfModel
    from slos_serve.vllm_plugin import runtime
    from slos_serve.vllm_plugin.safety import faults
    from slos_serve.vllm_plugin.safety.modes import Modes
    from slos_serve.vllm_plugin.scheduler import SloMixin

    MODEL = PerfModel.from_terms([{"per_token_s": 1e-5, "fixed_s": 1e-3}])
    runtime.warm_up = lambda *_: 0.0  # compiled once, in the first plan of the run

    class InOrder:
        """Plan everything in the order of the scheduler's own policy, which no planner of ours is told."""

        def __init__(self, owner: Any) -> None:
            limit = owner.scheduler_config.long_prefill_token_threshold or None
            budget = owner.max_num_scheduled_tokens
            self.owner = owner
            self.inner = ByPolicy(token_budget=budget, draft_length=owner.num_spec_tokens, chunk_limit=limit)

        def plan(self, state: Any) -> Any:
            """Return the next batch."""
            ByPolicy.requests = self.owner.requests if self.owner.policy.value == "priority" else {}
            if hasattr(self.owner, "adaptive_long_prefill_threshold"):  # from 0.31 on
                self.inner = dataclasses.replace(self.inner, chunk_limit=self.chunk_limit())
            return self.inner.plan(state)

        def chunk_limit(self) -> Any:
            """Return what one request's share of prefill is cut to, None where it is not."""
            owner, limit = self.owner, self.owner.scheduler_config.long_prefill_token_threshold
            count = sum(owner.get_request_counts())
            if not limit or count <= 1:
                return None
            share = owner.max_num_scheduled_tokens // count if owner.adaptive_long_prefill_threshold else 0
            return max(limit, share)

    class ByPolicy(VllmPlanner):
        """vLLM's batches; where `requests` are given, by their priority."""

        requests: ClassVar[dict[str, Any]] = {}

        def order(self, state: Any) -> Any:
            """Return the rows of running and waiting requests in service order."""
            rows = super().order(state)
            if not self.requests:
                return rows
            ids = state.requests.request_ids
            return tuple(
                np.array(sorted(part.tolist(), key=lambda i: self.requests[ids[i]]), np.int64) for part in rows
            )

    def note_fault(_self: Any, kind: str, error: Exception, _state: Any = None) -> None:
        """Keep a fault of ours with its words."""
        FAULTS[f"{kind}: {type(error).__name__}: {error}"] += 1

    faults.Faults.add = note_fault

    class Watched(SloMixin):
        """Our scheduler, told to enforce where the kind says so, and counted."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # the CPU platform switches it off
            kwargs["vllm_config"].scheduler_config.async_scheduling = isinstance(self, async_scheduler.AsyncScheduler)
            super().__init__(*args, **kwargs)
            RUNTIMES.append(self.slo)
            if KIND == "enforce":
                slo = self.slo
                slo.standing.modes = Modes(engine="enforce")
                slo.settings = dataclasses.replace(slo.settings, always_plan=True)
                slo.planner = InOrder(self)
                slo.learner._new = ({"schema": "conformance"}, MODEL)  # noqa: SLF001 - as if a profile had been read
                slo.learner._is_done = True  # noqa: SLF001
                slo.safety.limits = dataclasses.replace(slo.safety.limits, is_enabled=False)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            """Count the step."""
            output = super().schedule(*args, **kwargs)
            slo = self.slo
            STEPS["steered" if slo.last_plan is not None and slo.is_enforcing else "own order"] += 1
            for name in slo.standing.differences:
                STEPS[f"not steered: {name}"] += 1
            if slo.divergences:
                DIVERGENCES.update(slo.divergences)
                test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
                DIVERGED.setdefault(test, Counter()).update(slo.divergences)
                slo.divergences.clear()
            return output

    class Scheduler(Watched, scheduler.Scheduler):
        """In place of vLLM's."""

    class AsyncScheduler(Watched, async_scheduler.AsyncScheduler):
        """In place of vLLM's."""

    scheduler.Scheduler = Scheduler
    async_scheduler.AsyncScheduler = AsyncScheduler


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture vLLM's log, which does not propagate by itself (as the fixture of its own conftest does)."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    """Stop what each scheduler of ours has started; the tests do not."""
    yield
    for runtime in RUNTIMES:
        runtime.shutdown()
    RUNTIMES.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of each test: the worst of its phases."""
    if report.outcome != "passed" or (report.when == "call" and report.nodeid not in OUTCOMES):
        word = "error" if report.failed and report.when != "call" else report.outcome
        OUTCOMES[report.nodeid] = word


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Count a file that cannot be collected as an error."""
    if report.failed:
        OUTCOMES[report.nodeid] = "error"


def pytest_sessionfinish() -> None:
    """Write what was found."""
    document = {"outcomes": OUTCOMES, "steps": STEPS, "faults": FAULTS, "divergences": DIVERGENCES}
    document["diverged"] = DIVERGED
    Path(os.environ["CONFORMANCE_OUT"]).write_text(json.dumps(document), encoding="utf-8")
