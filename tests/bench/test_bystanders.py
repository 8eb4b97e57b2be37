"""Who used the machine beside a run: what competes counts, what gives way is told apart."""

import subprocess
import sys

import pytest

from slos_serve.bench.bystanders import Bystanders

BUSY = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
IDLE_CLASS = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"


@pytest.mark.parametrize(("before", "attribute"), [("", "share"), (IDLE_CLASS, "yielding")])
def test_what_competes_and_what_gives_way_are_told_apart(before, attribute):
    pipe = subprocess.PIPE
    with (
        Bystanders(()) as others,
        subprocess.Popen([sys.executable, "-c", before + BUSY], stdin=pipe, stdout=pipe) as process,
    ):
        assert process.stdout.readline()
        others._look()
        process.stdin.close()
    assert getattr(others, attribute) > 0
