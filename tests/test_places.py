"""Private folders, and where sockets can live."""

import errno
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from slos_serve import places
from slos_serve.commands import doctor
from slos_serve.places import open_new, private_folder, socket_root


@pytest.fixture(autouse=True)
def _temporary(monkeypatch, tmp_path):
    """Give each test a short temporary folder of its own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        yield


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_folder_is_for_its_user_alone_whatever_the_umask():
    old = os.umask(0)
    try:
        folder = private_folder("faults")
    finally:
        os.umask(old)
    assert folder == Path(tempfile.gettempdir(), f"slos-serve-{os.getuid()}", "faults")
    assert mode(folder.parent) == 0o700


def test_a_private_folder_that_others_could_enter_is_closed_to_them():
    folder = private_folder()
    folder.chmod(0o777)
    assert mode(private_folder()) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used():
    os.chown(private_folder(), 12345, 12345)
    with pytest.raises(PermissionError, match="expected a folder of this user"):
        private_folder()


def test_a_link_in_place_of_a_private_folder_is_not_followed(tmp_path):
    Path(tempfile.gettempdir(), f"slos-serve-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        private_folder("x")
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_replaces_a_link_and_does_not_follow_it(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "dump.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    with open_new(path) as file:
        file.write("{}")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "{}", False)
    assert mode(path) == 0o600


def test_sockets_live_in_the_runtime_folder_where_there_is_one(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        assert socket_root() == Path(folder) / f"slos-serve-{os.getuid()}"


@pytest.mark.parametrize("trouble", ["long", "absent", "readonly", "refuses"])
def test_where_a_folder_cannot_hold_sockets_the_next_one_is_taken_and_doctor_says_so(monkeypatch, trouble):
    with tempfile.TemporaryDirectory(dir="/tmp") as below:
        wanted = {"long": f"{below}/{'x' * 100}", "absent": "/nonexistent/run", "readonly": "/proc/self"}
        folder = Path(wanted.get(trouble, below))
        if trouble == "long":
            folder.mkdir()
        if trouble == "refuses":  # as a network disk does
            real = places.check_socket

            def refuse(at):
                if at.is_relative_to(below):
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
                real(at)

            monkeypatch.setattr(places, "check_socket", refuse)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        assert socket_root() == private_folder()
        finding = doctor._sockets(None)
        assert finding.status == "warn"
        assert str(folder) in finding.detail
        assert "XDG_RUNTIME_DIR" in finding.advice


def test_where_no_folder_holds_sockets_the_error_names_each(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no sockets here")))
    with pytest.raises(OSError, match=r"no folder for sockets \(/tmp/.*: no sockets here; /tmp: no sockets here\)"):
        socket_root()
    assert doctor._sockets(None).status == "fail"
