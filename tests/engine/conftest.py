"""A real server for contract tests: SmolLM2-135M on vLLM, steered, started once for a module."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.servers import is_healthy, running, wait_until

MAX_MODEL_LEN = 1024
# The shape of the demo model on one CPU thread, so that promises are given without measuring first.
PROFILE = {
    "schema": "slos-serve-profile/1",
    "key": "test",
    "perf_model": {"lines": [{"per_token_s": 1e-3, "per_request_s": 1e-3, "fixed_s": 40e-3}]},
}
CLASSES = """
priority_class: chat
classes:
  impossible: {ttft_ms: 1, tpot_ms: 1, on_unattainable: reject}
  relaxed: {ttft_ms: 60000, tpot_ms: 5000}
  hurried: {ttft_ms: 1, tpot_ms: 1, ttl_ms: 300}
"""


@dataclass(frozen=True)
class Server:
    """A running server. `log` grows while it lives."""

    base_url: str
    model: str
    log: Path

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, timeout=120, trust_env=False, **options)

    def complete(self, **body) -> httpx.Response:
        with self.client() as client:
            return client.post("/v1/chat/completions", json={"model": self.model, **body})

    def slo_status(self) -> dict:
        with self.client() as client:
            return client.get("/v1/slo/status").json()


@pytest.fixture(scope="module")
def in_process_engine() -> Iterator[None]:
    """Let an engine run in this process, on one thread, offline."""
    kept = dict(os.environ)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="WARNING",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def model() -> str:
    """Return the folder of the demo model."""
    from slos_serve.bench.model import ensure_demo_model

    return str(ensure_demo_model())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    from slos_serve.bench.engines import free_port
    from slos_serve.bench.model import ensure_demo_model

    folder = tmp_path_factory.mktemp("server")
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    (folder / "classes.yaml").write_text(CLASSES)
    port = free_port()
    slo = {"safety": {"is_enabled": False}, "fault_dir": str(folder)}
    command = [sys.executable, "-m", "slos_serve.cli", "serve", str(ensure_demo_model()), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--slo-mode", "enforce", "--slo-config", str(folder / "classes.yaml")]
    command += ["--profile", str(folder / "profile.json"), "--served-model-name", "demo", "--enforce-eager"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
    command += ["--kv-cache-memory-bytes", str(256 << 20), "--additional-config", json.dumps({"slo": slo})]
    log = folder / "server.log"
    server = Server(base_url=f"http://127.0.0.1:{port}", model="demo", log=log)
    with running(command, log) as process, server.client() as client:
        wait_until(lambda: is_healthy(client) and enforces(server), process, log)
        yield server


def enforces(server: Server) -> bool:
    """Tell whether the engine is heard and has taken up the profile, which it does with its first step."""
    if server.slo_status()["effective_mode"] == "enforce":
        return True
    server.complete(messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    return False
