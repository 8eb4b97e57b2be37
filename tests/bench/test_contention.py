"""A server that others hold up is told by how long its busiest thread waits for a processor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.bench.contention import CpuContention, threads_of

BUSY = "while True: pass"
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}], start_new_session=True)"


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.parametrize("code", [BUSY, LAUNCHER], ids=["itself", "its child in a session of its own"])
def test_a_server_that_shares_its_processor_with_others_waits_for_it(code):
    cpu = [min(os.sched_getaffinity(0))]
    pinned = f"import os; os.sched_setaffinity(0, {cpu})\n"
    server, other = (subprocess.Popen([sys.executable, "-c", pinned + one]) for one in (code, BUSY))
    try:
        time.sleep(1.0)
        with CpuContention(SimpleNamespace(process=server)) as others:
            time.sleep(1.0)
            threads = len(threads_of(SimpleNamespace(process=server)))
    finally:
        for pid in [*children(server.pid), server.pid, other.pid]:
            os.kill(pid, signal.SIGKILL)
        server.wait()
        other.wait()
    assert threads == (1 if code is BUSY else 2)
    assert 0.1 < others.waited <= 1.0
