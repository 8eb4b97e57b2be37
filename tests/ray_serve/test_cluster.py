"""Two real replicas of a tiny vLLM on a real Ray, started as users start them."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from parts import write_tiny_model

psutil = pytest.importorskip("psutil")  # comes with vLLM
pytestmark = pytest.mark.engine

START_S = 420
LONG = 900  # tokens: seconds, so that what replicas publish twice a second shows them running
CLASSES = """
classes:
  relaxed: {ttft_ms: 60000, tpot_ms: 5000}
  impossible: {ttft_ms: 1, tpot_ms: 1, on_unattainable: reject}
  hopeless: {ttft_ms: 1, tpot_ms: 1}
"""
PROFILE = {
    "schema": "slos-serve-profile/1",
    "key": "test",
    "max_num_batched_tokens": 256,
    "perf_model": {"lines": [{"per_token_s": 1e-3, "per_request_s": 1e-3, "fixed_s": 20e-3}]},
}
FLAGS = ["--served-model-name", "tiny", "--load-format", "dummy", "--dtype", "float32", "--enforce-eager"]
FLAGS += ["--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"]
FLAGS += ["--kv-cache-memory-bytes", str(64 << 20)]
FLAGS += ["--additional-config", json.dumps({"slo": {"safety": {"is_enabled": False}}})]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """`slos-serve serve --replicas 2` and a client of it."""

    def __init__(self, folder: Path):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = folder / "cluster.log"
        (folder / "profile.json").write_text(json.dumps(PROFILE))
        (folder / "classes.yaml").write_text(CLASSES)
        command = [sys.executable, "-m", "slos_serve.cli", "serve", str(write_tiny_model(folder)), "--replicas", "2"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], "--slo-mode", "enforce", "--json"]
        command += ["--slo-config", str(folder / "classes.yaml"), "--profile", str(folder / "profile.json"), *FLAGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self.log.open("wb"))
        self.ready = self.process.stdout.readline()
        if not self.ready:
            self.process.kill()
            self.process.communicate()
            raise AssertionError(self.log.read_text()[-4000:])

    def client(self):
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def complete(self, **body):
        with self.client() as client:
            return client.post("/v1/completions", json={"model": "tiny", "prompt": "w5 w6 w7", "max_tokens": 4, **body})

    def replicas(self):
        with self.client() as client:
            snapshot = client.get("/v1/slo/status").json()["snapshot"] or {}
        return snapshot.get("replicas", [])

    def wait_for(self, condition, patience_s=START_S):
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if condition(self.replicas()):
                return
            time.sleep(0.25)
        raise AssertionError(f"{self.replicas()} {self.log.read_text()[-3000:]}")

    def counted(self, name):
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def stop(self):
        self.process.terminate()
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def both_plan(replicas):
    return len(replicas) == 2 and all(one["usable"] and one["plans"] for one in replicas)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray.serve.llm")
    pytest.importorskip("vllm")
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        running.wait_for(both_plan)
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
        running.process.stdout.close()


def events(text):
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"], data[-1] == "[DONE]"


def test_the_ready_line_is_one_json_document(cluster):
    document = json.loads(cluster.ready)
    assert (document["model"], document["replicas"], document["mode"]) == ("tiny", 2, "enforce")


def test_a_promise_reaches_the_client_in_headers_and_body(cluster):
    response = cluster.complete(slo={"class": "relaxed"})
    assert response.status_code == 200, response.text
    assert response.headers["x-slo-verdict"] == "promised"
    assert response.headers["x-slo-hops"] == "0"
    body = response.json()
    assert body["slo"]["outcome"] == "met"
    assert body["service_tier"] == "default"


def test_a_stream_ends_with_what_was_promised_and_kept(cluster):
    response = cluster.complete(slo={"class": "relaxed"}, stream=True)
    chunks, done = events(response.text)
    assert done
    assert response.headers["x-slo-verdict"] == "promised"
    assert chunks[-1]["slo"] | {"outcome": "met", "hops": 0} == chunks[-1]["slo"]
    assert sum(len(chunk["choices"]) for chunk in chunks) >= 4


@pytest.mark.parametrize("headers", [{"x-slo-class": "relaxed"}, {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "5000"}])
def test_promises_are_asked_for_in_headers_too(cluster, headers):
    with cluster.client() as client:
        body = {"model": "tiny", "prompt": "w5", "max_tokens": 2}
        response = client.post("/v1/completions", json=body, headers=headers)
    assert response.headers["x-slo-verdict"] == "promised"


def test_chat_is_promised_as_completions_are(cluster):
    with cluster.client() as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "w9 w8"}], "max_tokens": 3}
        response = client.post("/v1/chat/completions", json={**body, "slo": {"class": "relaxed"}})
    assert response.json()["slo"]["verdict"] == "promised"


def test_what_no_replica_can_promise_is_refused_where_it_is(cluster):
    before = cluster.counted('slos_serve_router_hops_total{outcome="passed"}')
    response = cluster.complete(slo={"class": "impossible"})
    assert response.status_code == 429, response.text
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert cluster.counted('slos_serve_router_hops_total{outcome="passed"}') == before


def test_what_no_replica_can_promise_is_served_as_best_effort_where_its_class_says_so(cluster):
    response = cluster.complete(slo={"class": "hopeless"}, stream=True)
    chunks, _ = events(response.text)
    assert response.headers["x-slo-verdict"] == "best-effort"
    assert chunks[-1]["slo"]["hops"] == 0
    assert chunks[-1]["service_tier"] == "flex"


def test_a_request_without_a_promise_is_served_as_by_any_server(cluster):
    response = cluster.complete()
    assert response.status_code == 200
    assert "slo" not in response.json()
    assert not [name for name in response.headers if name.startswith("x-slo")]


@pytest.mark.parametrize(
    ("body", "status"), [({"slo": {"class": "nobody"}}, 400), ({"slo": {"ttft_ms": -1}}, 400), ({"model": "no"}, 404)]
)
def test_bad_input_is_told_before_any_replica_sees_it(cluster, body, status):
    assert cluster.complete(**body).status_code == status


def test_many_requests_at_once_are_spread_and_each_is_answered_once(cluster):
    seen = {one["id"]: one["steps"] or 0 for one in cluster.replicas()}
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda i: cluster.complete(prompt=f"w{i}", max_tokens=40), range(12)))
    assert [reply.json()["usage"]["completion_tokens"] for reply in replies] == [40] * 12
    assert len({reply.json()["id"] for reply in replies}) == 12
    cluster.wait_for(lambda replicas: all((one["steps"] or 0) > seen[one["id"]] for one in replicas), 10)


def test_health_and_the_model_list_are_answered(cluster):
    with cluster.client() as client:
        assert client.get("/health").status_code == 200
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_a_client_that_leaves_frees_its_replica(cluster):
    async def leave():
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60, trust_env=False) as client:
            body = {"model": "tiny", "prompt": "w5", "max_tokens": 900, "stream": True, "ignore_eos": True}
            async with client.stream("POST", "/v1/completions", json={**body, "slo": {"class": "relaxed"}}) as response:
                async for _ in response.aiter_lines():
                    return

    asyncio.run(leave())
    cluster.wait_for(lambda replicas: all(not one["num_running"] for one in replicas), 30)


def family(pid):
    """Return a process and its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_loss_of_a_replica_loses_no_request_and_none_is_answered_twice(cluster):
    def stream(i):
        with cluster.client() as client:
            body = {"model": "tiny", "prompt": f"w{i}", "max_tokens": 400, "stream": True, "ignore_eos": True}
            body |= {"stream_options": {"include_usage": True}, **({"slo": {"class": "relaxed"}} if i % 2 else {})}
            with client.stream("POST", "/v1/completions", json=body) as response:
                text = "".join(response.iter_text())
        chunks, done = events(text)
        error = next((chunk["error"]["message"] for chunk in chunks if "error" in chunk), "")
        usage = next((chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")), None)
        return done, error, usage

    before = {one["pid"] for one in cluster.replicas()}
    with ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(stream, i) for i in range(24)]
        cluster.wait_for(lambda replicas: any(one["num_running"] for one in replicas), 60)
        victim = max(cluster.replicas(), key=lambda one: one["num_running"] + one["num_waiting"])["pid"]
        processes = family(victim)
        processes[0].kill()
        results = [one.result() for one in waiting]
    broken = [error for _, error, _ in results if error]
    assert all(done for done, _, _ in results)
    assert all("breaks off here" in error for error in broken)
    assert [usage for _, error, usage in results if not error] == [400] * (24 - len(broken))
    assert len(broken) < 24
    cluster.wait_for(lambda replicas: both_plan(replicas) and victim not in {one["pid"] for one in replicas})
    assert len({one["pid"] for one in cluster.replicas()} & before) == 1
    assert not [one for one in processes if is_alive(one)]  # its engine does not live on without it


def test_asked_to_end_it_finishes_what_is_under_way_and_leaves_nothing_behind(cluster):
    processes = [process for one in cluster.replicas() for process in family(one["pid"])]

    def long():
        return cluster.complete(max_tokens=LONG, ignore_eos=True, slo={"class": "relaxed"})

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(long)
        cluster.wait_for(lambda replicas: any(one["num_running"] for one in replicas), 30)
        status = cluster.stop()
        assert reply.result().json()["usage"]["completion_tokens"] == LONG
    assert status == 0
    time.sleep(1)
    assert not [one for one in processes if is_alive(one)]
