"""Stand-ins for the public traces, for who has none of them: same files, same columns, made-up numbers.

Lengths are log-normal, gaps Gamma or log-normal, with medians, spreads and bursts near those that the publishers'
files show. They let every scenario run anywhere; they reproduce no published result, and every command
that uses them says so. Made once, into the user's cache folder; same version, same bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from slos_serve.cache import cache_path, complete_folder
from slos_serve.errors import ConfigError
from slos_serve.traces.trace import IntArray, Trace, synthetic_arrivals, write_trace

SYNTHETIC = "synthetic stand-ins"  # what results name as their data
VERSION = 2  # one more with every change of the numbers below
SPAN_S = 3500.0

LOG_NORMAL, GAP_SIGMA = "log-normal", 1.8  # a Gamma distribution as spread out has many gaps of nothing

#                     requests, gaps, prompt tokens: median, sigma, most; output tokens: median, sigma, most
_ARRIVING = {
    "azure2023_conv": (19000, "gamma:1.1", (1020, 0.9, 14000), (129, 0.9, 1000)),
    "azure2023_code": (9000, LOG_NORMAL, (1469, 1.2, 7400), (13, 0.9, 1900)),
}
_NUM_LENGTHS, _NUM_SESSIONS, _MAX_ROUNDS = 4000, 60, 8


@cache
def data_folder(path: str | Path | None, *, command: str) -> Path:
    """Return the folder of trace files: the user's, or without one the stand-ins, which is said on standard error."""
    if path is not None:
        if not Path(path).is_dir():
            raise ConfigError(where=command, key="data", value=str(path), expected="a folder of trace files")
        return Path(path)
    sys.stderr.write(f"{command}: no --data DIR: {SYNTHETIC} for the public traces (`slos-serve data fetch`)\n")
    folder = _folder()
    if not folder.is_dir():
        with complete_folder(folder) as draft:
            write_stand_ins(draft)
    return folder


def data_name(folder: str) -> str:
    """Return what results name as their data: a folder, or that these are the stand-ins."""
    return SYNTHETIC if folder == str(_folder().resolve()) else folder


def _folder() -> Path:
    return cache_path("traces", f"stand-ins-{VERSION}")


def write_stand_ins(folder: Path) -> None:
    """Write the six files that the scenarios read."""
    rng = np.random.default_rng(2504)

    def drawn(median: float, sigma: float, most: int, count: int, least: int = 2) -> IntArray:
        return np.clip(np.exp(rng.normal(np.log(median), sigma, count)).astype(np.int64), least, most)

    for name, (count, gaps, prompt, output) in _ARRIVING.items():
        if gaps == LOG_NORMAL:
            times = np.cumsum(rng.lognormal(0.0, GAP_SIGMA, count))
            times = np.round(times * SPAN_S / times[-1], 6)
        else:
            times = np.round(synthetic_arrivals(gaps, count / SPAN_S, count, rng), 6)
        trace = Trace.build(
            arrived_at_s=times, prompt_tokens=drawn(*prompt, count, 16), output_tokens=drawn(*output, count)
        )
        write_trace(trace, folder / f"traces/{name}.csv.gz")

    prompts, outputs = drawn(2730, 0.45, 3700, _NUM_LENGTHS, 300), drawn(167, 0.6, 1500, _NUM_LENGTHS)
    fits = prompts + outputs <= 4096
    _write(
        folder / "lengths/arxiv_summarization_4k_llama2.csv.gz",
        ("prompt_tokens", "output_tokens"),
        zip(prompts[fits], outputs[fits], strict=True),
    )
    thinking = np.clip(rng.normal(4300, 1300, _NUM_LENGTHS), 400, 7400).astype(np.int64)
    answers = drawn(700, 0.3, 3500, _NUM_LENGTHS)
    _write(
        folder / "lengths/reasoning_s1k.csv.gz",
        ("prompt_tokens", "output_tokens", "thinking_tokens", "answer_tokens"),
        zip(drawn(103, 0.6, 780, _NUM_LENGTHS, 16), thinking + answers, thinking, answers, strict=True),
    )
    sessions, agents = [], []
    for number in range(_NUM_SESSIONS):
        rounds = 1 + min(int(rng.geometric(0.3)), _MAX_ROUNDS - 1)
        context, offset_s, written = int(drawn(1370, 0.37, 4000, 1)[0]), 0.0, 0
        for turn, (output, result) in enumerate(
            zip(drawn(76, 1.0, 720, rounds), drawn(300, 0.8, 1500, rounds), strict=True)
        ):
            sessions.append((f"s{number}", turn, context, output, written))
            agents.append(("agent", f"s{number}", turn, round(offset_s, 3), context, output, written))
            written = context + int(output)
            context = written + int(result)
            offset_s += output / 200.0 + float(np.exp(rng.normal(np.log(2.0), 1.0)))
    tokens = ("prompt_tokens", "output_tokens", "cached_tokens")
    _write(folder / "lengths/toolbench_full_sessions_calls.csv.gz", ("session_id", "turn", *tokens), sessions)
    header = ("agent", "session_id", "turn", "offset_in_session_s", *tokens)
    _write(folder / "lengths/lmcache_agent_calls.csv.gz", header, agents)


def _write(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
