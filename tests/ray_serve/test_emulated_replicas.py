"""Real replicas on a real Ray, on emulated devices: promised, kept, traced, explained, and said to be emulated."""

import os
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from tests.collector import attributes
from tests.emulated.small import STEP_S, serve_small_device
from tests.servers import running, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
START_S = 300.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, collector):
    pytest.importorskip("ray.serve.llm")
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("emulated")
    command, port = serve_small_device(folder, kv_tokens=8192, output_tokens=0)
    command += ["--replicas", "2", "--json", "--otlp-traces-endpoint", collector.url]
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
        client.log, client.process = log, process
        yield client


def complete(client, headers=None, **body):
    body = {"model": "m", "prompt": "Once upon a time", **body}
    answer = client.post("/v1/completions", json=body, headers=headers)
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


def test_the_clients_trace_goes_through_the_front_door_into_the_replicas_engine(cluster, collector):
    trace_id, parent = "5" * 32, "00f067aa0ba902b7"
    context = {"traceparent": f"00-{trace_id}-{parent}-01"}
    answer = complete(cluster, context, max_tokens=4, slo={"ttft_ms": 60_000, "tpot_ms": 5_000})
    door = collector.wait_for("POST /v1/completions", trace_id)
    engines = collector.wait_for("llm_request", trace_id)
    assert (door.parent_span_id.hex(), engines.parent_span_id) == (parent, door.span_id)
    said = attributes(door)
    assert (said["id"], said["promise_kept"]) == (answer.headers["x-slo-id"], True)
    assert said["replica"] in {one["id"] for one in cluster.get("/v1/slo/status").json()["snapshot"]["replicas"]}


def test_the_page_of_a_cluster_has_its_replicas_steps_and_their_profile(cluster):
    until = time.monotonic() + 60
    while True:
        complete(cluster, max_tokens=20, ignore_eos=True)
        shown = cluster.get("/v1/slo/live").json()
        steps = [one["steps"] for one in shown["buckets"] if one.get("steps")]
        if steps and shown["status"]["snapshot"]["profile"]:
            break
        assert time.monotonic() < until, shown
    assert sum(one["decode_tokens"] for one in steps) > 0
    assert sum(one["predicted_s"] for one in steps) > 0
    assert not [line for line in shown["status"]["snapshot"]["replicas"] if "step_sums" in line]


def test_a_declined_request_is_explained_alike_by_page_and_command_with_its_replica_and_picture(cluster, tmp_path):
    answer = complete(cluster, max_tokens=20, ignore_eos=True, slo={"ttft_ms": 2, "tpot_ms": 2})
    slo_id = answer.headers["x-slo-id"]
    assert answer.headers["x-slo-verdict"] == "best-effort"
    why = cluster.get(f"/v1/slo/requests/{slo_id}/explanation").json()
    story = " ".join(why["story"])
    assert "too-tight" in story
    assert "An idle engine would take" in story  # the replica planned its moment again
    assert why["request"]["replica"] in story
    picture = tmp_path / "picture.svg"
    command = [sys.executable, "-m", "slos_serve.cli", "explain", slo_id, "--target", str(cluster.base_url)]
    said = subprocess.run(
        [*command, "--picture", str(picture)], capture_output=True, text=True, check=False, timeout=240
    )
    assert said.returncode == 0, said.stderr
    told = " ".join(said.stdout.split())
    for line in why["story"]:
        assert " ".join(line.split()) in told
    assert picture.read_text().startswith("<svg")
    assert "<svg" in why["picture"]


# -- one replica in pause ---------------------------------------------------------------------------

PAUSE_S = 20.0  # longer than a replica may be silent, or a router waits for a step
PROMISED = {"ttft_ms": 20_000, "tpot_ms": 500}
OPERATOR = """
import sys
import ray
from ray import serve

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
handle = serve.get_deployment_handle(sys.argv[2], "slos-serve")
for line in sys.stdin:
    if line == "pause\\n":
        handle.pause.remote(mode="keep").result()
    elif line == "resume\\n":
        handle.broadcast("resume").results()
    print("done", flush=True)
"""


@pytest.fixture
def order(cluster):
    """A function that gives an operator's order: `pause` to one replica, `resume` to all."""
    lines = [line for one in psutil.Process(cluster.process.pid).children(recursive=True) for line in one.cmdline()]
    address = next(line.partition("=")[2] for line in lines if line.startswith("--gcs-address="))
    command = [sys.executable, "-c", OPERATOR, address, replicas(cluster)[0]["deployment"]]
    env = {**os.environ, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as operator:

        def give(what):
            operator.stdin.write(f"{what}\n")
            operator.stdin.flush()
            assert operator.stdout.readline() == "done\n"

        give("nothing")  # it is connected then
        yield give
        operator.stdin.close()


def replicas(cluster):
    return cluster.get("/v1/slo/status").json()["snapshot"]["replicas"]


def states(cluster):
    """Return who is paused, and who is usable."""
    return sorted((bool(one["paused"]), one["usable"]) for one in replicas(cluster))


def test_a_replica_in_pause_is_passed_over_and_not_replaced(cluster, order):
    before = {one["pid"] for one in replicas(cluster)}
    order("pause")
    wait_until(lambda: states(cluster) == [(False, True), (True, False)], cluster.process, cluster.log)
    until = time.monotonic() + PAUSE_S
    while time.monotonic() < until:
        answer = complete(cluster, max_tokens=2, slo=PROMISED)
        assert (answer.headers["x-slo-verdict"], answer.json()["slo"]["outcome"]) == ("promised", "met")
        time.sleep(0.5)
    assert states(cluster) == [(False, True), (True, False)]
    order("resume")
    wait_until(lambda: states(cluster) == [(False, True)] * 2, cluster.process, cluster.log)
    assert {one["pid"] for one in replicas(cluster)} == before
