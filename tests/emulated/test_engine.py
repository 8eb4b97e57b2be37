"""Real vLLM on an emulated device, asynchronous as on GPUs: requests are answered, on time; no weights exist."""

import concurrent.futures
import json
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from tests.emulated.small import STEP_S, serve_small_device
from tests.servers import is_healthy, running, wait_for, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
# Room for a third of what the requests below ask for, so that some are preempted and come back.
KV_TOKENS = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("emulated")
    command, port = serve_small_device(folder, kv_tokens=KV_TOKENS, output_tokens=8)
    log = folder / "server.log"
    url = f"http://127.0.0.1:{port}"
    with (
        running(command, log, environment={"VLLM_SERVER_DEV_MODE": "1"}) as process,
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        wait_until(lambda: is_healthy(client), process, log)
        client.log = log
        yield client


def complete(client, **body):
    answer = client.post("/v1/completions", json={"model": "m", "prompt": "Once upon a time", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_it_says_that_it_is_emulated_in_its_log_and_its_status(server):
    complete(server, max_tokens=2)
    device = server.get("/v1/slo/status").json()["snapshot"]["device"]
    assert device["hardware"] == "small"
    assert "no model runs" in device["leaves_out"]
    log = server.log.read_text()
    assert "slos-serve: the device is EMULATED" in log
    assert "The device is EMULATED" in log


def test_tokens_take_as_long_as_the_file_says(server):
    started = time.perf_counter()
    answer = complete(server, max_tokens=30, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 30
    assert time.perf_counter() - started >= 30 * STEP_S


def test_a_greedy_prompt_always_gets_the_same_text(server):
    one, other = (complete(server, max_tokens=12, temperature=0, ignore_eos=True) for _ in range(2))
    assert one["choices"][0]["text"] == other["choices"][0]["text"]


def test_requests_end_by_themselves_by_stop_strings_and_in_several_choices(server):
    ended = complete(server, max_tokens=400, temperature=0)
    assert ended["choices"][0]["finish_reason"] == "stop"
    text = complete(server, max_tokens=12, temperature=0, ignore_eos=True)["choices"][0]["text"]
    stopped = complete(server, max_tokens=12, temperature=0, ignore_eos=True, stop=[text[8:12]])
    assert text.startswith(stopped["choices"][0]["text"])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    several = complete(server, max_tokens=5, n=3, ignore_eos=True)
    assert len({choice["text"] for choice in several["choices"]}) == 3


def test_a_grammar_is_obeyed(server):
    answer = complete(server, max_tokens=20, structured_outputs={"choice": ["yes", "no"]})
    assert answer["choices"][0]["text"] in ("yes", "no")


def test_logprobs_are_there_for_who_asks(server):
    answer = complete(server, max_tokens=4, logprobs=2, ignore_eos=True)
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 4


def test_a_promise_is_given_and_kept(server):
    answer = complete(server, max_tokens=8, ignore_eos=True, slo={"ttft_ms": 60_000, "tpot_ms": 10_000})
    assert answer["slo"]["verdict"] == "promised"
    assert answer["slo"]["outcome"] == "met"


def test_preempted_requests_come_back_and_say_what_they_would_have_said(server):
    def one(number):
        prompt = [2000 + number] * 100
        return complete(server, prompt=prompt, max_tokens=120, ignore_eos=True, temperature=0)["choices"][0]["text"]

    alone = one(0)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(one, range(12)))
    assert texts[0] == alone
    metrics = server.get("/metrics").text
    preempted = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert float(preempted[0].split()[-1]) > 0
    assert server.get("/health").status_code == 200


# -- an operator's pause ---------------------------------------------------------------------------

PROMISED = {"ttft_ms": 5000, "tpot_ms": 200}
PAUSE_S = 6.0  # 30 times what a token may take
AFTER = {  # how a pause begins and ends, and what becomes of the streams that are under way
    "keep": ("/pause?mode=keep", "/resume", "met"),
    "wait": ("/pause?mode=wait", "/resume", "met"),
    "abort": ("/pause?mode=abort", "/resume", "cancelled"),
    "sleep": ("/sleep?level=0&mode=keep", "/wake_up?tags=scheduling", "met"),
}


def stream(client, began, *, max_tokens):
    """Stream an answer; return its headers and the last `slo` in it. `began` is set with the headers."""
    body = {"model": "m", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json={**body, "slo": PROMISED}) as response:
        began.set()
        said = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    return dict(response.headers), next((one["slo"] for one in reversed(said) if "slo" in one), {})


def broken(client):
    """Return how many promises were broken and how often steering stopped, as counted."""
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line.startswith("slos_serve_")]
    missed = sum(float(value) for name, value in lines if "slos_serve_promises_total" in name and "broken" in name)
    return missed + sum(float(value) for name, value in lines if name.startswith("slos_serve_step_downs_total"))


@pytest.mark.parametrize("how", AFTER)
def test_a_pause_breaks_no_promise_and_newcomers_hear_at_once(server, how):
    pause, resume, outcome = AFTER[how]
    before = broken(server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        begun = [threading.Event() for _ in range(2)]
        under_way = [pool.submit(stream, server, event, max_tokens=400) for event in begun]
        assert all(event.wait(30) for event in begun)
        paused = pool.submit(server.post, pause)
        wait_for(lambda: server.get("/readyz").text == '{"status":"paused"}')
        assert server.get("/livez").status_code == 200
        heard, started = threading.Event(), time.monotonic()
        newcomer = pool.submit(stream, server, heard, max_tokens=5)
        assert heard.wait(30)
        assert time.monotonic() - started < PAUSE_S
        assert server.post("/reset_prefix_cache").status_code == 200
        time.sleep(PAUSE_S)
        assert paused.result().status_code == 200
        assert server.get("/livez").status_code == 200
        assert server.post(resume).status_code == 200
        ids = [one.result()[0]["x-slo-id"] for one in under_way]
        headers, slo = newcomer.result()
    wait_for(lambda: [server.get(f"/v1/slo/requests/{one}").json().get("outcome") for one in ids] == [outcome] * 2)
    assert (headers["x-slo-verdict"], headers["x-slo-reason"]) == ("best-effort", "paused")
    assert slo["outcome"] in {"met", "declined"}
    wait_for(lambda: server.get("/readyz").status_code == 200)
    assert broken(server) == before
    assert server.get("/v1/slo/status").json()["effective_mode"] == "enforce"
    again = complete(server, max_tokens=5, ignore_eos=True, slo=PROMISED)
    assert (again["slo"]["verdict"], again["slo"]["outcome"]) == ("promised", "met")


# -- what the server says of itself, taken at its word ---------------------------------------------

ASKED = "^/(v1/(completions|chat/completions|slo/.*)|livez|readyz|health)$"


def test_no_request_that_the_openapi_document_allows_is_a_fault_of_the_server(server):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json()).include(path_regex=ASKED)
    operations = [one.ok() for one in schema.get_all_operations()]
    assert {one.path for one in operations} >= {"/v1/completions", "/v1/slo/classes", "/v1/slo/mode", "/livez"}
    faults = []
    for operation in operations:

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def ask(case):
            if isinstance(case.body, dict) and "max_tokens" in case.body:
                case.body["max_tokens"] = 2
            answer = case.call(base_url=str(server.base_url), timeout=30)
            if answer.status_code >= 500:
                faults.append((case.method, case.path, answer.status_code, str(case.body)[:300], answer.text[:300]))

        ask()
    assert faults == []
    assert server.post("/v1/slo/mode", json={"mode": "enforce"}).status_code == 200  # it may have been asked to observe
    status = server.get("/v1/slo/status").json()
    assert (status["effective_mode"], status["malformed_messages"]) == ("enforce", 0)
    assert not status["snapshot"]["planner_faults"]
