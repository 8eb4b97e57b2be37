"""Folders that only this user can enter, and where among them sockets can live.

A socket's path holds 107 bytes, and network disks refuse sockets: the first of several places that will do is taken,
the same in every process of a user with the same environment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path
from typing import TextIO

MAX_SOCKET_PATH = 107
SOCKET_NAME_BYTES = 40  # what engines may add below `socket_root`


def private_folder(*parts: str, below: Path | None = None) -> Path:
    """Return a folder below `below` (the temporary folder) that only this user can enter, made if absent.

    `PermissionError` where somebody else has taken its name: what lies there cannot be trusted.
    """
    root = (below or Path(tempfile.gettempdir())) / f"slos-serve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "expected a folder of this user", str(root))
    if stat.S_IMODE(found.st_mode) != 0o700:
        root.chmod(0o700)
    return writable(root.joinpath(*parts))


def writable(folder: Path) -> Path:
    """Return a folder, made if absent; `OSError` where nothing can be put into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def open_new(path: Path) -> TextIO:
    """Open a new file that only this user can read; what lies at its path, a link too, is removed and not followed."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w", encoding="utf-8")


def socket_root() -> Path:
    """Return the private folder below which engines keep their sockets; `OSError` says why there is none."""
    base = os.environ.get("XDG_RUNTIME_DIR") or ""
    candidates = [Path(base)] if Path(base).is_absolute() else []
    reasons = []
    for below in dict.fromkeys([*candidates, Path(tempfile.gettempdir()), Path("/tmp")]):  # noqa: S108 -- short
        try:
            folder = private_folder(below=below)
            check_socket(folder)
        except OSError as error:
            reasons.append(f"{below}: {error.strerror or error}")
        else:
            return folder
    raise OSError(f"no folder for sockets ({'; '.join(reasons)})")


def check_socket(folder: Path) -> None:
    """Raise `OSError` where a socket with a name of usual length could not be bound in a folder."""
    room = MAX_SOCKET_PATH - SOCKET_NAME_BYTES
    if len(os.fsencode(folder)) > room:
        raise OSError(errno.ENAMETOOLONG, f"longer than {room} bytes")
    path = folder / f".try-{secrets.token_hex(4)}"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    finally:
        path.unlink(missing_ok=True)
