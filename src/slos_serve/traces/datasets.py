"""Public traces: where they are, under which licence, and what must be in them.

A file is fetched from its publisher at a pinned commit, checked, turned into our columns and put where
the scenarios look for it. The checksum is over what is used, every request's arrival (microseconds) and
lengths, so that it holds whatever a server does to line endings; a file that differs is refused.
"""

from __future__ import annotations

import hashlib
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slos_serve.cache import complete_file
from slos_serve.errors import ConfigError, SlosServeError
from slos_serve.traces.rows import ReadOptions
from slos_serve.traces.trace import Trace, read_trace, spread_ties, write_trace

TIMEOUT_S = 30.0
MOONCAKE = ReadOptions(time_unit="ms", block_tokens=512)
CHUNK_BYTES = 1 << 16
MAX_BYTES = 1 << 30  # far more than any of them: what a wrong server sends must not fill a disk
RAW = "https://raw.githubusercontent.com"
AZURE = f"{RAW}/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data/AzureLLMInferenceTrace"


class FetchError(SlosServeError):
    """A file could not be had, or is not what it should be; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One public file. `target`: where it goes below the data folder. `digest`: see `digest_of`."""

    name: str
    url: str
    target: str
    licence: str
    cite: str
    num_requests: int
    digest: str

    @property
    def is_on_ticks(self) -> bool:
        """Tell whether the file's arrivals sit on coarse ticks, inside which they are spread."""
        return self.url.endswith(".jsonl")


_DATASETS = (
    Dataset(
        name="azure2023-code",
        url=f"{AZURE}_code.csv",
        target="traces/azure2023_code.csv.gz",
        licence="CC-BY 4.0",
        cite="Azure LLM inference trace 2023; Patel et al., Splitwise, ISCA 2024",
        num_requests=8819,
        digest="21f8776914e89a97ef3d3fb8415770e9a1437145f75634ef067de45799d51790",
    ),
    Dataset(
        name="azure2023-conv",
        url=f"{AZURE}_conv.csv",
        target="traces/azure2023_conv.csv.gz",
        licence="CC-BY 4.0",
        cite="Azure LLM inference trace 2023; Patel et al., Splitwise, ISCA 2024",
        num_requests=19366,
        digest="aae160636f89d2a8bf35a07c936754efdafcf037a33170b0be99936b483ae92f",
    ),
    Dataset(
        name="mooncake-conversation",
        url=f"{RAW}/kvcache-ai/Mooncake/a2a4b18ac537fd798d50e6e9f57031ce86419a37"
        "/FAST25-release/traces/conversation_trace.jsonl",
        target="traces/mooncake_conversation.csv.gz",
        licence="Apache-2.0",
        cite="Qin et al., Mooncake, FAST 2025",
        num_requests=12031,
        digest="615a21ee72d6c48da216161f91e3f4f41fc04c8f3995ce63f30c16ea83a3ac0f",
    ),
    Dataset(
        name="arxiv-summarization",
        url=f"{RAW}/microsoft/vidur/6d98aa8f71696520acc603d87439e77cc78160a7"
        "/data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        target="lengths/arxiv_summarization_4k_llama2.csv.gz",
        licence="MIT",
        cite="Agrawal et al., Vidur, MLSys 2024; lengths only",
        num_requests=28257,
        digest="e9dc20436f2141dab2a3338cf1658f8821883c4f2d7231cb79ea7d6d4f76f851",
    ),
    Dataset(
        name="sharegpt",
        url=f"{RAW}/microsoft/sarathi-serve/72339db5b120614033b317880ad3a05a5e4c9415"
        "/data/processed_traces/sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
        target="lengths/sharegpt_8k_llama2.csv.gz",
        licence="Apache-2.0",
        cite="Agrawal et al., Sarathi-Serve, OSDI 2024; lengths only",
        num_requests=30731,
        digest="f06f2c76c3e26b53dd8e9d52dec389a3a75fa5e96e17cdb5fffcce05e6eaf323",
    ),
)
DATASETS = {dataset.name: dataset for dataset in _DATASETS}


def find_dataset(name: str) -> Dataset:
    """Return a data set by name; `ConfigError` lists the names."""
    if name not in DATASETS:
        raise ConfigError(where="data", key="name", value=name, expected=f"one of {', '.join(DATASETS)}, all")
    return DATASETS[name]


def digest_of(trace: Trace) -> str:
    """Return a checksum of every request's arrival and lengths."""
    digest = hashlib.sha256()
    times = np.round(trace.arrived_at_s * 1e6).astype(np.int64).tolist()
    for row in zip(times, trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True):
        digest.update("{},{},{}\n".format(*row).encode())
    return digest.hexdigest()


def fetch(
    dataset: Dataset, folder: Path, *, local: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Put a data set into a folder and return its file; `local` is a copy that is there already.

    `FetchError` where it cannot be had or is not what it should be: the folder is then as it was.
    `progress` gets bytes so far and in all (0: unknown).
    """
    target = folder / dataset.target
    with tempfile.TemporaryDirectory(prefix="slos-serve-") as scratch:
        source = local or _download(dataset, Path(scratch) / Path(dataset.url).name, progress)
        trace = _read(dataset, source)
        found = digest_of(trace)
        if found != dataset.digest:
            raise FetchError(
                f"{dataset.name}: {len(trace)} requests with checksum {found[:16]}: expected {dataset.num_requests} "
                f"with {dataset.digest[:16]}: the file is another one or damaged, nothing was written"
            )
        if dataset.is_on_ticks:
            trace = replace(trace, arrived_at_s=spread_ties(trace.arrived_at_s))
    with complete_file(target) as draft:
        write_trace(trace, draft)
    return target


def _read(dataset: Dataset, path: Path) -> Trace:
    try:
        trace = read_trace(path, MOONCAKE if dataset.is_on_ticks else None, spread=False)
    except ValueError as error:
        raise FetchError(f"{dataset.name}: {error}: the file is another one or damaged, nothing was written") from error
    return replace(trace, arrived_at_s=np.round(trace.arrived_at_s, 6), source=dataset.name)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{num_bytes} bytes: expected at most {MAX_BYTES}")


def _download(dataset: Dataset, path: Path, progress: Callable[[int, int], None] | None) -> Path:
    try:
        with urllib.request.urlopen(dataset.url, timeout=TIMEOUT_S) as answer, path.open("wb") as file:  # noqa: S310
            total, done = int(answer.headers.get("Content-Length") or 0), 0
            _check_size(total)
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                _check_size(done)
                if progress is not None:
                    progress(done, total)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise FetchError(
            f"{dataset.name}: {dataset.url} cannot be had ({reason}): fetch it on a machine with internet access "
            f"and convert it with: slos-serve data fetch {dataset.name} --from FILE"
        ) from error
    return path
