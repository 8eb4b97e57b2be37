"""What requests without any SLO lose on slos-serve, which promises them the service of plain vLLM.

    python benchmarks/without_slos.py [--out DIR] [--blocks 30] [--requests 16] [--tokens 64]

Two servers with the same flags stay up, ours enforcing. Both get the same bursts in short blocks, ours - plain -
plain - ours, so that what drifts over a block cancels. Per block: output tokens per second, p99 time between tokens,
and CPU time of all the server's threads per output token, which is blind to waiting. Ratios are geometric means over
blocks, with a bootstrap interval over blocks (95 %, percentile).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slos_serve.bench.client import BenchRequest, offer, random_prompt
from slos_serve.bench.compare import OURS, STOCK
from slos_serve.bench.contention import threads_of
from slos_serve.bench.engines import ServerProcess
from slos_serve.bench.lab import MODEL_NAME, OURS_BUDGET, Lab, describe_engine
from slos_serve.bench.model import ensure_demo_model
from slos_serve.bench.profiling import warm_up
from slos_serve.cache import write_json
from slos_serve.errors import SlosServeError
from slos_serve.terminal.progress import Progress
from slos_serve.terminal.signals import ending_by_signal

BLOCK = (OURS, STOCK, STOCK, OURS)
PROMPT_TOKENS = 96
RESAMPLES = 5_000
BETTER = {"tokens_per_s": "higher", "p99_gap_s": "lower", "cpu_s_per_token": "lower"}

Found = Mapping[str, float]


def cpu_s(engine: ServerProcess) -> float:
    """Return the CPU seconds that the threads of a server have used."""
    return sum(ran for ran, _ in threads_of(engine).values()) / 1e9


def burst(engine: ServerProcess, num_requests: int, num_tokens: int, seed: int) -> Found:
    """Offer requests that ask for nothing, all at once, and return what came of it."""
    rng = np.random.default_rng(seed)
    requests = [
        BenchRequest(
            request_id=f"plain-{seed}-{i}",
            offset_s=0.0,
            prompt_token_ids=random_prompt(PROMPT_TOKENS, rng),
            output_tokens=num_tokens,
            hidden_max_tokens=4 * num_tokens,
        )
        for i in range(num_requests)
    ]
    used_s, started = cpu_s(engine), time.perf_counter()
    results = asyncio.run(offer(engine.url, MODEL_NAME, requests, slo_form="none"))
    took_s, used_s = time.perf_counter() - started, cpu_s(engine) - used_s
    engine.check()
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise SlosServeError(f"{engine.name}: a request failed: {failed}")
    gaps = np.concatenate([np.diff([at_s for at_s, _ in result.chunks]) for result in results])
    count = num_requests * num_tokens
    return {
        "tokens_per_s": count / took_s,
        "p99_gap_s": float(np.quantile(gaps, 0.99)),
        "cpu_s_per_token": used_s / count,
    }


def compare(blocks: Sequence[Mapping[str, Sequence[Found]]]) -> dict[str, dict[str, float]]:
    """Return ours over plain vLLM by measure: geometric mean over blocks and its interval."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(blocks), (RESAMPLES, len(blocks)))
    ratios = {}
    for key in BETTER:
        logs = np.array([np.diff([np.mean([np.log(one[key]) for one in block[name]]) for name in (STOCK, OURS)])[0]
                         for block in blocks])  # fmt: skip
        low, high = np.quantile(np.exp(logs[picks].mean(axis=1)), [0.025, 0.975])
        ratios[key] = {"ratio": float(np.exp(logs.mean())), "low": float(low), "high": float(high)}
    return ratios


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a small model's folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("without-slos-report"))
    parser.add_argument("--blocks", type=int, default=30, metavar="N", help="blocks of four bursts (30)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="requests of a burst (16)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="output tokens of a request (64)")
    args = parser.parse_args(argv)
    if min(args.blocks, args.requests) < 1 or args.tokens < 2:
        parser.error("--blocks and --requests: expected at least 1; --tokens: at least 2")
    model = str(args.model or ensure_demo_model())
    blocks: list[dict[str, list[Found]]] = []
    try:
        with ending_by_signal(), Lab(model=model, out=args.out, say=lambda text: print(text, file=sys.stderr)) as lab:
            lab.start_ours(fresh=False)
            engines = {OURS: lab.ours, STOCK: lab.launch_stock(OURS_BUDGET)}
            lab.wait(list(engines.values()), expected_s=60)
            for engine in engines.values():
                asyncio.run(warm_up(engine.url, MODEL_NAME, budget_s=4.0))
                burst(engine, args.requests, args.tokens, seed=args.blocks)
            with Progress("bursts") as progress:
                for number in range(args.blocks):
                    block: dict[str, list[Found]] = {OURS: [], STOCK: []}
                    for name in BLOCK:
                        block[name].append(burst(engines[name], args.requests, args.tokens, seed=number))
                    blocks.append(block)
                    progress((number + 1) / args.blocks)
    except (SlosServeError, OSError) as error:
        print(f"without_slos: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    ratios = compare(blocks)
    about = {"schema": "slos-serve-without-slos/1", "engine": describe_engine(model), "requests": args.requests}
    write_json({**about, "tokens": args.tokens, "ratios": ratios, "blocks": blocks}, args.out / "report.json")
    for key, found in ratios.items():
        interval = f"{found['low']:.4f} to {found['high']:.4f}"
        print(f"{key:18} ours / vLLM {found['ratio']:.4f} ({interval}, {len(blocks)} blocks; {BETTER[key]} is better)")
    print(json.dumps({"report": str(args.out / "report.json")}), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
