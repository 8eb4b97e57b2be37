# ruff: noqa: E501 - small files as they are
"""Each trace format is recognised by what a small file of it holds, and gives its true times, lengths and hits."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest

from slos_serve.traces.registry import all_formats, find_format
from slos_serve.traces.rows import ReadOptions
from slos_serve.traces.source import opened
from slos_serve.traces.trace import read_trace

SAMPLES = Path(__file__).parents[2] / "examples" / "traces"


def sample(name):
    return (SAMPLES / name).read_text(encoding="utf-8")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def length_line(at, prompt, output, ids=None, **more):
    blocks = {} if ids is None else {"hash_ids": ids}
    return {"timestamp": at, "input_length": prompt, "output_length": output, **blocks, **more}


AZURE_2023, BURST, VIDUR = sample("azure-2023.csv"), sample("burstgpt.csv"), sample("vidur.csv")
MOONCAKE, BAILIAN, AIPERF = sample("mooncake.jsonl"), sample("bailian.jsonl"), sample("aiperf-dataset.jsonl")
BENCH, RECORD = sample("slos-serve-bench.jsonl"), sample("slos-serve-record.jsonl")
LONG_TEXTS = {"generated_texts": ["x" * 100_000] * 3}  # what such a result holds may be far from its beginning
VLLM_BENCH = json.dumps(json.loads(sample("vllm-bench-result.json")) | LONG_TEXTS)
STEP = {"step": 1, "t": 1.0, "num_tokens": 4, "num_requests": 1, "seconds": 0.01}

#     file, format, times in s, prompts, outputs, cached, left out
CASES = {
    "own": (sample("slos-serve.csv"), "slos-serve CSV", [0, 1.5], [10, 20], [2, 3], [0, 0], {}),
    "azure 2023": (AZURE_2023, "Azure LLM inference trace", [0, 4.314579, 4.314579], [374, 396, 879], [44, 109, 55], [0] * 3, {}),
    "azure 2024": (sample("azure-2024.csv"), "Azure LLM inference trace", [0, 0.998837, 1.156825], [1452, 862, 617], [3, 38, 104], [0] * 3, {}),
    "azure openai": (sample("azure-openai.csv"), "log of calls", [1.121, 2310.282], [3396, 3602], [1230, 1480], [0] * 2, {"failed": 1}),
    "burstgpt": (BURST, "BurstGPT", [0, 113.5], [472, 417], [18, 276], [0] * 2, {"failed": 1}),
    "vidur": (VIDUR, "Vidur", [0, 0.125, 1.5], [30, 47, 16], [140, 248, 4], [0, 32, 0], {}),
    "mooncake": (MOONCAKE, "Mooncake", [0, 1.5, 3.0, 3.0005, 9.0], [6758, 700, 512, 100, 1025], [500, 1, 90, 2, 7], [0, 512, 512, 0, 0], {}),
    "bailian": (BAILIAN, "Bailian", [0, 30.5, 61.114], [40, 33, 90], [12, 9, 20], [0, 16, 48], {}),
    "timed_trace": (sample("vllm-timed-trace.jsonl"), "vLLM timed_trace", [0, 30.5], [40, 33], [12, 9], [0, 16], {}),
    "guidellm": (sample("guidellm.jsonl"), "guidellm trace", [0, 0.2, 0.4], [10, 20, 15], [5, 8, 6], [0] * 3, {}),
    "aiperf dataset": (AIPERF, "AIPerf or Dynamo dataset", [0, 2], [300, 60], [40, 40], [0] * 2, {"without a length": 1}),
    "dynamo": (sample("dynamo.jsonl"), "AIPerf or Dynamo dataset", [0, 0.5, 1.5], [300, 60, 20], [40, 40, 4], [0] * 3, {}),
    "vllm bench": (VLLM_BENCH, "vllm bench result", [0, 1.19], [600, 610], [100, 97], [0] * 2, {"failed": 1}),
    "aiperf result": (sample("aiperf-result.jsonl"), "AIPerf result", [0.5, 2.5], [550, 60], [9, 3], [0] * 2, {"failed": 1, "of the warm-up": 1}),
    "inference-perf": (sample("inference-perf-result.json"), "inference-perf result", [0, 2], [591, 30], [140, 7], [0] * 2, {"failed": 1}),
    "our bench": (BENCH, "slos-serve bench", [0, 3], [100, 102], [20, 22], [0] * 2, {"failed": 1}),
    "our record": (RECORD, "slos-serve record", [0, 2.5], [50, 50], [4, 4], [0, 16], {"failed": 1}),
}  # fmt: skip


def written(folder, text, name="trace"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def recognised(path):
    with opened(path) as source:
        return [one.name for one in all_formats() if one.matches(source)], find_format(source).name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_as_what_it_holds_whatever_its_name(tmp_path, name, packed):
    text, kind, times, prompts, outputs, cached, left_out = CASES[name]
    path = written(tmp_path, gzip.compress(text.encode()) if packed else text, "data.bin")
    trace = read_trace(path)
    assert trace.origin.format == kind
    assert trace.arrived_at_s.tolist() == pytest.approx(times, abs=2e-6)
    assert trace.prompt_tokens.tolist() == prompts
    assert trace.output_tokens.tolist() == outputs
    assert trace.cached_tokens.tolist() == cached
    assert trace.origin.left_out == left_out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("oddity", ["BOM", "CRLF", "blank lines", "no last newline", "UTF-16", "pipe"])
def test_how_an_editor_or_a_pipe_hands_a_file_over_changes_nothing(tmp_path, name, oddity):
    text, _, times, *_ = CASES[name]
    data = {
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "blank lines": text.replace("\n", "\n\n").encode() + b"  \n",
        "no last newline": text.rstrip("\n").encode(),
        "UTF-16": text.encode("utf-16"),
        "pipe": text.encode(),
    }[oddity]
    path = tmp_path / "trace"
    if oddity == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    else:
        path.write_bytes(data)
    assert read_trace(path).arrived_at_s.tolist() == pytest.approx(times, abs=2e-6)


def test_sessions_and_turns_and_classes_of_a_file_are_kept(tmp_path):
    bailian = read_trace(written(tmp_path, BAILIAN))
    assert bailian.session_id.tolist() == ["1", "2", "1"]
    assert bailian.turn.tolist() == [1, 1, 2]
    assert read_trace(written(tmp_path, VIDUR)).session_id.tolist() == ["7", "7", "8"]
    assert read_trace(written(tmp_path, BENCH)).slo_class.tolist() == ["coding", "coding"]
    assert read_trace(written(tmp_path, RECORD)).slo_class.tolist() == ["", "chat"]
    assert read_trace(written(tmp_path, AIPERF)).turn.tolist() == [0, 1]


def test_every_format_of_the_registry_is_tried_here(tmp_path):
    refusing = {"conversations", "agent conversations", "generator's tables", "JSON", "lengths without arrival times"}
    seen = {recognised(written(tmp_path, text))[1] for text, *_ in CASES.values()}
    assert seen == {one.name for one in all_formats()} - refusing


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e9])
def test_epoch_times_in_any_unit_count_from_the_first_request(tmp_path, scale):
    rows = "".join(f"{round((1758100000 + at) * scale)},10,2\n" for at in (0, 2, 5))
    trace = read_trace(written(tmp_path, "arrived_at_s,prompt_tokens,output_tokens\n" + rows))
    assert trace.arrived_at_s.tolist() == pytest.approx([0, 2, 5], abs=1e-5)
    assert bool(trace.origin.notes) == (scale != 1.0)


def test_epoch_milliseconds_of_json_lines_are_seen_by_their_size(tmp_path):
    text = lines(length_line(1758100000100, 10, 2), length_line(1758100001100, 10, 2))
    assert read_trace(written(tmp_path, text)).arrived_at_s.tolist() == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (lines(length_line(0, 10, 5), length_line(3000, 15, 6)), "no block ids, and numbers"),
        (lines(length_line(0.5, 10, 5), length_line(3000.5, 15, 6)), "no block ids, and numbers"),
        (lines(length_line(0, 100, 5, [1, 2]), length_line(3000, 150, 6, [1, 2, 3])), "neither 512 nor 16"),
        (lines(length_line(0, 40, 5, [1, 2, 3]), length_line(3000, 40, 6, [1, 2, 3])), "one request would come each"),
        (lines(length_line(0.0, 700, 5, [1, 2]), length_line(20.2, 700, 6, [1, 2])), "fractions with s"),
        (lines(*(length_line(i, 700, 5, [1, 2]) for i in range(5))), "would come each second"),
        ("timestamp,input_tokens,output_tokens\n0,10,5\n20,15,6\n", "or rename the columns to arrived_at_s"),
    ],
)
def test_where_nothing_says_the_unit_the_user_is_asked_and_the_option_decides(tmp_path, text, why):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=why) as told:
        read_trace(path)
    assert "--time-unit" in str(told.value)
    seconds, milliseconds = (read_trace(path, ReadOptions(time_unit=unit)).arrived_at_s[-1] for unit in ("s", "ms"))
    assert seconds == pytest.approx(1000 * milliseconds)


def test_block_ids_that_fit_no_size_are_refused_with_the_way_out(tmp_path):
    path = written(
        tmp_path,
        lines(length_line(0.0, 40, 5, [1, 2, 3], chat_id=1, parent_chat_id=-1), length_line(1.5, 5000, 5, [1, 2])),
    )
    with pytest.raises(
        ValueError, match=r"hash_ids for \d+ tokens do not fit any block size: say --block-tokens N, or 0"
    ):
        read_trace(path)
    options = ReadOptions(block_tokens=0, time_unit="s")
    assert read_trace(path, options).cached_tokens.tolist() == [0, 0]


def test_a_block_size_that_contradicts_the_lengths_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 hash_ids for 40 tokens do not fit --block-tokens 512"):
        read_trace(written(tmp_path, BAILIAN), ReadOptions(block_tokens=512))


def test_vidurs_block_ids_are_left_aside_and_said_where_they_fit_no_size(tmp_path):
    text = VIDUR.replace("0.125,47", "0.125,5000")
    trace = read_trace(written(tmp_path, text))
    assert trace.cached_tokens.tolist() == [0, 0, 0]
    assert "no prefix hits" in trace.origin.notes[0]


def test_a_row_too_long_for_the_context_leaves_nothing_in_the_cache(tmp_path):
    text = lines(length_line(0, 6758, 5, list(range(14))), length_line(3000, 3500, 5, list(range(7))))
    path = written(tmp_path, text)
    assert read_trace(path).cached_tokens.tolist() == [0, 3500]
    short = read_trace(path, ReadOptions(max_total_tokens=4096))
    assert short.cached_tokens.tolist() == [0]
    assert short.origin.left_out == {"longer than the context": 1}


def test_requests_without_output_are_served_as_one_token_and_said(tmp_path):
    trace = read_trace(written(tmp_path, AZURE_2023 + "2023-11-16 18:15:51.2224670,91,0\n"))
    assert len(trace) == 4
    assert trace.origin.notes == ("1 with no output, served as one token each",)


CHAT = [{"id": "a", "conversations": [{"from": "human", "value": "x" * 200_000}]}]
LMSYS = {"conversation_id": "a", "model": "m", "conversation": [{"content": "hi", "role": "user"}], "turn": 1}
WILDCHAT = {"conversation_hash": "a", "model": "m", "timestamp": "2023-04-09T00:00:00+00:00", "conversation": []}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (json.dumps(CHAT), "tokenizer"),
        (lines(LMSYS), "tokenizer"),
        (lines(WILDCHAT), "tokenizer"),
        (lines({"id": "a", "requests": [{"t": 0.0, "in": 900, "out": 30, "hash_ids": [1]}]}), "a row for each turn"),
        ("start,rate,cv,shape\n0,1,2,3\n", "let it generate"),
        (json.dumps({"0": {"input_tokens": "{1: 0.5}", "output_tokens": "{1: 0.5}"}}), "let it generate"),
        (lines({"request_throughput": 3.0, "mean_ttft_ms": 20.0}), "--save-detailed"),
        (lines(STEP), "serve --record"),
        (lines({"metadata": {}, "metrics": {}}), "field 'timestamp' is missing"),
        (b"PK\x03\x04zip", "zip archive"),
        (b"PAR1\x15\x04" + bytes(range(256)), "Parquet"),
        (b"a,b\n\xff\xfe\x80,1\n", "UTF-8"),
        (gzip.compress(b"a,b\n" * 999)[:-12], "cannot be read"),
        (b'{"timestamp": ' + b"[" * 100_000 + b"\n", "nested too deeply|expected a JSON object"),
        ("arrived_at_s,prompt_tokens,output_tokens\n0,1e300,1\n", "prompt_tokens = '1e300': expected a whole number"),
        (lines(length_line(0, True, 5), length_line(1.5, 3, 5)), "input_length = True: expected a whole number"),
        (lines(length_line(0, 758.7, 5), length_line(1.5, 3, 5)), "input_length = 758.7: expected a whole number"),
        (lines(length_line(-1.5, 5, 5), length_line(1.5, 3, 5)), "timestamp = -1.5: expected seconds"),
        ("word, " * 5000, "every column name once"),
        (BURST.replace(",18,", ",0,").replace(",276,", ",0,"), "no request is left to serve: 3 failed"),
    ],
)
def test_what_holds_no_trace_is_refused_in_one_short_line(tmp_path, data, words):
    with pytest.raises(ValueError, match=words) as told:
        read_trace(written(tmp_path, data, "t"))
    assert len(str(told.value).replace(str(tmp_path), "")) < 280
    assert "\n" not in str(told.value)


def test_a_cell_of_200_000_characters_is_no_hindrance(tmp_path):
    text = 'arrived_at_s,prompt_tokens,output_tokens,text\n0,100,10,"' + "y" * 200_000 + '"\n'
    assert len(read_trace(written(tmp_path, text))) == 1


def test_json_arrays_and_lines_are_the_same_file(tmp_path):
    rows = [json.loads(line) for line in MOONCAKE.splitlines()]
    array = read_trace(written(tmp_path, json.dumps(rows, indent=1)))
    assert array.arrived_at_s.tolist() == read_trace(written(tmp_path, MOONCAKE)).arrived_at_s.tolist()


def test_only_the_time_column_has_to_be_ours(tmp_path):
    trace = read_trace(written(tmp_path, "arrived_at_s,num_prefill_tokens,num_decode_tokens\n0,30,140\n"))
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([30], [140])


def test_the_page_on_traces_knows_every_format():
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    modules = {one.rows.__module__.rpartition(".")[2]: one.name for one in all_formats()}
    names = {
        "own": "our CSV",
        "token_log": "log of calls",
        "guidellm": "guidellm",
        "aiperf_dataset": "AIPerf's dataset",
    }
    names |= {
        "lengths": "length files",
        "vllm_bench": "vllm bench",
        "aiperf_result": "result of AIPerf",
        "agents": "agent traces",
    }
    names |= {"bench_requests": "requests.jsonl", "server_record": "serve --record", "conversations": "ShareGPT"}
    names |= {"rate_tables": "ServeGen", "timed_trace": "timed_trace", "inference_perf": "inference-perf"}
    assert [module for module, name in modules.items() if names.get(module, name) not in page] == []
