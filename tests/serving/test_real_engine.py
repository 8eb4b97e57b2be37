"""The whole of `slos-serve serve` on a real engine: measured, ready, answering with a promise, and gone when told."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tests.servers import ENVIRONMENT

from slos_serve import cli

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def post(url, body):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with opener.open(request, timeout=120) as response:
        return dict(response.headers), json.loads(response.read())


def wait_for_a_plan(record):
    """Lines are written twice a second; what is not when the engine is told to end may be lost."""
    for _ in range(100):
        if '"kind": "plan"' in record.read_text() or '"kind":"plan"' in record.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("no plan in the record after ten seconds")


def test_a_server_without_a_profile_measures_itself_keeps_promises_and_can_say_why(tmp_path, free_port, capsys):
    pytest.importorskip("vllm")
    from slos_serve.bench.model import ensure_demo_model

    profile, record = tmp_path / "profile.json", tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "slos_serve.cli", "serve", str(ensure_demo_model()), "--json"]
    command += ["--host", "127.0.0.1", "--port", str(free_port), "--served-model-name", "demo", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", "256M"]
    command += ["--profile", str(profile), "--reprofile", "--record", str(record), "--dtype", "float32"]
    with (tmp_path / "server.log").open("w") as log:
        env = {**os.environ, **ENVIRONMENT}  # with other threads the model may say something else
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = child.stdout.readline()
            assert line, (tmp_path / "server.log").read_text()[-4000:]
            ready = json.loads(line)
            assert ready["mode"] == "enforce"
            assert json.loads(profile.read_text())["num_steps"] >= 50

            # Two minutes for a first token can be promised on any machine, however busy.
            body = {"model": "demo", "max_tokens": 16, "temperature": 0, "slo": {"ttft_ms": 120_000, "tpot_ms": 20_000}}
            body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
            headers, answer = post(f"{ready['url']}/v1/chat/completions", body)
            assert "Paris" in answer["choices"][0]["message"]["content"]
            assert headers["x-slo-verdict"] == "promised"
            assert cli.main(["explain", answer["id"], "--target", ready["url"]]) == 0
            assert "promised" in capsys.readouterr().out
            wait_for_a_plan(record)  # lines are written twice a second
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                out, _ = child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
    assert out == ""
    assert child.returncode == 0
    assert "Traceback" not in Path(log.name).read_text()

    assert cli.main(["replay", str(record), "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["num_plans"] == replayed["num_same"] >= 1
    assert replayed["num_steered"] == replayed["num_exact"] >= 1
    assert cli.main(["explain", answer["id"], "--record", str(record)]) == 0
    assert answer["id"] in capsys.readouterr().out
