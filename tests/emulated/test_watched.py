"""A real server seen from outside: pages, metrics, spans and JSON log lines say the same of the same requests."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.collector import attributes
from tests.emulated.small import serve_small_device
from tests.servers import is_healthy, running, wait_until

psutil = pytest.importorskip("psutil")  # comes with vLLM
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
PROMISED = {"class": "chat", "ttft_ms": 5000, "tpot_ms": 300}
SPAN = "POST /v1/completions"
CLIENT_SPAN = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("watched")
    command, port = serve_small_device(folder, kv_tokens=4096, output_tokens=0)
    command += ["--otlp-traces-endpoint", collector.url, "--log-format", "json"]
    log = folder / "server.log"
    with (
        running(command, log, environment={"OTEL_BSP_SCHEDULE_DELAY": "200"}) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        wait_until(lambda: is_healthy(client), process, log, patience_s=480)
        client.log, client.process = log, process
        yield client


def ask(server, trace_id, slo, **body):
    headers = {"traceparent": f"00-{trace_id}-{CLIENT_SPAN}-01"}
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 25, "ignore_eos": True, "slo": slo, **body}
    answer = server.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["slo"]


def record(server, slo_id):
    return server.get(f"/v1/slo/requests/{slo_id}").json()


def sample(server, name, **labels):
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


def log_lines(server):
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def told(server, slo_id):
    """Return what the log's line about a request says, once it is there."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for line in log_lines(server):
            if line.get("slos_serve", {}).get("id") == slo_id:
                return line
        time.sleep(0.1)
    pytest.fail(f"no line about {slo_id}: {server.log.read_text()[-3000:]}")


@contextlib.contextmanager
def held_up(server):
    """Hold the engine's process up, as a machine does that has no time for it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [one for one in children if "EngineCore" in one.name() or "EngineCore" in " ".join(one.cmdline())]
    engine.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        engine.send_signal(signal.SIGCONT)


def test_a_kept_promise_is_the_same_in_body_page_span_and_metrics(server, collector):
    trace_id = "1" * 32
    before = sample(server, "slos_serve_promises_total", result="kept")
    slo = ask(server, trace_id, PROMISED)
    assert (slo["verdict"], slo["outcome"]) == ("promised", "met")
    ours, engines = collector.wait_for(SPAN, trace_id), collector.wait_for("llm_request", trace_id)
    said, known = attributes(ours), record(server, slo["id"])
    assert (ours.parent_span_id.hex(), engines.parent_span_id) == (CLIENT_SPAN, ours.span_id)
    assert (said["id"], said["class"], said["promise_kept"], said["outcome"]) == (slo["id"], "chat", True, "met")
    assert (said["promise.ttft_ms"], said["promise.tpot_ms"]) == (5000, 300)
    assert said["ttft_ms"] == slo["measured"]["ttft_ms"] == known["ttft_ms"]
    assert said["num_output_tokens"] == 25
    assert {stage: said[f"least_slack_ms.{stage}"] for stage in ("prefill", "answer")} == known["least_slack_ms"]
    assert said["least_slack_ms.prefill"] == pytest.approx(5000 - said["ttft_ms"], abs=0.01)
    assert sample(server, "slos_serve_promises_total", result="kept") == before + 1
    for stage in ("prefill", "answer"):
        assert sample(server, "slos_serve_slack_seconds_count", stage=stage, **{"class": "chat"}) == before + 1


def test_a_declined_request_is_told_in_the_log_with_its_reason_and_ids(server, collector):
    trace_id = "2" * 32
    slo = ask(server, trace_id, {"class": "coding", "ttft_ms": 2, "tpot_ms": 2})
    assert (slo["verdict"], slo["reason"], slo["outcome"]) == ("best-effort", "too-tight", "declined")
    line, said = told(server, slo["id"]), attributes(collector.wait_for(SPAN, trace_id))
    fields = line["slos_serve"]
    assert (line["level"], fields["event"], fields["reason"]) == ("INFO", "declined", "too-tight")
    assert fields["request_id"] == said["request_id"]
    assert (said["reason"], said["asked.ttft_ms"]) == ("too-tight", 2)
    assert "promise_kept" not in said
    assert sample(server, "slos_serve_verdicts_total", reason="too-tight", **{"class": "coding"}) == 1
    why = " ".join(server.get(f"/v1/slo/requests/{slo['id']}/explanation").json()["story"])
    assert "too-tight" in why
    assert "An idle engine would take" in why


def test_a_promise_that_a_held_up_engine_breaks_is_a_warning_a_span_and_a_negative_slack(server, collector):
    trace_id = "3" * 32
    body = {"model": "m", "prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}
    headers = {"traceparent": f"00-{trace_id}-{CLIENT_SPAN}-01"}
    slo = {"class": "summarization", "ttft_ms": 1000, "tpot_ms": 50}
    with server.stream("POST", "/v1/completions", json={**body, "slo": slo}, headers=headers) as answer:
        slo_id, verdict = answer.headers["x-slo-id"], answer.headers["x-slo-verdict"]
        with held_up(server):
            time.sleep(5)
        answer.read()
    assert verdict == "promised"
    line, said = told(server, slo_id), attributes(collector.wait_for(SPAN, trace_id))
    assert (line["level"], line["slos_serve"]["event"]) == ("WARNING", "broken")
    assert said["promise_kept"] is False
    least = min(value for name, value in said.items() if name.startswith("least_slack_ms"))
    assert least < 0
    late = {"class": "summarization", "le": "0.0"}
    assert sample(server, "slos_serve_slack_seconds_bucket", **late) >= 1
    assert sample(server, "slos_serve_promises_total", result="broken", **{"class": "summarization"}) == 1


def test_a_server_whose_engine_does_not_answer_is_scraped_and_says_since_when(server):
    ask(server, "4" * 32, PROMISED)
    with held_up(server):
        before = sample(server, "slos_serve_engine_heard_timestamp_seconds")
        time.sleep(7)
        assert sample(server, "slos_serve_engine_heard_timestamp_seconds") < time.time() - 5
        assert sample(server, "slos_serve_engine_heard_timestamp_seconds") <= before + 2
        status = server.get("/v1/slo/status").json()
        assert status["snapshot_age_s"] > 5
    until = time.monotonic() + 30
    while sample(server, "slos_serve_engine_heard_timestamp_seconds") < time.time() - 3:
        assert time.monotonic() < until
        time.sleep(0.2)


def test_each_line_of_ours_and_of_vllms_log_is_one_json_object(server):
    lines = [line for line in server.log.read_text().splitlines() if re.search(r"INFO|WARNING|ERROR", line)]
    loggers = {json.loads(line)["logger"].split(".")[0] for line in lines}
    assert {"vllm", "uvicorn"} <= loggers


def test_promtool_finds_nothing_wrong_with_what_a_real_server_shows(server):
    path = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    text = "".join(line for line in server.get("/metrics").text.splitlines(keepends=True) if "slos_serve_" in line)
    done = subprocess.run([path, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert "vllm:" in server.get("/metrics").text
