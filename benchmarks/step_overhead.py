"""What the plug-in adds to an engine step: thread CPU time beside vLLM's own scheduler, model excluded.

Three engines with a mock model run in turns, step by step: vLLM's scheduler, ours observing, ours
enforcing. A step counts `schedule()` + `update_from_output()`. Time is virtual (each step lasts what the
performance model says), so that every run makes the same batches on any machine.

- steady: as many decodes as seats, more requests waiting; all three engines run the same batches, which is
  asserted, so that the difference is the plug-in;
- churn: requests finish and arrive all the time; what the plug-in adds is timed inside it.

    python benchmarks/step_overhead.py --sizes 64 256 1024 --steps 300 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
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
WAITING = 4


class Timed(Engine):
    """An engine that keeps the CPU time of each step without the mock model's, and runs on virtual time."""

    def __init__(self, scheduler: Any, size: int, max_tokens: tuple[int, int]) -> None:
        super().__init__(scheduler)
        self.size = size
        self.max_tokens = max_tokens
        self.now = 1e9
        self.rng = np.random.default_rng(0)
        self.times: list[float] = []
        self.num_made = 0

    def refill(self) -> None:
        """Keep `size` requests and a few more alive."""
        while len(self.scheduler.requests) < self.size + WAITING:
            self.num_made += 1
            request = make_request(
                f"r{self.num_made}",
                prompt_tokens=int(self.rng.integers(100, 900)),
                max_tokens=int(self.rng.integers(*self.max_tokens)),
                args=ARGS[self.num_made % len(ARGS)],
                arrival_s=self.now,
            )
            self.scheduler.add_request(request)

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
    slo._stop.set()
    slo._thread.join()
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


def measure(root: Path, size: int, steps: int, *, churn: bool) -> dict[str, Any]:
    """Run the three engines in turns at one size; microseconds."""
    profile = str(write_profile(root / "profile.json", PERF))
    options = {
        "max_num_seqs": size,
        "max_num_batched_tokens": 8192,
        "num_blocks": 300 * size + 2000,
        "max_model_len": 8192,
    }
    slo = {"profile": profile, "safety": {"is_enabled": False}}
    schedulers = {
        "stock": make_scheduler(root, cls=Scheduler, **options),
        "observe": make_scheduler(root, cls=SloScheduler, slo={"mode": "observe", **slo}, **options),
        "enforce": make_scheduler(root, cls=SloScheduler, slo={"mode": "enforce", **slo}, **options),
    }
    lengths = (100, 600) if churn else (4000, 4001)
    engines = {name: Timed(scheduler, size, lengths) for name, scheduler in schedulers.items()}
    inside: dict[str, list[float]] = {"observe": [], "enforce": []}
    plans: dict[str, list[float]] = {"observe": [], "enforce": []}
    for name, spent in inside.items():
        settle(schedulers[name], engines[name])
        runtime = schedulers[name].slo
        for method in ("before_schedule", "end_steering", "after_schedule", "before_update", "after_update"):
            setattr(runtime, method, timed(getattr(runtime, method), spent))
        runtime.planner.plan = timed(runtime.planner.plan, plans[name])
    fill = 1000 * size // 8192 + 40
    for step in range(fill + steps):
        for name, engine in engines.items():
            engine.refill()
            if name in plans:
                inside[name].append(0.0)
                plans[name].append(0.0)
            if step == fill:
                engine.times.clear()
                engine.batches.clear()
            engine.timed_step()
    row: dict[str, Any] = {"size": size, "waiting": WAITING, "steps": steps, "churn": churn}
    for name, engine in engines.items():
        row[name] = quantiles(engine.times)
        row[name]["mean_batch"] = float(np.mean([len(batch) for batch in engine.batches]))
        if not churn:
            shares = [sorted(batch.values()) for batch in engine.batches]
            assert shares == [[1] * size] * steps, f"{name}: not the batches of stock vLLM"
    for name, spent in inside.items():
        runtime = schedulers[name].slo
        assert not runtime.faults.counts, runtime.faults.counts
        row[name]["added"] = row[name]["p50"] - row["stock"]["p50"]
        row[name]["inside"] = quantiles(spent[fill:])
        row[name]["plan"] = quantiles(plans[name][fill:])
        row[name]["divergences"] = dict(runtime.divergences)
        runtime.shutdown()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as text."""
    lines = [
        "microseconds of thread CPU time    added by observing: median, inside p50/p99, planner p50/p99    by enforcing"
    ]
    for row in rows:
        text = f"{'churn ' if row['churn'] else 'steady'} {row['size']:5d}  stock {row['stock']['p50']:7.0f}"
        for name in ("observe", "enforce"):
            one = row[name]
            added = "      -" if row["churn"] else f"{one['added']:7.0f}"
            text += f"   {name} {added}  {one['inside']['p50']:6.0f}/{one['inside']['p99']:6.0f}"
            text += f"  {one['plan']['p50']:6.0f}/{one['plan']['p99']:6.0f}"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="slos-serve-bench-") as folder:
        for churn in (False, True):
            rows += [measure(Path(folder), size, args.steps, churn=churn) for size in args.sizes]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"unit": "microseconds of thread CPU time", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
