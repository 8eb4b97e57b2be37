"""The capacity of a trace of your own: the highest rate at which 90 % of every class's requests meet their SLOs.

    python examples/own_trace.py [FILE]

A trace is a CSV file with the columns `arrived_at_s`, `prompt_tokens` and `output_tokens`; `slo_class` may name a class
for each row. `slos-serve simulate --help` lists the other formats.

Sixty rows are few: in a window of thirty one request of a class is a tenth of it, and decides. Bring hundreds.
"""

import sys
import tempfile
from pathlib import Path

import slos_serve

ROWS = [(0.4 * i, 200 + 97 * (i % 23), 40 + 31 * (i % 7), "chat" if i % 3 else "coding") for i in range(60)]


def write_example(path: Path) -> Path:
    """Write a small trace, as your log might be turned into one."""
    lines = ["arrived_at_s,prompt_tokens,output_tokens,slo_class", *(",".join(map(str, row)) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else write_example(Path(folder, "mine.csv"))
        trace = slos_serve.read_trace(path)
        for system in ("vllm", "slos-serve"):
            found = slos_serve.capacity(system, trace, windows=2)
            rate = "none" if found.rate_rps is None else f"{found.rate_rps:.2f}"
            print(f"{system:12} {rate} requests/s (95 %: {found.low_rps:.2f} to {found.high_rps:.2f})")
