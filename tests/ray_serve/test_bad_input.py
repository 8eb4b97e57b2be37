"""What cannot work is said at once and in one line; nothing is started for it."""

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


def test_what_listens_at_the_address_and_is_no_ray_head_is_told_in_seconds(model):
    pytest.importorskip("ray.serve.llm")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = serve(model, "--ray-address", f"127.0.0.1:{listener.getsockname()[1]}")
    assert done.returncode == 2, done.stderr
    assert "is no Ray head" in done.stderr.strip().splitlines()[-1]
