"""What tests of the simulator share."""

import gzip

import numpy as np
import pytest


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.write("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Files of the documented names and columns, with made-up numbers."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    for name in ("azure2023_conv", "azure2023_code"):
        times = np.sort(rng.uniform(0, 3500, 1500))
        rows = zip(times.round(3), rng.integers(10, 3000, 1500), rng.integers(2, 200, 1500), strict=True)
        write(folder / f"traces/{name}.csv.gz", "arrived_at_s,prompt_tokens,output_tokens", [(0.0, 5, 5), *rows])
    rows = zip(rng.integers(500, 3500, 3000), rng.integers(20, 400, 3000), strict=True)
    write(folder / "lengths/arxiv_summarization_4k_llama2.csv.gz", "prompt_tokens,output_tokens", rows)
    rows = [(int(p), int(t + a), int(t), int(a)) for p, t, a in rng.integers(20, 400, (600, 3))]
    header = "prompt_tokens,output_tokens,thinking_tokens,answer_tokens"
    write(folder / "lengths/reasoning_s1k.csv.gz", header, rows)
    calls = [
        (f"s{i}", turn, 500 + 300 * turn, 40, 450 + 300 * turn if turn else 0) for i in range(6) for turn in range(4)
    ]
    header = "session_id,turn,prompt_tokens,output_tokens,cached_tokens"
    write(folder / "lengths/toolbench_full_sessions_calls.csv.gz", header, calls)
    header = "agent,session_id,turn,offset_in_session_s,prompt_tokens,output_tokens,cached_tokens"
    rows = [("x", f"s{i // 5}", i % 5, 1.5 * (i % 5), 100, 50, 0) for i in range(40)]
    write(folder / "lengths/lmcache_agent_calls.csv.gz", header, rows)
    return folder
