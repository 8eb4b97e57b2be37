from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slos_serve.bench.engines import EngineError, ServerProcess, ServerProcesses, free_port
from slos_serve.terminal.progress import Bar, Progress
from slos_serve.terminal.signals import ending_by_signal

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        probe = self.headers.get("x-slos-serve-probe")
        self.send_response(200 if probe or self.path != "/health" else int(sys.argv[2])); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def launch(fleet, tmp_path, *, code=SERVER, status=200):
    port, log = free_port(), tmp_path / "engine.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(status)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    engine = ServerProcess(name="one", url=f"http://127.0.0.1:{port}", log=log, process=process)
    fleet.engines.append(engine)
    return engine


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_is_waited_for_and_ended_with_its_children(tmp_path):
    with ServerProcesses(tmp_path) as fleet:
        engine = launch(fleet, tmp_path)
        fleet.wait([engine], timeout_s=20)
        child = int(engine.log.read_text().split()[1])
        assert is_alive(child)
    assert engine.process.poll() is not None
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_servers_are_ended_when_the_work_fails(tmp_path):
    fleet = ServerProcesses(tmp_path)
    engine = launch(fleet, tmp_path)

    def work():
        with fleet:
            raise RuntimeError("the work failed")

    with pytest.raises(RuntimeError):
        work()
    assert engine.process.poll() is not None
    assert fleet.engines == []


def test_a_server_that_is_being_profiled_is_ready_for_a_probe_only(tmp_path):
    with ServerProcesses(tmp_path) as fleet:
        engine = launch(fleet, tmp_path, status=503)
        fleet.wait([engine], timeout_s=20, probe=True)
        assert not engine.is_ready()
        with pytest.raises(EngineError, match="not ready after"):
            fleet.wait([engine], timeout_s=0.3)


def test_a_server_that_dies_is_told_with_its_last_words(tmp_path):
    code = "print('loading'); raise SystemExit('ValueError: no such model')"
    with ServerProcesses(tmp_path) as fleet:
        engine = launch(fleet, tmp_path, code=code)
        with pytest.raises(EngineError, match="ended with status 1: ValueError: no such model"):
            fleet.wait([engine], timeout_s=20)


def test_sigterm_is_as_good_as_ctrl_c():
    def work():
        with ending_by_signal():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        work()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_where_nobody_watches():
    stream = io.StringIO()
    with Progress("measuring", stream=stream) as progress:
        progress(0.5)
    assert stream.getvalue() == "measuring ...\n"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("slos_serve.terminal.progress.EVERY_S", 0.0)
    stream = Terminal()
    with Progress("measuring", stream=stream) as progress:
        progress(0.5)
        progress(float("nan"))
    assert "measuring [############............]" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_bar_counts_parts_on_a_terminal_and_names_those_that_ended_elsewhere(monkeypatch):
    monkeypatch.setattr("slos_serve.terminal.progress.EVERY_S", 0.0)
    monkeypatch.setattr("slos_serve.terminal.progress.AFTER_S", 0.0)
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        with Bar("2 searches", 2, stream=stream) as bar:
            bar(1, 30)
            bar(1, 31, "coding")
            bar.note("as it is")
    assert f"2 searches [{'#' * 20}{'.' * 20}] 1/2, 31 runs, 0 s\r\x1b[Kas it is\n" in terminal.getvalue()
    assert log.getvalue() == "1/2 coding (31 runs, 0 s)\nas it is\n"


def test_a_bar_shows_nothing_of_what_is_soon_over():
    terminal = Terminal()
    with Bar("2 searches", 2, stream=terminal) as bar:
        bar(1, 30, "coding")
    assert terminal.getvalue() == ""
