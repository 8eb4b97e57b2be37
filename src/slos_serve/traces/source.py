"""One trace file, opened: plain or gzipped, a table with a header or JSON objects, told apart by its content.

A file is read once and forwards, so that a pipe does too. What cannot be read at all is a `ValueError` of one line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from slos_serve.traces.rows import listed, shown

HEAD_CHARACTERS = 1 << 16
SAMPLE_OBJECTS = 500
MAX_CELL_CHARACTERS = 1 << 26

_BINARY = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: write it as CSV with arrived_at_s, prompt_tokens, output_tokens",
    b"BZh": "bzip2: gzip is read",
    b"\xfd7zXZ": "xz: gzip is read",
    b"\x28\xb5\x2f\xfd": "Zstandard: gzip is read",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Source:
    """An open file. `text`: how it begins. `notes`: what its format wants to be said about it.

    `block_tokens`: prompt tokens behind one block id, which its format sets before the first row; 0 where unknown.

    A table has a `header`; JSON has a `sample` of its first objects. `names` are the columns or fields seen there.
    """

    def __init__(self, path: str, file: TextIO) -> None:
        self.path = path
        self.notes: list[str] = []
        self.block_tokens = 0
        self.text = file.read(HEAD_CHARACTERS)
        rest = file.readline() if self.text else ""
        self._lines = chain(io.StringIO(self.text + rest, newline=""), file)
        self.is_json = self.text.lstrip()[:1] in ("{", "[")
        self.header: list[str] = []
        self._sample: list[tuple[int, dict[str, Any]]] | None = None
        self._more: Iterator[tuple[int, dict[str, Any]]] = iter(())
        if not self.is_json:
            self._open_table()

    def _open_table(self) -> None:
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        self._reader = csv.reader(self._lines)
        self.header = [name.strip() for name in next(self._reader, [])]
        if len(self.header) == 1 and (";" in self.header[0] or "\t" in self.header[0]):
            raise ValueError(f"{self.path}:1: {shown(self.header[0])}: expected columns separated by commas")
        if len(set(self.header)) != len(self.header):
            raise ValueError(f"{self.path}:1: {listed(self.header)}: expected every column name once")

    @property
    def sample(self) -> list[dict[str, Any]]:
        """The first objects of a JSON file; none of a table."""
        if self._sample is None:
            found = _objects(self.path, self._lines) if self.is_json else iter(())
            self._sample = list(islice(found, SAMPLE_OBJECTS))
            self._more = found
        return [entry for _, entry in self._sample]

    @property
    def names(self) -> frozenset[str]:
        """Columns of the header, or the fields of the first objects."""
        return frozenset(self.header) if self.header else frozenset(chain.from_iterable(self.sample))

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield every object with its line, or with its number in an array."""
        if self.sample and self._sample is not None:
            yield from self._sample
        yield from self._more

    def table(self) -> Iterator[tuple[int, list[str]]]:
        """Yield every row of cells with its line; blank lines are passed over."""
        width = len(self.header)
        for cells in self._reader:
            if len(cells) == width:
                yield self._reader.line_num, cells
            elif any(cell.strip() for cell in cells):
                where = f"{self.path}:{self._reader.line_num}"
                raise ValueError(f"{where}: {len(cells)} values: expected {width}, as in the header")


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open a trace file; whatever makes it unreadable becomes a `ValueError` that names the file."""
    try:
        with path.open("rb") as raw, _as_text(path, raw) as text:
            yield Source(str(path), text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, UnicodeError):
        raise ValueError(
            f"{path}: cannot be read: expected text in UTF-8 (CSV or JSON lines), plain or gzipped"
        ) from None
    except (EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: cannot be read: JSON that is nested too deeply to be a trace") from None


def _as_text(path: Path, raw: io.BufferedReader) -> TextIO:
    magic = raw.peek(8)
    for start, what in _BINARY.items():
        if magic.startswith(start):
            raise ValueError(f"{path}: {what}")
    data: BinaryIO = raw
    if magic.startswith(b"\x1f\x8b"):
        data = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        magic = data.peek(8)
    elif path.suffix.lower() == ".gz" and magic:
        raise ValueError(f"{path}: cannot be read: Not a gzipped file")
    encoding = "utf-16" if magic.startswith(_UTF16) else "utf-8-sig"
    return io.TextIOWrapper(data, encoding=encoding, newline="")


def _objects(path: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield JSON objects from lines, or from one document over many lines."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    number, first = next(numbered, (1, ""))
    try:
        found = json.loads(first)
    except ValueError:
        found = _document(path, number, first, (line for _, line in numbered))
    if isinstance(found, list):
        yield from _elements(path, number, first, found)
        return
    yield number, found
    for number, line in numbered:
        yield number, _object(path, number, line)


def _document(path: str, number: int, first: str, rest: Iterable[str]) -> Any:
    try:
        return json.loads(first + "".join(rest))
    except ValueError:
        raise ValueError(
            f"{path}:{number}: {_start(first)}: expected a JSON object a line, or one JSON array"
        ) from None


def _elements(path: str, number: int, text: str, found: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}:{number}: {_start(text)}: expected a JSON object for each request")  # noqa: TRY004
        yield index, entry


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}:{number}: {_start(line)}: expected a JSON object")  # noqa: TRY004
    return found


def _start(text: str) -> str:
    return repr(text.strip()[:40])
