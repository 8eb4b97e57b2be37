"""How near a measured profile comes to the truth, where the truth is known: on emulated devices.

    python benchmarks/profile_truth.py --hardware h100-8b-derived,a100-80g-7b-measured,quadratic

For each hardware file `slos-serve profile` measures a real vLLM server on a device emulated by it, and the profile is
compared with the file: R2 and held-out error as the profile says them, its margins (prefill, decode), the seconds that
the whole command took, server start included, and the largest error of decode steps (1 to 256 requests with 256 tokens
of context), of prompts (128 to 8,192 tokens in one step) and of one decode at 100,000 tokens of context, far beyond
those measured: as expected, and as plans count with it, doubt included. `quadratic` is `h100-8b-derived` with ten times
the cost of attention between prompt tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from slos_serve.bench.model import ensure_demo_model
from slos_serve.core.perf import PER_PAIR, PerfModel, batch_seconds
from slos_serve.records.profile import Profile
from slos_serve.sim.hardware import Hardware, load_hardware

DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS = (128, 256, 512, 1024, 2048, 4096, 8192)
FAR_TOKENS = 100_000
HEADINGS = ["device", "R2", "held out", "margins", "took", "decodes", "prompts", "100k: expected, planned"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", default="h100-8b-derived", help="names or files, and quadratic")
    parser.add_argument("--runs", type=int, default=1, help="profiles of each")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="slos-serve-profile-truth-") as name:
        for hardware in args.hardware.split(","):
            for run in range(args.runs):
                rows.append(measure(device(hardware), Path(name), seed=run))
                print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    for row in (HEADINGS, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def device(name: str) -> Hardware:
    """Return the hardware of a name, `quadratic` included."""
    if name != "quadratic":
        return load_hardware(name)
    base = load_hardware("h100-8b-derived")
    lines = [[10 * v if i == PER_PAIR else v for i, v in enumerate(line)] for line in base.perf_model.lines]
    return replace(base, name="quadratic", perf_model=PerfModel(lines=tuple(map(tuple, lines))))


def measure(hardware: Hardware, folder: Path, *, seed: int) -> list[str]:
    """Profile one emulated device, and return its row of the table."""
    file, out = folder / f"{hardware.name}.json", folder / f"{hardware.name}-{seed}-profile.json"
    file.write_text(json.dumps(hardware.to_json()), encoding="utf-8")
    command = [
        str(Path(sys.executable).with_name("slos-serve")),
        "profile",
        "--model",
        str(ensure_demo_model()),
        "--emulate",
        str(file),
    ]
    began = time.monotonic()
    subprocess.run([*command, "--out", str(out), "--seed", str(seed)], check=True, stdout=sys.stderr)
    took_s = time.monotonic() - began
    profile = Profile.load(out)
    found, true, document = profile.perf_model, hardware.perf_model, profile.document
    far_s = true.seconds(1, 1, context_tokens=FAR_TOKENS)
    expected = found.seconds(1, 1, context_tokens=FAR_TOKENS) / far_s - 1
    planned = batch_seconds(found.planned(), 1.0, 1.0, FAR_TOKENS, 0.0, 0.0) / far_s - 1
    return [
        hardware.name,
        f"{document['r2']:.4f}",
        f"{document['mape_heldout']:.1%}",
        f"{found.margin_prefill:.2f}, {found.margin_decode:.2f}",
        f"{took_s:.0f} s",
        worst(found, true, lambda m: [m.seconds(n, n, context_tokens=256 * n) for n in DECODES]),
        worst(found, true, lambda m: [m.seconds(n, 1, attention_pairs=n * n / 2) for n in PROMPTS]),
        f"{expected:+.0%}, {planned:+.0%}",
    ]


def worst(found: PerfModel, true: PerfModel, times: Callable[[PerfModel], Sequence[float]]) -> str:
    """Return the largest relative error of `times` by one model against the other."""
    errors = [a / b - 1 for a, b in zip(times(found), times(true), strict=True)]
    return f"{max(errors, key=abs):+.1%}"


if __name__ == "__main__":
    sys.exit(main())
