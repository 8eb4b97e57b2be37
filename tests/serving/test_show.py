"""`slos-serve show`: the live page of a run that is over; what cannot be shown is told in one line."""

import json
import re

import pytest
from tests.sim.records_made import write_record

from slos_serve import cli


def call(capsys, *arguments):
    status = cli.main(["show", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def shown(capsys, *arguments):
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def row(number, **more):
    return {
        "request_id": f"r{number}",
        "class": "chat",
        "sent_s": 0.5 * number,
        "prompt_tokens": 100,
        "output_tokens": 12,
        "slo": {"ttft_s": 0.4, "tpot_s": 0.05},
        "outcome": "met",
        "verdict": "promised",
        "reason": "",
        "promised": True,
        "stages": {"prefill": "met", "answer": "met"},
        "ttft_s": 0.2,
        "tpot_s": 0.02,
        "finished_s": 0.5 * number + 0.42,
        "chunks": [[0.5 * number + 0.2, 1], [0.5 * number + 0.42, 12]],
        **more,
    }


def folder_of(tmp_path, rows, tail=""):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "requests.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    (folder / "results.json").write_text(
        json.dumps({"target": "http://x", "model": "m", "systems": {"slos-serve": []}})
    )
    return folder


def test_a_record_is_shown_with_its_course_its_requests_and_why(capsys, tmp_path):
    path = write_record(tmp_path / "run.jsonl", plans=True, rate=12.0)
    document = shown(capsys, path, "--explain", "2")
    assert sum(one["counted"] for one in document["totals"].values()) == 80
    assert sum(bucket.get("steps", {}).get("n", 0) for bucket in document["buckets"]) > 80
    assert len(document["buckets"]) <= 121
    assert len(document["requests"]) == 80
    told = document["explanations"][document["requests"][0]["id"]]
    assert any(line.startswith("First token: ") for line in told["story"])
    assert told["picture"].startswith("<svg")


def test_what_bench_wrote_is_shown_with_pictures_of_its_tokens(capsys, tmp_path):
    late = row(3, outcome="missed", ttft_s=0.7, stages={"prefill": "missed", "answer": "met"})
    folder = folder_of(tmp_path, [row(0), row(1), row(2), late])
    document = shown(capsys, folder)
    assert document == shown(capsys, folder / "requests.jsonl")
    assert document["totals"]["chat"]["broken"] == 1
    assert document["requests"][0]["state"] == "broken"
    assert "300 ms late" in " ".join(document["explanations"]["r3"]["story"])


def test_the_page_is_one_file_that_asks_nobody_and_holds_the_run(capsys, tmp_path):
    out = tmp_path / "page.html"
    status, said, _ = call(capsys, folder_of(tmp_path, [row(0, reason="</script><b>")]), "--out", out)
    assert status == 0
    assert str(out) in said
    page = out.read_text()
    assert "connect-src" not in page
    assert "default-src 'none'" in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["requests"][0]["reason"] == "</script><b>"


def test_a_run_whose_last_line_was_cut_off_is_shown_without_it_and_that_is_said(capsys, tmp_path):
    folder = folder_of(tmp_path, [row(0), row(1)], tail='{"request_id": "r2", "cla')
    document = shown(capsys, folder)
    assert len(document["requests"]) == 2
    assert "1 lines that were cut off are left out" in document["said"]


def test_sums_alone_are_shown_without_a_course(capsys, tmp_path):
    entry = {"num_requests": 4, "met": 3, "missed": 0, "declined": 1, "promised": 3, "kept": 3, "attainment": 0.75}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"system": "slos-serve", "scenario": "s", "by_class": {"chat": entry}, **entry}))
    document = shown(capsys, path)
    assert document["totals"]["chat"]["counted"] == 4
    assert document["totals"]["chat"]["broken"] == 0
    assert document["requests"] == []


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        '{"hello": 1}',
        '{"kind": "engine", "schema": "slos-serve-record/9"}\n',
        '{"systems": {"a": [1]}}',
        '{"systems": {"a": {"b": 1}}}',
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(capsys, tmp_path, text):
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    status, out, err = call(capsys, path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err


@pytest.mark.parametrize(
    "text", ['{"request_id": "r"}\n', '[1]\n{"class": 3, "slo": []}\n', '{"slo": {"ttft_s": "x"}}\n']
)
def test_requests_of_another_version_are_told_in_one_line(capsys, tmp_path, text):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "requests.jsonl").write_text(text)
    status, out, err = call(capsys, folder)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "requests.jsonl" in err
    assert call(capsys, tmp_path)[0] == 2
