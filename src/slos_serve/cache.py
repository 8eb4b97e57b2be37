"""Where files live that can be made again, and how files and folders come into being whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder below `$XDG_CACHE_HOME/slos-serve` (`~/.cache/slos-serve`), made if absent.

    Where that cannot be written it is one below the temporary folder, of this user alone; `why_not_usual` says why.
    """
    try:
        return _made(_usual_root().joinpath(*parts))
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
        _made(_usual_root())
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def private_folder(*parts: str) -> Path:
    """Return a folder below the temporary one that only this user can enter, made if absent.

    `PermissionError` where somebody else has taken its name: what lies there cannot be trusted.
    """
    root = Path(tempfile.gettempdir()) / f"slos-serve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "expected a folder of this user", str(root))
    if stat.S_IMODE(found.st_mode) != 0o700:
        root.chmod(0o700)
    return _made(root.joinpath(*parts))


def _usual_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "slos-serve"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


@contextlib.contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `target`, whose folder is made, at once when the block ends, or never."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        draft = Path(folder, target.name)
        yield draft
        draft.replace(target)


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
