"""Where files live that can be made again, and how files and folders come into being whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder below `$XDG_CACHE_HOME/slos-serve` (`~/.cache/slos-serve`), made if absent."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    folder = root.joinpath("slos-serve", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `target`, whose folder is made, at once when the block ends, or never."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        draft = Path(folder, target.name)
        yield draft
        draft.replace(target)


def write_json(document: object, path: Path) -> None:
    """Write a JSON file at once: a reader sees the old one or the whole new one."""
    with complete_file(path) as draft:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `target` at once when the block ends, or never.

    Where another process was quicker, its folder stays and this one goes.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    draft.chmod(0o755)
    try:
        yield draft
        with contextlib.suppress(FileExistsError, OSError):
            draft.rename(target)
        if not target.is_dir():
            raise OSError(f"{target}: could not be put in place")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
