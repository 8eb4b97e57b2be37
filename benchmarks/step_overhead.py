"""What the plug-in adds to an engine step: thread CPU time beside vLLM's own scheduler, model excluded.

Three engines with a mock model run in turns, step by step: vLLM's scheduler, ours observing, ours
enforcing. A step counts `schedule()` + `update_from_output()`. Time is virtual (each step lasts what the
performance model says), so that every run makes the same batches on any machine.

- steady: as many decodes as seats, four more requests waiting; all three engines run the same batches, which is
  asserted, so that the difference is the plug-in. Measuring begins where the last engine has filled its seats:
  ours does it in shorter batches, so that promised decodes are not held up;
- plain: the same, and no request asks for anything;
- queue: the same as steady, and 500 requests that ask for nothing wait;
- churn: requests finish and arrive all the time; what the plug-in adds is timed inside it;
- burst: the same, with 500 requests waiting, three in four of which want a promise.

    python benchmarks/step_overhead.py --sizes 64 256 1024 --steps 300 --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler

from slos_serve.core.perf import PerfModel
from slos_serve.vllm_plugin.scheduler import SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler, write_profile

# Steps at 1,024 decodes take 30 ms, so that promises of 50 and 100 ms a token can be kept.
PERF = PerfModel.from_terms([{"per_token_s": 20e-6, "per_context_token_s": 1e-9, "fixed_s": 8e-3}])
# Slack to the first token, so that what runs has been promised; every fourth request wants nothing.
ARGS = (*({"slo_ttft_ms": 60_000, "slo_tpot_ms": tpot_ms} for tpot_ms in (100, 60, 80)), None)
MAX_FILL_STEPS = 20_000


@dataclass(frozen=True, slots=True)
class Case:
    """What an engine is given. `asking` requests, from the first on, want a promise, but for every fourth."""

    name: str
    waiting: int = 4
    asking: float = math.inf
    is_steady: bool = True


def cases(size: int) -> tuple[Case, ...]:
    """Return the cases of one size."""
    return (
        Case("steady"),
        Case("plain", asking=0),
        Case("queue", waiting=500, asking=size),
        Case("churn", is_steady=False),
        Case("burst", waiting=500, is_steady=False),
    )


class Timed(Engine):
    """An engine that keeps the CPU time of each step without the mock model's, and runs on virtual time."""

    def __init__(self, scheduler: Any, size: int, case: Case) -> None:
        super().__init__(scheduler)
        self.size = size
        self.case = case
        self.max_tokens = (7000, 7001) if case.is_steady else (100, 600)
        self.now = 1e9
        self.rng = np.random.default_rng(0)
        self.times: list[float] = []
        self.num_made = 0

    def refill(self) -> None:
        """Keep `size` requests, and those that wait, alive."""
        while len(self.scheduler.requests) < self.size + self.case.waiting:
            asks = self.num_made < self.case.asking
            self.num_made += 1
            request = make_request(
                f"r{self.num_made}",
                prompt_tokens=int(self.rng.integers(100, 900)),
                max_tokens=int(self.rng.integers(*self.max_tokens)),
                args=ARGS[self.num_made % len(ARGS)] if asks else None,
                arrival_s=self.now,
            )
            self.scheduler.add_request(request)

    def fill(self) -> int:
        """Step until every seat decodes; return the steps it took."""
        for step in range(MAX_FILL_STEPS):
            self.refill()
            self.timed_step()
            if list(self.batches[-1].values()) == [1] * self.size:
                return step + 1
        raise AssertionError(f"not every seat decodes after {MAX_FILL_STEPS} steps")

    def timed_step(self) -> None:
        """Run one step and keep its time."""
        started = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        result = self.execute(output)
        self.now += PERF.seconds(max(1, output.total_num_scheduled_tokens))
        resumed = time.thread_time()
        self.scheduler.update_from_output(output, result)
        self.times.append(scheduled - started + time.thread_time() - resumed)
        self.batches.append(dict(output.num_scheduled_tokens))


def settle(scheduler: Any, engine: Timed) -> None:
    """Give the plug-in the model and virtual time, and keep its thread out of the measurement."""
    slo = scheduler.slo
    slo.learner.poll()
    slo.housekeeper.stop()
    slo.clock._read = lambda: engine.now
    slo.clock._last = 0.0
    learn = slo._learn
    slo._learn = lambda entry, _, overhead, now: learn(entry, entry.predicted_s, overhead, now)


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """Wrap a call so that its CPU time is added to the last entry of `into`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            into[-1] += time.thread_time() - started

    return call


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return median and 99 % quantile in microseconds."""
    p50, p99 = np.quantile(np.array(seconds) * 1e6, [0.5, 0.99]).tolist()
    return {"p50": p50, "p99": p99}


def measure(root: Path, size: int, steps: int, case: Case) -> dict[str, Any]:
    """Run the three engines in turns at one size; microseconds."""
    profile = str(write_profile(root / "profile.json", PERF))
    options = {
        "max_num_seqs": size,
        "max_num_batched_tokens": 8192,
        "num_blocks": 600 * size + 2000,
        "max_model_len": 8192,
    }
    slo = {"profile": profile, "state": False, "safety": {"is_enabled": False}}
    schedulers = {
        "stock": make_scheduler(root, cls=Scheduler, **options),
        "observe": make_scheduler(root, cls=SloScheduler, slo={"mode": "observe", **slo}, **options),
        "enforce": make_scheduler(root, cls=SloScheduler, slo={"mode": "enforce", **slo}, **options),
    }
    engines = {name: Timed(scheduler, size, case) for name, scheduler in schedulers.items()}
    inside: dict[str, list[float]] = {"observe": [], "enforce": []}
    plans: dict[str, list[float]] = {"observe": [], "enforce": []}
    for name in inside:
        settle(schedulers[name], engines[name])
    for engine in engines.values():
        if case.is_steady:
            engine.fill()
        else:
            for _ in range(1000 * size // 8192 + 40):
                engine.refill()
                engine.timed_step()
        engine.times.clear()
        engine.batches.clear()
    for name, spent in inside.items():
        runtime = schedulers[name].slo
        for method in ("before_schedule", "end_steering", "after_schedule", "before_update", "after_update"):
            setattr(runtime, method, timed(getattr(runtime, method), spent))
        runtime.planner.plan = timed(runtime.planner.plan, plans[name])
    for _ in range(steps):
        for name, engine in engines.items():
            engine.refill()
            if name in plans:
                inside[name].append(0.0)
                plans[name].append(0.0)
            engine.timed_step()
    row: dict[str, Any] = {"case": case.name, "size": size, "waiting": case.waiting, "steps": steps}
    for name, engine in engines.items():
        row[name] = quantiles(engine.times)
        row[name]["mean_batch"] = float(np.mean([len(batch) for batch in engine.batches]))
        if case.is_steady:
            shares = [sorted(batch.values()) for batch in engine.batches]
            assert shares == [[1] * size] * steps, f"{name}: not the batches of stock vLLM"
    for name, spent in inside.items():
        runtime = schedulers[name].slo
        assert not runtime.faults.counts, runtime.faults.counts
        if case.is_steady:
            row[name]["added"] = row[name]["p50"] - row["stock"]["p50"]
        row[name]["inside"] = quantiles(spent)
        row[name]["plan"] = quantiles(plans[name])
        row[name]["divergences"] = dict(runtime.divergences)
        runtime.shutdown()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [
        "microseconds of thread CPU time    added by observing: median, inside p50/p99, planner p50/p99    by enforcing"
    ]
    for row in rows:
        text = f"{row['case']:6s} {row['size']:5d}  stock {row['stock']['p50']:7.0f}"
        for name in ("observe", "enforce"):
            one = row[name]
            added = f"{one['added']:7.0f}" if "added" in one else "      -"
            text += f"   {name} {added}  {one['inside']['p50']:6.0f}/{one['inside']['p99']:6.0f}"
            text += f"  {one['plan']['p50']:6.0f}/{one['plan']['p99']:6.0f}"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases(1)])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="slos-serve-bench-") as folder:
        for size in args.sizes:
            chosen = [case for case in cases(size) if not args.cases or case.name in args.cases]
            rows += [measure(Path(folder), size, args.steps, case) for case in chosen]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"unit": "microseconds of thread CPU time", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
