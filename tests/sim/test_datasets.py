"""A public trace is written only when every number in it is the right one."""

import json
from dataclasses import replace

import pytest

from slos_serve.cli import main
from slos_serve.errors import ConfigError
from slos_serve.sim.workloads.scenarios import ARXIV, CODE, CONV
from slos_serve.traces.datasets import DATASETS, FetchError, digest_of, fetch, find_dataset
from slos_serve.traces.trace import Trace, read_lengths, read_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8"
)
KNOWN = Trace.build(arrived_at_s=[0.0, 0.052], prompt_tokens=[4808, 3180], output_tokens=[10, 8])


@pytest.fixture
def dataset(tmp_path):
    """A data set of two requests whose publisher is a file."""
    path = tmp_path / "published.csv"
    path.write_bytes(AZURE.encode())
    return replace(DATASETS["azure2023-code"], url=path.as_uri(), num_requests=2, digest=digest_of(KNOWN))


def test_a_trace_is_fetched_checked_and_put_where_the_scenarios_look(tmp_path, dataset):
    seen = []
    path = fetch(dataset, tmp_path / "data", progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "data" / CODE
    trace = read_trace(path)
    assert trace.arrived_at_s.tolist() == [0.0, 0.052]
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert seen == [(len(AZURE), len(AZURE))]


@pytest.mark.parametrize(
    "text", [AZURE.replace("3180", "3181"), AZURE[:80], "", "<html>not found</html>", AZURE.replace(",8", ",x")]
)
def test_another_file_is_refused_and_nothing_is_written(tmp_path, dataset, text):
    folder = tmp_path / "data"
    kept = fetch(dataset, folder).read_bytes()
    (tmp_path / "published.csv").write_text(text)
    with pytest.raises(FetchError, match="nothing was written"):
        fetch(dataset, folder)
    assert (folder / CODE).read_bytes() == kept
    assert [path.name for path in (folder / "traces").iterdir()] == ["azure2023_code.csv.gz"]


def test_without_internet_the_way_round_is_told(tmp_path, dataset):
    away = replace(dataset, url=(tmp_path / "absent.csv").as_uri())
    with pytest.raises(FetchError, match=r"cannot be had .*: fetch it on a machine with internet .*--from FILE"):
        fetch(away, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_download_that_never_ends_is_cut_off(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("slos_serve.traces.datasets.MAX_BYTES", 10)
    with pytest.raises(FetchError, match="expected at most 10"):
        fetch(dataset, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_local_copy_is_checked_alike(tmp_path, dataset):
    away = replace(dataset, url="file:///absent")
    assert fetch(away, tmp_path / "data", local=tmp_path / "published.csv").is_file()


def test_lengths_without_arrivals_are_read_from_their_publishers_columns(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3182,119,3301,26.7\n")
    known = Trace.build(arrived_at_s=[0.0], prompt_tokens=[3182], output_tokens=[119])
    dataset = replace(DATASETS["arxiv-summarization"], url=path.as_uri(), digest=digest_of(known))
    lengths = read_lengths(fetch(dataset, tmp_path / "data"))
    assert (lengths.prompt_tokens.tolist(), lengths.output_tokens.tolist()) == ([3182], [119])


def test_ticks_of_json_lines_are_spread_after_the_check(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 0, "input_length": 10, "output_length": n} for n in (1, 2)]
    rows.append({"timestamp": 3000, "input_length": 10, "output_length": 3})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = Trace.build(arrived_at_s=[0, 0, 3.0], prompt_tokens=[10] * 3, output_tokens=[1, 2, 3])
    dataset = replace(DATASETS["mooncake-conversation"], url=path.as_uri(), digest=digest_of(known))
    assert read_trace(fetch(dataset, tmp_path / "data")).arrived_at_s.tolist() == [0.0, 1.5, 3.0]


def test_the_scenarios_files_are_among_what_can_be_fetched():
    assert {CONV, CODE, ARXIV} <= {dataset.target for dataset in DATASETS.values()}
    assert all(dataset.licence and dataset.cite and len(dataset.digest) == 64 for dataset in DATASETS.values())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="azure2023-code"):
        find_dataset("enron")


def test_the_command_shows_licence_and_checksum_before_it_fetches(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, dataset.name, dataset)
    assert main(["data", "fetch", dataset.name, "--to", str(tmp_path / "data"), "--json"]) == 0
    out, err = capsys.readouterr()
    (entry,) = json.loads(out)["datasets"]
    assert len(read_trace(entry["file"])) == 2
    for text in (dataset.url, "CC-BY 4.0", dataset.digest):
        assert text in err


def test_the_command_lists_and_refuses(tmp_path, capsys):
    assert main(["data", "list"]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert main(["data", "fetch", "enron"]) == 2
    assert main(["data", "fetch", "all", "--from", "x"]) == 2
    assert main(["data", "fetch", "sharegpt", "--from", str(tmp_path / "absent")]) == 2
