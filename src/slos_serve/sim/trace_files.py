"""The three trace formats, parsed into checked columns. See `slos_serve.sim.traces` for their meaning.

Every `ValueError` names the file and the line, the field, the value and what was expected.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

COUNTS = ("prompt_tokens", "output_tokens", "thinking_tokens", "cached_tokens", "turn")
LABELS = ("session_id", "slo_class")
REQUIRED = ("arrived_at_s", "prompt_tokens", "output_tokens")
MOONCAKE_FIELDS = {"timestamp": float, "input_length": int, "output_length": int}
MOONCAKE_BLOCK_TOKENS = 512  # prompt tokens behind one of its hash ids

# What Azure's traces and the length files of Vidur and Sarathi-Serve call our columns.
_ALIASES = {
    "TIMESTAMP": "arrived_at_s",
    "ContextTokens": "prompt_tokens",
    "GeneratedTokens": "output_tokens",
    "num_prefill_tokens": "prompt_tokens",
    "num_decode_tokens": "output_tokens",
}
_FIRST_ROW = 2  # the line of a CSV file's first row

Columns = dict[str, Any]  # arrays by column name


def read_csv(path: Path, *, with_arrivals: bool = True) -> Columns:
    """Read our columns or Azure's. Without `with_arrivals` a missing `arrived_at_s` is 0 throughout."""
    texts = _read_texts(path)
    if not with_arrivals:
        texts["arrived_at_s"] = ["0"] * max((len(values) for values in texts.values()), default=0)
    missing = [name for name in REQUIRED if name not in texts]
    if missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing: found {', '.join(texts) or 'an empty file'}")
    if not texts[REQUIRED[0]]:
        raise ValueError(f"{path}: no rows: expected at least one request")
    columns: Columns = {"arrived_at_s": _times(path, texts["arrived_at_s"])}
    columns.update({name: _counts(path, name, texts[name]) for name in COUNTS if name in texts})
    columns.update({name: np.array(texts[name], np.str_) for name in LABELS if name in texts})
    return columns


def read_mooncake(path: Path) -> Columns:
    """Read Mooncake's JSON lines. Cached tokens are the leading blocks that an earlier prompt had too."""
    rows: list[tuple[float, int, int, int]] = []
    seen: set[int] = set()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        at_ms, prompt, output, blocks = _mooncake_row(f"{path}:{number}", line)
        if prompt < 0 or output < 0:
            raise ValueError(f"{path}:{number}: input_length, output_length = {prompt}, {output}: expected >= 0")
        if not (math.isfinite(at_ms) and at_ms >= 0) or (rows and at_ms < rows[-1][0]):
            raise ValueError(f"{path}:{number}: timestamp = {at_ms:g}: expected ms, not before the row above")
        hits = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        rows.append((at_ms, prompt, output, min(hits * MOONCAKE_BLOCK_TOKENS, prompt)))
    if not rows:
        raise ValueError(f"{path}: no rows: expected at least one request")
    times, *counts = zip(*rows, strict=True)
    names = ("prompt_tokens", "output_tokens", "cached_tokens")
    columns: Columns = {name: np.array(values, np.int64) for name, values in zip(names, counts, strict=True)}
    return {"arrived_at_s": np.array(times, np.float64) / 1e3, **columns}


def _mooncake_row(where: str, line: str) -> tuple[float, int, int, list[int]]:
    """Return timestamp (ms), prompt and output tokens, and block ids."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        fields = ", ".join(MOONCAKE_FIELDS)
        raise ValueError(f"{where}: {line.strip()[:40]!r}: expected a JSON object with {fields}")  # noqa: TRY004
    for name, kind in MOONCAKE_FIELDS.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing: found {', '.join(row) or 'an empty object'}")
        try:
            row[name] = kind(row[name])
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{where}: {name} = {row[name]!r}: expected a number") from None
    try:
        blocks = [int(block) for block in row.get("hash_ids", ())]
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where}: hash_ids: expected a list of whole numbers") from None
    return row["timestamp"], row["input_length"], row["output_length"], blocks


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else _open(path) as file:
            yield from file
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path}: cannot be read: {reason}") from None


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _read_texts(path: Path) -> dict[str, list[str]]:
    reader = csv.reader(_lines(path))
    header = [_ALIASES.get(name.strip(), name.strip()) for name in next(reader, [])]
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError(f"{path}:1: {header[0]!r}: expected columns separated by commas")
    columns: dict[str, list[str]] = {name: [] for name in header}
    if len(columns) != len(header):
        raise ValueError(f"{path}:1: {header}: expected every column name once")
    for row in reader:
        if len(row) != len(header):
            raise ValueError(f"{path}:{reader.line_num}: {len(row)} values: expected {len(header)}, as in the header")
        for name, value in zip(header, row, strict=True):
            columns[name].append(value)
    return columns


def _times(path: Path, texts: list[str]) -> npt.NDArray[np.float64]:
    times = np.array([_seconds(path, text, _FIRST_ROW + i) for i, text in enumerate(texts)])
    late = np.flatnonzero(np.diff(times) < 0)
    if len(late):
        row = int(late[0]) + 1
        where, before = f"{path}:{_FIRST_ROW + row}", texts[row - 1]
        raise ValueError(f"{where}: arrived_at_s = {texts[row]}: expected not before the row above ({before})")
    return times - times[0] if ":" in texts[0] else times  # calendar times count from the first


def _seconds(path: Path, text: str, line: int) -> float:
    try:
        value = _calendar_seconds(text.strip()) if ":" in text else float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{path}:{line}: arrived_at_s = {text!r}: expected seconds >= 0 or a time stamp")
    return value


def _calendar_seconds(text: str) -> float:
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _counts(path: Path, name: str, texts: list[str]) -> npt.NDArray[np.int64]:
    try:
        values = np.array(texts, np.float64)
    except ValueError:
        values = np.array([_number(text) for text in texts])
    bad = np.flatnonzero(~(values >= 0) | (values != np.floor(values)) | np.isinf(values))
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"{path}:{_FIRST_ROW + row}: {name} = {texts[row]!r}: expected a whole number >= 0")
    return values.astype(np.int64)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
