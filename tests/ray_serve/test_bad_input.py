"""What cannot work is said at once and in one line; nothing is started for it."""

import os
import socket
import subprocess
import sys

import pytest

from slos_serve.serving.platforms import num_cores

pytest.importorskip("vllm")


def serve(model, *flags):
    command = [sys.executable, "-m", "slos_serve.cli", "serve", str(model), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--replicas", "0"], "--replicas = 0: expected 1 or more"),
        (["--replicas", str(num_cores() + 1)], f"expected at most {num_cores()}"),
        (["--replicas", "2", "--router", "random"], "--router = 'random': expected one of"),
        (["--router", "slo"], "expected --replicas beside it"),
        (["--ray-address", "nowhere"], "HOST:PORT"),
        (["--ray-address", "127.0.0.1:1"], "the address of a running cluster"),
        (["--replicas", "2", "--api-key", "secret"], "--api-key"),
        (["--replicas", "2", "--no-slo"], "expected no --no-slo beside it"),
    ],
)
def test_it_ends_with_status_2_and_one_line(model, flags, says):
    done = serve(model, *flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_api_key_that_nobody_would_ask_for_is_refused_and_not_repeated(model, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    done = serve(model, "--replicas", "2")
    assert done.returncode == 2, done.stderr
    assert "VLLM_API_KEY" in done.stderr
    assert "hunter2" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    monkeypatch.delenv("VLLM_API_KEY")
    assert "hunter2" not in serve(model, "--replicas", "2", "--api-key", "hunter2").stderr


def test_a_cluster_of_our_own_asks_for_a_token_with_a_home_and_without(monkeypatch, tmp_path):
    pytest.importorskip("ray.serve.llm")
    from slos_serve.ray_serve import names
    from slos_serve.ray_serve.cluster import ask_for_token

    monkeypatch.setattr(names, "read_environment_again", lambda: None)  # this process's Ray stays as it is
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "x")  # so that what is set below goes away after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ask_for_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/nonexistent")
    ask_for_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    ask_for_token()
    assert os.environ["RAY_AUTH_TOKEN"] == token
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ask_for_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_what_listens_at_the_address_and_is_no_ray_head_is_told_in_seconds(model):
    pytest.importorskip("ray.serve.llm")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = serve(model, "--ray-address", f"127.0.0.1:{listener.getsockname()[1]}")
    assert done.returncode == 2, done.stderr
    assert "is no Ray head" in done.stderr.strip().splitlines()[-1]
