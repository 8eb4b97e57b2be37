from __future__ import annotations

import pytest

from slos_serve.bench.engines import EngineError
from slos_serve.cli import main
from slos_serve.commands import demo as cmd_demo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "fast"], "--rates = 'fast'"),
        (["--rates", "1,-2"], "--rates = '1,-2'"),
        (["--seconds", "0"], "--seconds: '0': expected a number, at least 1"),
        (["--seed", "-1"], "--seed: '-1': expected a whole number, at least 0"),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments, message, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "report"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_server_that_fails_ends_the_demo_in_one_line(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise EngineError("vllm-2048 ended with status 1: no memory (log: x.log)")

    monkeypatch.setattr(cmd_demo, "run_demo", fail)
    assert main(["demo", "--model", "m", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "slos-serve demo: vllm-2048 ended with status 1: no memory (log: x.log)"
    ]


def test_the_next_steps_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", [".venv/bin/slos-serve", "demo"])
    text = cmd_demo.NEXT_STEPS.format(command=cmd_demo._command())
    assert ".venv/bin/slos-serve serve Qwen" in text
    assert '"slo": {"class": "chat"}}' in text
