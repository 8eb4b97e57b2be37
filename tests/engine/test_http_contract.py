"""The HTTP contract on a real engine: every bad input has a clear answer, and disturbs nobody else."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import time

import pytest

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Say hello."}]
RELAXED = {"slo": {"class": "relaxed"}}
REASONS = {"too-tight", "compute", "memory", "deadline-passed", "requested", "invalid", "observe"}


@pytest.fixture(scope="module")
def sdk(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0, timeout=120) as sdk:
        yield sdk


@pytest.fixture
def post(server):
    """Send a body; a bystander that holds a promise streams meanwhile and must get its usual answer."""

    def post(path, body, **options):
        with server.client() as client:
            return client.post(path, json={"model": server.model, **body}, **options)

    return post


def metric(server, name, label=""):
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")) and label in line
    )


def counted(server, outcome):
    return metric(server, "slos_serve_requests_total", f'outcome="{outcome}"')


def eventually(check, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


def headers_of(response):
    return {name: value for name, value in response.headers.items() if name.startswith("x-slo")}


# -- good requests ----------------------------------------------------------------------------------


def test_a_promise_is_given_and_told_in_headers_and_body(sdk):
    raw = sdk.chat.completions.with_raw_response.create(model="demo", messages=HELLO, max_tokens=8, extra_body=RELAXED)
    answer = raw.parse()
    assert raw.headers["x-slo-verdict"] == "promised"
    assert int(raw.headers["x-slo-predicted-ttft-ms"]) > 0
    assert answer.slo["verdict"] == "promised"
    assert answer.slo["class"] == "relaxed"
    assert answer.service_tier == "default"
    assert answer.choices[0].message.content


def test_a_stream_tells_it_in_its_last_chunk_alone(sdk):
    for create, prompt in (
        (sdk.chat.completions.create, {"messages": HELLO}),
        (sdk.completions.create, {"prompt": ["Once upon", "A time"], "n": 2}),
    ):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = list(
                create(
                    model="demo",
                    stream=True,
                    max_tokens=6,
                    **prompt,
                    **options,
                    extra_headers={"x-slo-class": "relaxed"},
                )
            )
            assert [("slo" in (chunk.model_extra or {})) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1].slo["verdict"] == "promised"


def test_the_headers_of_a_stream_precede_its_first_chunk(server):
    with (
        server.client() as client,
        client.stream(
            "POST", CHAT, json={"model": "demo", "messages": HELLO, "max_tokens": 4, "stream": True, **RELAXED}
        ) as response,
    ):
        verdict = response.headers["x-slo-verdict"]
        text = response.read().decode()
    assert verdict in {"promised", "pending"}  # pending: the first chunk was quicker than the verdict
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(text.split("\n\n")[-3].removeprefix("data: "))["slo"]["verdict"] == "promised"


@pytest.mark.parametrize(
    ("body", "headers", "slo_class"),
    [
        ({"slo": {"ttft_ms": 60_000, "tpot_ms": 5_000, "e2e_ms": 300_000}}, {}, "custom"),
        ({}, {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "5000"}, "custom"),
        ({}, {"x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "5000"}, "custom"),
        ({"service_tier": "priority"}, {}, "chat"),
        ({"vllm_xargs": {"slo_class": "relaxed"}}, {}, "relaxed"),
        ({"slo": {"ttft_slowdown": 500, "tpot_ms": 5_000}}, {}, "custom"),
    ],
)
def test_every_spelling_reaches_the_planner(post, body, headers, slo_class):
    response = post(CHAT, {"messages": HELLO, "max_tokens": 4, **body}, headers=headers)
    slo = response.json()["slo"]
    assert (response.status_code, slo["class"]) == (200, slo_class)
    assert slo["verdict"] in {"promised", "best-effort"}
    assert slo["reason"] in REASONS | {""}


def test_flex_and_silence_are_best_effort(post):
    flex = post(CHAT, {"messages": HELLO, "max_tokens": 4, "service_tier": "flex"})
    said = headers_of(flex)
    assert len(said.pop("x-slo-id")) == 32
    assert said == {"x-slo-verdict": "best-effort", "x-slo-reason": "requested", "x-slo-class": "best-effort"}
    assert flex.json()["service_tier"] == "flex"
    silent = post(CHAT, {"messages": HELLO, "max_tokens": 4})
    assert not headers_of(silent)
    assert "slo" not in silent.json()


def test_the_responses_api_works_as_well(post):
    response = post("/v1/responses", {"input": "Say hello.", "max_output_tokens": 8, **RELAXED})
    assert response.json()["slo"]["verdict"] == "promised"


def test_pages_metrics_and_the_request_itself_agree(server, post):
    before = counted(server, "met") + counted(server, "missed")
    answer = post(CHAT, {"messages": HELLO, "max_tokens": 4, "slo": {"class": "relaxed", "tenant": "acme"}}).json()
    with server.client() as client:
        record = eventually(lambda: (r := client.get(f"/v1/slo/requests/{answer['id']}").json()).get("outcome") and r)
        classes = client.get("/v1/slo/classes").json()
        metrics = client.get("/metrics").text
    assert record["id"] == answer["slo"]["id"]
    assert record["tenant"] == "acme"
    assert record["outcome"] in {"met", "missed"}
    assert (record["num_output_tokens"], record["ttft_ms"] > 0) == (4, True)
    assert "relaxed" in [item["id"] for item in classes["data"]]
    assert counted(server, "met") + counted(server, "missed") == before + 1
    assert 'slos_serve_verdicts_total{class="relaxed",reason="",verdict="promised"}' in metrics
    assert "vllm:num_requests_running" in metrics
    assert server.slo_status()["snapshot"]["planner_faults"] == {}


def test_a_responses_stream_tells_it_in_its_last_event(server):
    with server.client() as client:
        text = client.post(
            "/v1/responses",
            json={"model": "demo", "input": "Say hello.", "max_output_tokens": 8, "stream": True, **RELAXED},
        ).text
    last = json.loads(text.split("event: response.completed\ndata: ")[1].split("\n\n")[0])["response"]
    assert (last["slo"]["verdict"], last["slo"]["outcome"], last["service_tier"]) == ("promised", "met", "default")


def test_the_mode_is_switched_while_the_engine_runs_and_back(server, sdk, post):
    def switch(**order):
        with server.client() as client:
            return client.post("/v1/slo/mode", json=order)

    def verdict():
        slo = post(CHAT, {"messages": HELLO, "max_tokens": 4, **RELAXED}).json()["slo"]
        return slo["verdict"], slo["reason"]

    try:
        answer = switch(mode="observe")
        assert (answer.status_code, answer.json()["effective_mode"]) == (200, "observe")
        assert verdict() == ("best-effort", "observe")
        assert metric(server, "slos_serve_mode") == 1
        assert switch(mode="enforce", **{"class": "chat"}).json()["class_modes"] == {"chat": "enforce"}
        assert verdict() == ("best-effort", "observe")
        assert switch(mode="loud").status_code == 400
    finally:
        assert switch(mode="enforce").json()["effective_mode"] == "enforce"
    assert verdict() == ("promised", "")
    assert server.slo_status()["class_modes"] == {}


def test_who_waited_longer_than_its_class_allows_is_refused_with_the_reason(server):
    body = {"model": "demo", "messages": HELLO, "max_tokens": 40, "ignore_eos": True, "slo": {"class": "hurried"}}

    def send(i):
        with server.client() as client:
            return client.post(CHAT, json={**body, "stream": i % 2 == 0})

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(send, range(32)))
    refused = [response for response in responses if response.status_code == 429]
    assert 0 < len(refused) < 32
    assert {response.headers["x-slo-reason"] for response in refused} == {"ttl-expired"}
    assert {response.status_code for response in responses} == {200, 429}
    assert all(response.headers["x-slo-verdict"] == "best-effort" for response in responses if response not in refused)
    assert eventually(lambda: metric(server, "vllm:num_requests_running") == 0)


# -- bad requests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual_answer(sdk):
    """What a bystander is answered when it is alone."""
    return bystander(sdk)


def bystander(sdk):
    """Return what follows a count: no two next tokens are nearly as likely, however batches are made."""
    chunks = sdk.completions.create(
        model="demo", prompt="1, 2, 3, 4, 5, 6, 7, 8,", max_tokens=10, temperature=0, stream=True, extra_body=RELAXED
    )
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


@contextlib.contextmanager
def someone_else_is_served(sdk, usual_answer):
    """Stream another request meanwhile: it must end as it does alone."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(bystander, sdk)
        time.sleep(0.1)
        yield
        assert other.result(timeout=120) == usual_answer


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"slo": {"class": "gold"}}, {}, "slo.class"),
        ({}, {"x-slo-class": "gold"}, "x-slo-class"),
        ({"slo": {"ttft_ms": -5}}, {}, "slo.ttft_ms"),
        ({"slo": {"tpot_ms": "fast"}}, {}, "slo.tpot_ms"),
        ({}, {"x-slo-tpot-ms": "fast"}, "x-slo-tpot-ms"),
        ({}, {"x-llm-d-slo-ttft-ms": "-1"}, "x-llm-d-slo-ttft-ms"),
        ({"slo": {"ttft_ms": 400, "ttft_slowdown": 3}}, {}, "slo.ttft_slowdown"),
        ({"slo": "coding"}, {}, "slo"),
        ({"slo": {"deadline": 5}}, {}, "slo.deadline"),
    ],
)
def test_a_malformed_wish_is_a_400_of_vllms_shape(sdk, post, usual_answer, body, headers, param):
    with someone_else_is_served(sdk, usual_answer):
        for stream in (False, True):
            response = post(CHAT, {"messages": HELLO, "max_tokens": 4, "stream": stream, **body}, headers=headers)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
            assert error["param"] == param
            assert error["message"].startswith(f"{param} = ")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": []}),
        (CHAT, {}),
        (COMPLETIONS, {}),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 4000}]}),
        (COMPLETIONS, {"prompt": "long " * 4000}),
        (CHAT, {"messages": HELLO, "max_tokens": 10**9}),
        (CHAT, {"messages": HELLO, "max_tokens": -1}),
        (CHAT, {"messages": HELLO, "max_tokens": "many"}),
        (CHAT, {"messages": HELLO, "slo": None, "vllm_xargs": {"slo_class": {"nested": 1}}}),
        (CHAT, {"messages": HELLO, "vllm_xargs": ["slo_class"]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_vllm_refuses_it_refuses_in_its_own_words(sdk, post, usual_answer, path, body):
    with someone_else_is_served(sdk, usual_answer):
        response = post(path, {**RELAXED, **body})
        assert response.status_code == 400
        assert response.json()["error"]["message"]
        assert "x-slo-verdict" not in response.headers


def test_an_empty_prompt_gets_the_answer_vllm_gives_it(post):
    asked, silent = (post(COMPLETIONS, {"prompt": "", "max_tokens": 4, **slo}) for slo in (RELAXED, {}))
    assert asked.status_code == silent.status_code
    assert asked.status_code in {200, 400}


@pytest.mark.parametrize(
    "xargs",
    [
        {"slo_class": "gold"},
        {"slo_class": 5},
        {"slo_class": ["chat"]},
        {"slo_ttft_ms": -1},
        {"slo_ttft_ms": "soon"},
        {"slo_ttft_ms": [1, 2]},
        {"slo_ttft_ms": 1e300},
        {"slo_ttft_ms": 400, "slo_ttft_slowdown": 3},
        {"slo_class": "tool", "slo_stage": "last"},
        {"slo_class": "chat", "slo_tenant": 7},
        {"slo_id": "forged", "slo_arrival_s": "noon", "slo_class": "chat"},
    ],
    ids=str,
)
def test_bad_xargs_are_served_as_best_effort_and_never_stop_the_engine(sdk, server, post, usual_answer, xargs):
    with someone_else_is_served(sdk, usual_answer):
        response = post(CHAT, {"messages": HELLO, "max_tokens": 4, "vllm_xargs": xargs})
        assert response.status_code == 200
        slo = response.json()["slo"]
    if xargs.get("slo_class") != "chat":
        assert (slo["verdict"], slo["reason"]) == ("best-effort", "invalid")
        assert response.json()["service_tier"] == "flex"
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_class_that_asks_for_it_is_refused_with_a_time_to_come_back(sdk, server, post, usual_answer):
    before = counted(server, "rejected")
    with someone_else_is_served(sdk, usual_answer):
        for stream in (False, True):
            response = post(
                CHAT, {"messages": HELLO, "max_tokens": 200, "stream": stream, "slo": {"class": "impossible"}}
            )
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 30
            assert response.json()["error"]["code"] == 429
            assert response.headers["x-slo-reason"] in REASONS
    assert counted(server, "rejected") == before + 2


def test_a_client_that_leaves_frees_its_place(sdk, server, usual_answer):
    before = counted(server, "cancelled")
    body = {"model": "demo", "messages": HELLO, "stream": True, "ignore_eos": True, **RELAXED}  # no max_tokens
    with someone_else_is_served(sdk, usual_answer), server.client() as client:
        with client.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            answer = next(json.loads(line[6:]) for line in lines if line.startswith("data: {"))
            for _ in range(4):
                next(lines)
        assert eventually(lambda: counted(server, "cancelled") == before + 1)
        record = client.get(f"/v1/slo/requests/{answer['id']}").json()
        assert record["outcome"] == "cancelled"
        assert 1 <= record["num_output_tokens"] < 200
    assert eventually(lambda: metric(server, "vllm:num_requests_running") == 0)


def test_equal_request_ids_are_told_apart(sdk, server, usual_answer):
    body = {"model": "demo", "messages": HELLO, "max_tokens": 12, **RELAXED}

    def send(_):
        with server.client() as client:
            return client.post(CHAT, json={**body, "request_id": "same"}, headers={"X-Request-Id": "same"})

    with someone_else_is_served(sdk, usual_answer), concurrent.futures.ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(send, range(4)))
    assert [response.status_code for response in responses] == [200] * 4
    assert len({response.json()["slo"]["id"] for response in responses}) == 4


def test_after_all_that_the_engine_still_plans_and_nothing_is_left_over(server, sdk, usual_answer):
    assert bystander(sdk)[:10] == usual_answer[:10]
    status = server.slo_status()
    assert status["effective_mode"] == "enforce"
    assert status["snapshot"]["planner_faults"] == {}
    assert status["malformed_messages"] == 0
    assert "Traceback" not in "".join(
        line for line in server.log.read_text(errors="replace").splitlines(keepends=True) if "slos_serve" in line
    )
