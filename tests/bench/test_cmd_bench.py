from __future__ import annotations

import asyncio
import json
import re
import threading

import pytest

from slos_serve.cli import main


@pytest.fixture
def url(engine, serve):
    ready, loop = threading.Event(), asyncio.new_event_loop()
    where = {}

    async def body():
        where["stop"] = asyncio.Event()
        async with serve(engine) as where["url"]:
            ready.set()
            await where["stop"].wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(body(),))
    thread.start()
    ready.wait(10)
    yield where["url"]
    loop.call_soon_threadsafe(where["stop"].set)
    thread.join(10)
    loop.close()


def bench(url, *more):
    return main(
        ["bench", "--target", url, "--rate", "40", "--num-requests", "20", "--goodput", "ttft:900,tpot:60", *more]
    )


def test_bench_prints_one_json_document(url, capsys):
    assert bench(url, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (graded,) = document["systems"]["vllm"]
    assert graded["num_requests"] == 20
    assert graded["met"] + graded["missed"] == 20
    assert graded["rate_rps"] == pytest.approx(40)
    assert document["client"]["counted_by"] == ["usage"]


def test_bench_prints_a_table_and_writes_a_report(url, capsys, tmp_path, engine):
    engine.slo_of = lambda body: {"verdict": "promised", "class": body["slo"]["class"]}
    assert bench(url, "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "vLLM + slos-serve" in out
    assert "promises kept" in out
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    loads = re.findall(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)
    assert not loads, "the page must not load anything"
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 20
    assert json.loads((tmp_path / "results.json").read_text())["systems"]["slos-serve"]


def test_numbers_of_an_emulated_device_say_so(url, capsys, tmp_path):
    profile = {
        "schema": "slos-serve-profile/1",
        "key": {"hardware": "emulated h100 #1"},
        "perf_model": {"lines": [{"fixed_s": 0.01}]},
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    assert bench(url, "--out", str(tmp_path), "--profile", str(tmp_path / "profile.json")) == 0
    assert "The device is EMULATED" in capsys.readouterr().out
    assert "on an emulated device</h1>" in (tmp_path / "report.html").read_text()
    assert "EMULATED" in json.loads((tmp_path / "results.json").read_text())["emulated"]


def test_the_same_seed_offers_the_same_requests(url, capsys, engine):
    bench(url, "--json", "--arrivals", "poisson", "--mix", "chat=1,coding=1")
    first = [(b["prompt"], b["max_tokens"], b["slo"]) for b in engine.bodies]
    engine.bodies.clear()
    bench(url, "--json", "--arrivals", "poisson", "--mix", "chat=1,coding=1")
    assert sorted(first, key=str) == sorted([(b["prompt"], b["max_tokens"], b["slo"]) for b in engine.bodies], key=str)


def test_all_requests_failing_is_a_failed_job(url, capsys, engine):
    engine.status = 500
    assert bench(url) == 1
    assert "failed: HTTP 500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rate", "0"], "--rate = 0.0: expected a positive number"),
        (["--mix", "chat"], "expected CLASS=SHARE"),
        (["--mix", "nobody=1", "--trace", "LENGTHS"], "class = 'nobody'"),
        (["--trace", "absent.csv"], "absent.csv: cannot be read"),
        (["--arrivals", "often"], "arrivals 'often'"),
        (["--profile", "absent.json"], "--profile = 'absent.json'"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_2(url, capsys, tmp_path, more, message):
    trace = tmp_path / "t.csv"
    trace.write_text("arrived_at_s,prompt_tokens,output_tokens\n0,5,2\n1,5,2\n")
    more = [str(trace) if word == "LENGTHS" else word for word in more]
    assert main(["bench", "--target", url, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


def test_an_absent_server_is_told_with_status_1(capsys):
    assert main(["bench", "--target", "http://127.0.0.1:9"]) == 1
    assert "is the server up?" in capsys.readouterr().err
