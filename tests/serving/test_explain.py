"""`slos-serve explain`: from a state, a record or a server; what is wrong is told in one line."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.core.states import make_request, make_state
from tests.sim.records_made import write_record

from slos_serve import cli
from slos_serve.commands import explain
from slos_serve.core.types import RequestTable


def call(capsys, *arguments):
    status = cli.main(["explain", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def state(tmp_path):
    table = RequestTable()
    table.add(make_request("easy", ttft_s=2.0, tpot_s=0.1))
    table.add(make_request("hard", prompt=6000, ttft_s=0.1, tpot_s=0.1))
    path = tmp_path / "state.json"
    path.write_text(json.dumps(make_state(table).to_json()))
    return path


def test_every_request_of_a_state_is_explained(capsys, state):
    status, out, _ = call(capsys, "--state", state)
    assert status == 0
    assert "easy (chat): can be promised now" in out
    assert "hard (chat): not promised (compute)" in out
    assert "ms later" in out
    status, out, _ = call(capsys, "hard", "--state", state, "--json")
    (found,) = json.loads(out)["explanations"]
    assert (found["request_id"], found["binding"]) == ("hard", "compute")


def test_a_plan_line_of_a_record_is_a_state_too(capsys, state, tmp_path):
    line = tmp_path / "line.json"
    line.write_text(json.dumps({"kind": "plan", "state": json.loads(state.read_text())}))
    assert call(capsys, "easy", "--state", line)[0] == 0


def test_a_request_of_a_record_is_explained_from_the_plan_about_it(capsys, tmp_path):
    path = write_record(tmp_path / "record.jsonl", plans=True, rate=12.0)
    status, out, _ = call(capsys, "r7", "--record", path)
    assert status == 0
    assert "First token: promised within" in out or "First token: asked for within" in out
    status, out, _ = call(capsys, "r7", "--record", path, "--json")
    document = json.loads(out)
    assert document["request_id"] == "r7"
    assert document["explanations"][0]["request_id"] == "r7"
    assert document["history"]["outcome"] in ("met", "missed", "declined")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"schema": "other/1"}', '{"schema": "slos-serve-state/1"}'])
def test_what_is_no_state_is_told_in_one_line(capsys, tmp_path, content):
    path = tmp_path / "state.json"
    if content is not None:
        path.write_text(content)
    status, out, err = call(capsys, "--state", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--state" in err


def test_an_unknown_request_is_told_with_some_that_are_known(capsys, state, tmp_path):
    status, _, err = call(capsys, "nobody", "--state", state)
    assert (status, err.count("\n")) == (2, 1)
    assert "easy" in err
    status, _, err = call(capsys, "nobody", "--record", write_record(tmp_path / "record.jsonl"))
    assert (status, err.count("\n")) == (2, 1)
    assert "r0" in err


def test_a_request_is_needed_where_there_are_many(capsys, tmp_path):
    status, _, err = call(capsys, "--record", write_record(tmp_path / "record.jsonl"))
    assert (status, err.count("\n")) == (2, 1)
    assert "REQUEST_ID" in err


ANSWER = {
    "object": "slo.request",
    "id": "abc",
    "request_id": "chatcmpl-1-0",
    "class": "chat",
    "verdict": "best-effort",
    "reason": "memory",
    "slack_ms": -120.0,
    "predicted_ttft_ms": None,
    "outcome": "declined",
    "stages": {"prefill": "missed"},
    "ttft_ms": 700.0,
}


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = {"/v1/slo/requests/abc": ANSWER, "/v1/slo/requests/odd": {"hello": 1}}.get(self.path)
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(known or {}).encode())

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_server_is_asked_what_it_knows(capsys, server):
    status, out, _ = call(capsys, "abc", "--target", f"{server}/v1")
    assert status == 0
    assert "best-effort (served without a promise); reason memory" in out
    assert "First token: came after 700 ms" in out
    assert json.loads(call(capsys, "abc", "--target", server, "--json")[1]) == ANSWER


@pytest.mark.parametrize(("name", "expected"), [("nobody", 2), ("odd", 1)])
def test_a_request_that_a_server_does_not_know_is_one_line(capsys, server, name, expected):
    status, out, err = call(capsys, name, "--target", server)
    assert (status, out, err.count("\n")) == (expected, "", 1)


def test_a_server_that_is_down_is_one_line_and_status_1(capsys, free_port):
    status, out, err = call(capsys, "abc", "--target", f"http://127.0.0.1:{free_port}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "is the server up" in err
    assert call(capsys, "abc", "--target", "localhost")[0] == 2


def test_a_servers_answer_says_what_was_promised_and_what_came():
    from slos_serve.commands.explain import as_answer

    record = {"id": "a", "class": "chat", "verdict": "promised", "reason": "", "promise": {"ttft_ms": 400.0}}
    text = as_answer({**record, "ttft_ms": 371.0, "outcome": "met"})
    assert "promised within 400 ms, came after 371 ms, 29 ms to spare" in text
    asked = {"id": "a", "class": "chat", "verdict": "best-effort", "asked": {"ttft_ms": 20.0}}
    for reason in ("requested", "too-tight", "observe", "compute"):
        text = as_answer({**asked, "reason": reason})
        assert "asked for within 20 ms" in text
        assert "to spare" not in text


def test_what_a_server_explains_has_the_fields_of_its_record(monkeypatch):
    record = {"id": "a", "class": "chat", "verdict": "promised", "reason": ""}
    monkeypatch.setattr(explain, "get_json", lambda url, key: {"request": record, "story": ["It was promised."]})
    document = explain.ask("http://localhost:1", "a", None)
    assert document["verdict"] == "promised"
    assert document["story"] == ["It was promised."]
