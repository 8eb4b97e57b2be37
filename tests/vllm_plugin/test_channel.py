"""The folder in which an engine and its API servers meet: one engine's alone, and only its own things are removed."""

import stat
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from slos_serve.vllm_plugin.scheduler import SloScheduler
from slos_serve.vllm_plugin.testing import make_config, make_scheduler
from slos_serve.vllm_plugin.wire import channel
from slos_serve.vllm_plugin.wire.channel import Publisher, Seat, address, clear_up, engine_folder, zmq
from slos_serve.vllm_plugin.wire.control import ControlServer, ask


@pytest.fixture
def folder(tmp_path_factory):
    """Return a folder whose path is short enough for a socket."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as below:
        yield Path(below) / "abcde-0"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_only_its_user_can_enter_the_folder_and_connect(folder):
    seat, publisher = Seat(folder), Publisher(f"ipc://{folder}/out.sock")
    assert mode(folder) == 0o700
    assert mode(folder / "out.sock") == 0o600
    publisher.close()
    seat.leave()
    assert not folder.exists()


def test_two_engines_never_share_a_folder(folder):
    seat = Seat(folder)
    with pytest.raises(OSError, match="another engine of this user holds it"):
        Seat(folder)
    clear_up(folder)  # as an API server does that believes its engine gone
    assert folder.exists()
    seat.leave()
    Seat(folder).leave()


def test_what_a_killed_engine_left_is_cleared_up_and_can_be_taken_again(folder):
    folder.mkdir(mode=0o700)
    for name in (*channel.SOCKETS, channel.LOCK):
        (folder / name).touch()
    clear_up(folder)
    assert not folder.exists()
    clear_up(folder)
    seat = Seat(folder)
    assert mode(folder) == 0o700
    seat.leave()


def test_a_file_that_was_not_bound_is_left_alone(folder):
    taken = folder / "out.sock"
    taken.mkdir(parents=True)
    (taken / "precious").touch()
    publisher = Publisher(f"ipc://{taken}")
    assert "out.sock cannot be bound" in publisher.problem
    publisher.send({"v": 1})
    publisher.close()
    control = ControlServer(f"ipc://{taken}", dict)
    control.close()
    assert (taken / "precious").exists()


def test_an_engine_without_a_channel_starts_says_why_once_and_only_observes(tmp_path, folder, perf, caplog):
    folder.parent.chmod(0o755)
    (folder.parent / "file").touch()
    slo = {"mode": "enforce", "channel_dir": str(folder.parent / "file")}
    scheduler = make_scheduler(tmp_path, cls=SloScheduler, config=make_config(tmp_path, slo=slo))
    try:
        assert not scheduler.slo.is_enforcing
        assert "no channel to the API server" in scheduler.slo.mode_reason
        lines = [line for line in caplog.messages if "no channel" in line and "only observes" in line]
        assert len(lines) == 1
    finally:
        scheduler.shutdown()


def test_a_second_engine_with_the_same_address_only_observes_and_leaves_the_first_alone(tmp_path, folder, perf):
    slo = {"mode": "enforce", "channel_dir": str(folder.parent)}
    config = make_config(tmp_path, slo=slo)
    first = make_scheduler(tmp_path, cls=SloScheduler, config=config)
    second = make_scheduler(tmp_path, cls=SloScheduler, config=config)
    try:
        where = address(config.instance_id, 0, "control", str(folder.parent))
        assert "another engine" in second.slo.mode_reason
        second.shutdown()
        assert ask(where, {"mode": "observe"}, timeout_s=10)["mode"] == "observe"
        assert (first.slo.standing.modes.engine, second.slo.standing.modes.engine) == ("observe", "enforce")
    finally:
        first.shutdown()
    assert not engine_folder(config.instance_id, 0, str(folder.parent)).exists()


def test_a_question_in_several_parts_is_answered_and_the_next_one_too(folder):
    import threading

    folder.mkdir()
    where = f"ipc://{folder}/control.sock"
    server = ControlServer(where, lambda question: {"got": question})
    thread = threading.Thread(target=lambda: [server.serve(5) for _ in range(2)])
    thread.start()
    context = zmq.Context()
    client = context.socket(zmq.REQ)
    client.connect(where)
    client.send_multipart([b"{", b"}"])
    assert client.poll(5000)
    assert b"error" in client.recv()
    client.close(linger=0)
    context.term()
    assert ask(where, {"x": 1}, timeout_s=5) == {"got": {"x": 1}}
    thread.join()
    server.close()
