"""Logs of JSON lines: each is one object, whatever is logged, and the configuration is one that Python takes."""

import json
import logging
import logging.config
import subprocess
import sys

import pytest

from slos_serve import logs


def format_one(message, *args, **more):
    entry = logging.getLogger("vllm.x").makeRecord("vllm.x", logging.WARNING, "f", 1, message, args, None, **more)
    line = logs.JsonFormatter().format(entry)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_has_time_level_logger_message_and_process():
    fields = format_one("%d requests\nand more", 3)
    assert fields["message"] == "3 requests\nand more"
    assert (fields["level"], fields["logger"]) == ("WARNING", "vllm.x")
    assert fields["time"].endswith("+00:00")
    assert fields["process"] > 0


def test_what_others_add_of_requests_and_traces_is_kept():
    fields = format_one("x", extra={"request_id": "r", "trace_id": "t", "color": 1})
    assert (fields["request_id"], fields["trace_id"]) == ("r", "t")
    assert "color" not in fields


def test_a_traceback_is_a_field():
    try:
        {}["no"]
    except KeyError:
        entry = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    assert "KeyError: 'no'" in json.loads(logs.JsonFormatter().format(entry))["error"]


@pytest.mark.parametrize("name", ["vllm.slos_serve", "uvicorn.access", "uvicorn.error"])
def test_the_configuration_writes_every_logger_of_a_server_as_json(name):
    code = (
        "import json, logging.config, sys; from slos_serve.logs import CONFIG; "
        "write = sys.stdout.write; sys.stdout.write = lambda text: write('(APIServer pid=7) ' + text); "
        "logging.config.dictConfig(json.loads(CONFIG.read_text())); "
        f"logging.getLogger({name!r}).info('%s', 'hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["message"] == "hello"
