"""Where files live that can be made again, and how files and folders come into being whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slos_serve.places import private_folder, writable


def cache_folder(*parts: str) -> Path:
    """Return a folder below `$XDG_CACHE_HOME/slos-serve` (`~/.cache/slos-serve`), made if absent.

    Where that cannot be written it is one below the temporary folder, of this user alone; `why_not_usual` says why.
    """
    try:
        return writable(_usual_root().joinpath(*parts))
    except (OSError, RuntimeError):
        return private_folder("cache", *parts)


def cache_path(folder: str, name: str) -> Path:
    """Return the file or folder `name` where it is, even where nothing can be added to it, else where to make it."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _usual_root() / folder / name
        if path.exists():
            return path
    return cache_folder(folder) / name


def why_not_usual() -> str:
    """Return why the cache is not in its usual place; "" where it is."""
    try:
        writable(_usual_root())
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def _usual_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "slos-serve"


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
