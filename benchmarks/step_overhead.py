"""What the plug-in adds to an engine step: thread CPU time beside vLLM's own scheduler, model excluded.

Three engines with a mock model run in turns, step by step: vLLM's scheduler, ours observing, ours
enforcing. Each holds the same number of running decodes with promises; now and then one finishes and a
new prompt arrives, so that there is something to plan. A step counts `schedule()` + `update_from_output()`.

    python benchmarks/step_overhead.py --sizes 64 256 1024 --steps 300 --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
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

# An engine whose steps at 1,024 decodes take 30 ms, so that promises of 100 ms a token can be kept.
PERF = PerfModel.from_terms([{"per_token_s": 20e-6, "per_context_token_s": 1e-8, "fixed_s": 8e-3}])
ARGS = ({"slo_class": "chat"}, {"slo_ttft_ms": 2000, "slo_tpot_ms": 60}, {"slo_class": "reasoning"}, None)


class Timed(Engine):
    """An engine that keeps the CPU time of each step without the mock model's."""

    def __init__(self, scheduler: Any, size: int) -> None:
        super().__init__(scheduler)
        self.size = size
        self.rng = np.random.default_rng(0)
        self.times: list[float] = []
        self.plugin: list[float] = []
        self.num_made = 0
        self.batch_digest = 0

    def refill(self, waiting: int) -> None:
        """Keep `size` requests and `waiting` more alive."""
        while len(self.scheduler.requests) < self.size + waiting:
            self.num_made += 1
            args = ARGS[self.num_made % len(ARGS)]
            request = make_request(
                f"r{self.num_made}",
                prompt_tokens=int(self.rng.integers(100, 900)),
                max_tokens=int(self.rng.integers(200, 1200)),
                args=args,
            )
            self.scheduler.add_request(request)

    def timed_step(self) -> None:
        """Run one step and keep its time."""
        started = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        result = self.execute(output)
        resumed = time.thread_time()
        self.scheduler.update_from_output(output, result)
        self.times.append(scheduled - started + time.thread_time() - resumed)
        self.batch_digest = hash((self.batch_digest, len(output.num_scheduled_tokens)))


def measure(root: Path, size: int, steps: int, warm: int, waiting: int) -> dict[str, Any]:
    """Run the three engines in turns at one size; returns microseconds."""
    profile = str(write_profile(root / "profile.json", PERF))
    options = {
        "max_num_seqs": size,
        "max_num_batched_tokens": 8192,
        "num_blocks": 200 * size + 2000,
        "max_model_len": 4096,
    }
    off = {"profile": profile, "safety": {"is_enabled": False}}
    schedulers = {
        "stock": make_scheduler(root, cls=Scheduler, **options),
        "observe": make_scheduler(root, cls=SloScheduler, slo={"mode": "observe", **off}, **options),
        "enforce": make_scheduler(root, cls=SloScheduler, slo={"mode": "enforce", **off}, **options),
    }
    engines = {name: Timed(scheduler, size) for name, scheduler in schedulers.items()}
    for scheduler in list(schedulers.values())[1:]:
        scheduler.slo.learner.poll()
        scheduler.slo._stop.set()  # measure the step alone
        scheduler.slo._thread.join()
    for step in range(warm + steps):
        for engine in engines.values():
            engine.refill(waiting)
            if step == warm:
                engine.times.clear()
            engine.timed_step()
    row: dict[str, Any] = {"size": size, "waiting": waiting, "steps": steps}
    for name, engine in engines.items():
        times = np.array(engine.times) * 1e6
        row[name] = {"p50": float(np.median(times)), "p99": float(np.quantile(times, 0.99))}
        row[name]["mean_batch"] = float(np.mean([len(engine.scheduler.running)]))
    for name in ("observe", "enforce"):
        slo = schedulers[name].slo
        row[name]["added_p50"] = row[name]["p50"] - row["stock"]["p50"]
        row[name]["added_p99"] = row[name]["p99"] - row["stock"]["p99"]
        row[name]["plan"] = {key: value * 1e6 for key, value in slo.plan_times.quantiles().items()}
        row[name]["faults"] = dict(slo.faults.counts)
        row[name]["divergences"] = dict(slo.divergences)
        slo.shutdown()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as text, microseconds of thread CPU time."""
    added = "observe added p50/p99   enforce added p50/p99"
    lines = [f"running  waiting   stock p50/p99      {added}   planner wall p50/p99"]
    for row in rows:
        stock, observe, enforce = row["stock"], row["observe"], row["enforce"]
        lines.append(
            f"{row['size']:7d}  {row['waiting']:7d}  {stock['p50']:8.0f}/{stock['p99']:6.0f}"
            f"  {observe['added_p50']:12.0f}/{observe['added_p99']:6.0f}"
            f"  {enforce['added_p50']:16.0f}/{enforce['added_p99']:6.0f}"
            f"  {enforce['plan']['p50']:14.0f}/{enforce['plan']['p99']:6.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--waiting", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slos-serve-bench-") as folder:
        rows = [measure(Path(folder), size, args.steps, args.warm, args.waiting) for size in args.sizes]
    print(table(rows))
    for row in rows:
        assert not row["enforce"]["faults"], row["enforce"]["faults"]
    if args.json:
        args.json.write_text(json.dumps({"unit": "microseconds of thread CPU time", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
