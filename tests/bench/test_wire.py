"""Servers that refuse what plain OpenAI does not know are served what they take, and nothing else is changed."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web

from slos_serve.bench.wire import VLLM_ONLY, Wire, parse_extra_body, parse_headers
from slos_serve.cli import main

OPENAI = {
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "stream",
    "stream_options",
}
BODY = {
    "model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "temperature": 0.0, "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "slo": {}, "vllm_xargs": {},
}  # fmt: skip


class StrictServer:
    """Answer 400 to what is not in `known`, to token ids, and to `max_tokens` where `newer`; else stream."""

    def __init__(self, known=OPENAI, *, newer=False, models=None, message="Unrecognized request argument supplied: {}"):
        self.known, self.newer, self.message = known, newer, message
        self.model_list = {"data": [{"id": "m"}]} if models is None else models
        self.bodies, self.seen_headers = [], []

    async def models(self, _):
        return web.json_response(self.model_list, status=200 if self.model_list else 404)

    def fault(self, body):
        for key in body:
            if key not in self.known:
                return {"message": self.message.format(key), "param": None}
        for key in body.get("stream_options", {}):
            if key != "include_usage":
                return {"message": self.message.format(key), "param": f"stream_options.{key}"}
        if self.newer and "max_tokens" in body:
            message = (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            )
            return {"message": message, "param": "max_tokens"}
        if isinstance(body.get("prompt"), list):
            return {"message": "prompt: expected a string, got an array", "param": None}
        return None

    async def post(self, request):
        body = await request.json()
        self.seen_headers.append(request.headers)
        fault = self.fault(body)
        if fault is not None:
            return web.json_response({"error": fault}, status=400)
        self.bodies.append(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count = body.get("max_tokens") or body.get("max_completion_tokens")
        for i in range(count):
            text = {"delta": {"content": "x "}} if "messages" in body else {"text": "x "}
            event = {"choices": [{"index": 0, "finish_reason": "length" if i == count - 1 else None, **text}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@contextmanager
def served(server):
    loop, ready, where = asyncio.new_event_loop(), threading.Event(), {}

    async def body():
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/{tail:.*}", server.post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        where["url"], where["stop"] = f"http://127.0.0.1:{runner.addresses[0][1]}", asyncio.Event()
        ready.set()
        await where["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(body(),))
    thread.start()
    ready.wait(10)
    try:
        yield where["url"]
    finally:
        loop.call_soon_threadsafe(where["stop"].set)
        thread.join(10)
        loop.close()


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n" + "".join(f"{0.05 * i},{6 + i},3\n" for i in range(5)))
    return path


def bench(url, trace, capsys, *more):
    words = ["bench", "--target", url, "--trace", str(trace), "--goodput", "ttft:9000,tpot:9000", "--json", *more]
    status = main(words)
    told = capsys.readouterr()
    return status, json.loads(told.out) if told.out else {}, told.err


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("message", ["Unrecognized request argument supplied: {}", "Extra inputs are not permitted"])
def test_a_strict_server_is_served_what_it_takes(trace, capsys, endpoint, newer, message):
    server = StrictServer(newer=newer, message=message)
    with served(server) as url:
        status, document, _ = bench(url, trace, capsys, "--endpoint", endpoint)
    assert status == 0
    (graded,) = document["systems"]["vllm"]
    assert (graded["num_requests"], graded["met"]) == (5, 5)
    assert len(server.bodies) == 5
    assert all(set(body) <= OPENAI for body in server.bodies)
    assert {body.get("max_completion_tokens") for body in server.bodies} == ({3} if newer else {None})
    assert "ignore_eos" in document["client"]["fields_left_out"]


def test_plain_needs_no_refusal(trace, capsys):
    server = StrictServer()
    with served(server) as url:
        status, _, _ = bench(url, trace, capsys, "--plain")
    assert status == 0
    assert len(server.seen_headers) == len(server.bodies) == 5


def test_headers_and_extra_fields_reach_the_server_and_null_leaves_a_field_out(trace, capsys):
    server = StrictServer(known=OPENAI | {"top_k"})
    with served(server) as url:
        extra = '{"top_k": 5, "temperature": null}'
        status, _, _ = bench(url, trace, capsys, "--plain", "--header", "X-Team=blue", "--extra-body", extra)
    assert status == 0
    assert all(headers["x-team"] == "blue" for headers in server.seen_headers)
    assert all(body["top_k"] == 5 and "temperature" not in body for body in server.bodies)


def test_without_a_context_length_nothing_is_left_out(tmp_path, capsys):
    path = tmp_path / "long.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n0,3000,3\n0.1,2040,20\n")
    server = StrictServer()
    with served(server) as url:
        status, document, _ = bench(url, path, capsys, "--endpoint", "chat")
    assert status == 0
    assert len(server.bodies) == 2
    assert document["workload"]["max_model_len"] is None


def test_what_is_longer_than_the_context_is_left_out_aloud(tmp_path, capsys):
    path = tmp_path / "long.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n0,3000,3\n0.1,20,2\n")
    with served(StrictServer(models={"data": [{"id": "m", "max_model_len": 2048}]})) as url:
        _, document, said = bench(url, path, capsys, "--plain")
    assert document["workload"]["dropped_too_long"] == 1
    assert "left out: 1 longer than the context" in said


def test_a_server_without_a_model_list_is_fine_where_the_model_is_named(trace, capsys):
    server = StrictServer(models={})
    with served(server) as url:
        status, document, _ = bench(url, trace, capsys, "--model", "mine", "--plain")
        assert main(["bench", "--target", url, "--trace", str(trace)]) == 1
    assert status == 0
    assert document["model"] == "mine"


@pytest.mark.parametrize("rows", ["0,5,2\n", "3,5,2\n3,5,2\n3,6,2\n"])
def test_one_request_and_one_instant_have_results(tmp_path, capsys, rows):
    path = tmp_path / "one.csv"
    path.write_text("arrived_at_s,prompt_tokens,output_tokens\n" + rows)
    with served(StrictServer()) as url:
        status, document, _ = bench(url, path, capsys, "--plain")
    assert status == 0
    (graded,) = document["systems"]["vllm"]
    assert graded["met"] == graded["rate_rps"] == rows.count("\n")


@pytest.mark.parametrize(
    "answer",
    [
        '{"error": {"message": "\'max_tokens\' is too large: 5000. This model\'s maximum context length is 4096"}}',
        '{"error": {"message": "slo.class = \'nobody\': expected one of the keys chat, coding", "param": "slo.class"}}',
        '{"error": {"message": "temperature must be at most 2"}}',
        "Bad Request",
    ],
)
def test_an_answer_that_finds_fault_with_a_value_teaches_nothing(answer):
    wire = Wire()
    assert not wire.learn(400, answer, 0)
    assert wire.adapt(BODY) == BODY


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_other_statuses_teach_nothing(status):
    assert not Wire().learn(status, "Unrecognized request argument supplied: ignore_eos", 0)


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ('{"error": {"message": "Unrecognized request argument supplied: ignore_eos"}}', set(VLLM_ONLY)),
        ('{"detail": [{"loc": ["body", "ignore_eos"], "msg": "Extra inputs are not permitted"}]}', set(VLLM_ONLY)),
        ('{"error": {"message": "Unsupported value", "param": "temperature"}}', {"temperature"}),
        (
            '{"error": {"message": "Unknown parameter: \'stream_options\'.", "param": "stream_options"}}',
            {"stream_options"},
        ),
        (
            '{"detail": [{"loc": ["body", "prompt", "str"], "msg": "Input should be a valid string"}]}',
            {"prompt as token ids"},
        ),
        (
            (
                '{"detail": [{"loc": ["body", "stream_options", "continuous_usage_stats"], '
                '"msg": "Extra inputs are not permitted"}]}'
            ),
            set(VLLM_ONLY),
        ),
        ('unknown field "vllm_xargs"', set(VLLM_ONLY)),
    ],
)
def test_the_refused_field_is_left_out_and_a_body_under_way_is_sent_again(answer, gone):
    wire = Wire()
    assert wire.learn(400, answer, 0)
    assert wire.refused == gone
    assert wire.learn(400, "anything", 0), "a body from before"
    assert not wire.learn(400, answer, wire.generation), "nothing more to learn: no endless repeats"
    assert not gone & wire.adapt(BODY).keys()


@pytest.mark.parametrize("text", ["no separator", "=x", "a b=c", "X=a\r\nY: b"])
def test_a_header_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        parse_headers([text])


def test_headers_are_said_either_way():
    assert parse_headers(["A=b", "C: d=e"]) == {"A": "b", "C": "d=e"}


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_an_extra_body_that_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        parse_extra_body(text)
