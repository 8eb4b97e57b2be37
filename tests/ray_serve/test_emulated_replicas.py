"""Real replicas on a real Ray, each on an emulated device: promised, kept, and said to be emulated everywhere."""

import time

import httpx
import pytest
from tests.emulated.small import STEP_S, serve_small_device
from tests.servers import running, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
START_S = 300.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray.serve.llm")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("emulated")
    command, port = serve_small_device(folder, kv_tokens=8192, output_tokens=0)
    command += ["--replicas", "2", "--json"]
    log = folder / "cluster.log"

    def both_plan():
        replicas = (client.get("/v1/slo/status").json()["snapshot"] or {}).get("replicas", [])
        return len(replicas) == 2 and all(one["plans"] for one in replicas)

    with (
        running(command, log, end_s=120) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        assert process.stdout.readline(), log.read_text(errors="replace")[-4000:]
        wait_until(both_plan, process, log, patience_s=START_S)
        client.log = log
        yield client


def complete(client, **body):
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "Once upon a time", **body})
    assert answer.status_code == 200, answer.text
    return answer


def test_a_promise_is_given_and_kept_and_a_step_takes_as_long_as_the_file_says(cluster):
    started = time.perf_counter()
    answer = complete(cluster, max_tokens=30, slo={"ttft_ms": 60_000, "tpot_ms": 5_000})
    assert time.perf_counter() - started >= 30 * STEP_S
    assert answer.headers["x-slo-verdict"] == "promised"
    assert answer.json()["slo"]["outcome"] == "met"
    assert answer.json()["usage"]["completion_tokens"] == 30


def test_log_status_metrics_and_each_replica_say_that_it_is_emulated(cluster):
    complete(cluster, max_tokens=2)
    status = cluster.get("/v1/slo/status").json()
    assert status["device"]["hardware"] == "small"
    assert all(one["device"]["hardware"] == "small" for one in status["snapshot"]["replicas"])
    assert "slos_serve_emulated_device 1.0" in cluster.get("/metrics").text
    assert "the device is EMULATED" in cluster.log.read_text(errors="replace")
