"""On a vLLM that lacks what the plug-in imports, and in a process where Numba came first, the engine goes on."""

from __future__ import annotations

import subprocess
import sys

from slos_serve.vllm_plugin.scheduler import SloScheduler
from slos_serve.vllm_plugin.testing import Engine, make_request, make_scheduler

# What vLLM does with all modules when it makes a worker on CPUs, from 0.31 on.
SCAN = """
for module in list(sys.modules.values()):
    for value in list(getattr(module, "__dict__", {}).values()):
        if hasattr(value, "__dict__"):
            vars(value).get("kernel")
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_naming_the_scheduler_class_brings_no_numba_before_the_worker() -> None:
    run("import slos_serve.vllm_plugin.scheduler\nassert 'numba' not in sys.modules")


def test_vllm_can_make_a_worker_after_numba_was_imported_too() -> None:
    run(f"import slos_serve.core.planner\nassert 'numba' in sys.modules\n{SCAN}")


def test_a_vllm_that_lacks_what_the_plug_in_imports_serves_in_its_own_order(tmp_path, monkeypatch, vllm_log) -> None:
    monkeypatch.setitem(sys.modules, "slos_serve.vllm_plugin.runtime", None)
    scheduler = make_scheduler(tmp_path, cls=SloScheduler)
    try:
        lines = [line for line in vllm_log.messages if "is off" in line]
        assert len(lines) == 1
        assert "slos_serve.vllm_plugin.runtime" in lines[0]
        engine = Engine(scheduler)
        for i in range(4):
            scheduler.add_request(make_request(f"r{i}", args={"slo_class": "chat"}, max_tokens=3))
        engine.run()
        assert set(engine.finished) == {f"r{i}" for i in range(4)}
    finally:
        scheduler.shutdown()
