from __future__ import annotations

import json

import numpy as np
import pytest

from slos_serve.cli import main


@pytest.fixture
def steps(tmp_path, true_model):
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        decodes, chunk = int(rng.integers(1, 16)), int(rng.choice([0, 32, 128, 256]))
        pairs, requests = chunk * chunk / 2, decodes + bool(chunk)
        seconds = true_model.seconds(decodes + chunk, requests, context_tokens=90 * decodes, attention_pairs=pairs)
        record = {"num_tokens": decodes + chunk, "num_requests": requests, "context_tokens": 90 * decodes}
        lines.append(json.dumps(record | {"attention_pairs": pairs, "has_prefill": int(chunk > 0), "seconds": seconds}))
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_recorded_steps_are_fitted_and_plotted(steps, tmp_path, capsys):
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    assert main(["profile", "--from-steps", str(steps), "--out", str(out), "--plot", str(plot)]) == 0
    assert "R2" in capsys.readouterr().out
    assert json.loads(out.read_text())["schema"] == "slos-serve-profile/1"
    assert plot.exists()


def test_the_same_steps_give_the_same_document(steps, tmp_path, capsys):
    documents = []
    for _ in range(2):
        assert main(["profile", "--from-steps", str(steps), "--out", str(tmp_path / "p.json"), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        document.pop("created")
        documents.append(document)
    assert documents[0] == documents[1]
    assert documents[0]["max_num_batched_tokens"] <= 271


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments"),
        (["--from-steps", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--target", "http://127.0.0.1:9"], "--record FILE"),
        (
            ["--target", "http://127.0.0.1:9", "--record", "r", "--seconds", "0"],
            "--seconds: '0': expected",
        ),
        (["--from-steps", "x", "--max-num-batched-tokens", "0"], "--max-num-batched-tokens: '0'"),
        (["--from-steps", "x", "--enforce-eager"], "only with --model"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_2(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err
