from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from slos_serve.traces.trace import (
    SMALL_TRACE,
    Trace,
    read_lengths,
    read_trace,
    small_trace,
    synthetic_arrivals,
    write_trace,
)

OURS = "arrived_at_s,prompt_tokens,output_tokens\n0.0,10,2\n1.5,20,3\n4.0,30,4\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_our_columns_are_read(tmp_path):
    trace = read_trace(write(tmp_path / "a.csv", OURS))
    assert trace.arrived_at_s.tolist() == [0.0, 1.5, 4.0]
    assert trace.prompt_tokens.tolist() == [10, 20, 30]
    assert trace.output_tokens.tolist() == [2, 3, 4]
    assert trace.thinking_tokens.tolist() == [0, 0, 0]
    assert trace.slo_class.tolist() == ["", "", ""]
    assert trace.rate_rps == pytest.approx(3 / 6.0)


def test_optional_columns_are_read_from_gzip(tmp_path):
    text = "arrived_at_s,prompt_tokens,output_tokens,session_id,turn,slo_class\n0,5,1,s-1,0,chat\n0,6,1,s-1,1,coding\n"
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    trace = read_trace(path)
    assert trace.slo_class.tolist() == ["chat", "coding"]
    assert trace.session_id.tolist() == ["s-1", "s-1"]
    assert trace.turn.tolist() == [0, 1]


def test_azure_time_stamps_count_from_the_first_request(tmp_path):
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
    )
    trace = read_trace(write(tmp_path / "azure.csv", text))
    assert trace.arrived_at_s.tolist() == pytest.approx([0.0, 0.052])
    assert trace.prompt_tokens.tolist() == [4808, 3180]


def test_mooncake_lines_are_spread_inside_ticks_and_know_their_prefix_hits(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 0, "input_length": 1300, "output_length": 6, "hash_ids": [1, 2, 9]},
        {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]},
    ]
    path = write(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    trace = read_trace(path)
    assert trace.arrived_at_s.tolist() == [0.0, 1.5, 3.0]
    assert trace.cached_tokens.tolist() == [0, 1024, 600]


def test_a_window_starts_at_zero_and_keeps_its_duration_as_span(tmp_path):
    trace = read_trace(f"{write(tmp_path / 'a.csv', OURS)}@1:4")
    assert trace.arrived_at_s.tolist() == [0.5, 3.0]
    assert trace.span_s == 4.0
    assert trace.rate_rps == 0.5


def test_a_file_whose_name_holds_an_at_sign_is_still_a_file(tmp_path):
    assert len(read_trace(write(tmp_path / "a@b.csv", OURS))) == 3


def test_stretching_reaches_the_rate_and_keeps_the_shape(tmp_path):
    trace = read_trace(write(tmp_path / "a.csv", OURS))
    fast = trace.at_rate(5.0)
    assert fast.rate_rps == pytest.approx(5.0)
    assert fast.gap_cv == pytest.approx(trace.gap_cv)
    assert fast.prompt_tokens.tolist() == trace.prompt_tokens.tolist()


def test_requests_beyond_the_context_are_dropped_and_counted(tmp_path):
    kept, dropped = read_trace(write(tmp_path / "a.csv", OURS)).limited_to(23)
    assert (len(kept), dropped) == (2, 1)


def test_lengths_without_arrivals_take_synthetic_ones(tmp_path):
    lengths = read_lengths(write(tmp_path / "l.csv", "prompt_tokens,output_tokens,extra\n5,1,x\n6,2,y\n"))
    trace = lengths.with_arrivals(np.array([0.0, 2.0]))
    assert trace.prompt_tokens.tolist() == [5, 6]
    assert trace.rate_rps == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'arrived_at_s' is missing: found an empty file"),
        ("\n", "no rows"),
        ("arrived_at_s,prompt_tokens,output_tokens\n", "no rows"),
        ("arrived_at_s,prompt_tokens\n0,1\n", "column 'output_tokens' is missing"),
        (
            "arrived_at_s,prompt_tokens,output_tokens\n0,1,1\n2,1,1\n1,1,1\n",
            "a.csv:4: arrived_at_s = 1 s: .*sort the file",
        ),
        ("arrived_at_s,prompt_tokens,output_tokens\n0,1,1\n1,-4,1\n", "a.csv:3: prompt_tokens = '-4'"),
        ("arrived_at_s,prompt_tokens,output_tokens\n0,1,1.5\n", "a.csv:2: output_tokens = '1.5'"),
        ("arrived_at_s,prompt_tokens,output_tokens\n0,1,many\n", "a.csv:2: output_tokens = 'many'"),
        ("arrived_at_s,prompt_tokens,output_tokens\nsoon,1,1\n", "a.csv:2: arrived_at_s = 'soon'"),
        ("arrived_at_s,prompt_tokens,output_tokens\n0,1\n", "a.csv:2: 2 values: expected 3"),
        ("arrived_at_s,prompt_tokens,prompt_tokens,output_tokens\n0,1,1,1\n", "every column name once"),
        ("arrived_at_s;prompt_tokens;output_tokens\n0;1;1\n", "a.csv:1: .*separated by commas"),
        ("arrived_at_s\tprompt_tokens\toutput_tokens\n0\t1\t1\n", "a.csv:1: .*separated by commas"),
    ],
)
def test_a_bad_csv_names_file_line_and_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"timestamp": 0}\n', "m.jsonl:1: field 'input_length' is missing: found timestamp$"),
        ("{}\n", "m.jsonl:1: field 'timestamp' is missing: found an empty object$"),
        ("[1]\n", r"m.jsonl:1: '\[1\]': expected a JSON object"),
        ("{\n", "m.jsonl:1: '{': expected a JSON object"),
        ('{"timestamp": null, "input_length": 1, "output_length": 1}\n', "timestamp = None: expected seconds"),
        (
            '{"timestamp": 0, "input_length": Infinity, "output_length": 1}\n',
            "input_length = inf: expected a whole number",
        ),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": 3}\n', "m.jsonl:1: hash_ids: "),
        ('{"timestamp": 0, "input_length": -1, "output_length": 1}\n', "m.jsonl:1: input_length"),
        (
            (
                '{"timestamp": 9, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n'
                '{"timestamp": 3, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n'
            ),
            r"m.jsonl:2: timestamp = 0\.003 s: expected not before the row above \(0\.009 s\)",
        ),
    ],
)
def test_a_bad_mooncake_line_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / "m.jsonl", text))


def test_a_file_that_cannot_be_read_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "broken.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"broken\.csv\.gz: cannot be read"):
        read_trace(tmp_path / "broken.csv.gz")


@pytest.mark.parametrize("window", ["1", "1:", ":1", "a:b", "-1:5", "0:0", "90:5", "0:nan"])
def test_a_bad_or_empty_window_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"a\.csv"):
        read_trace(f"{write(tmp_path / 'a.csv', OURS)}@{window}")


@pytest.mark.parametrize("process", ["poisson", "gamma:3", "gamma:0.5", "bursts:8:10:0.2"])
def test_synthetic_arrivals_have_the_mean_rate(process):
    times = synthetic_arrivals(process, 4.0, 40_000, np.random.default_rng(1))
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.05)


def test_gamma_gaps_have_the_asked_variation():
    gaps = np.diff(synthetic_arrivals("gamma:3", 4.0, 100_000, np.random.default_rng(2)))
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.05)


def test_bursts_come_at_their_factor_inside_their_share_of_each_period():
    times = synthetic_arrivals("bursts:8:10:0.2", 4.0, 40_000, np.random.default_rng(3))
    inside = np.mod(times, 10.0) < 2.0
    rate_in, rate_out = inside.sum() / (times[-1] * 0.2), (~inside).sum() / (times[-1] * 0.8)
    assert rate_in / rate_out == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("process", ["", "gamma", "gamma:0", "gamma:-1", "gamma:x", "bursts:8:10", "bursts:8:10:1"])
def test_an_unknown_arrival_process_is_refused(process):
    with pytest.raises(ValueError, match="expected poisson, gamma:CV or bursts"):
        synthetic_arrivals(process, 1.0, 5, np.random.default_rng(0))


def test_the_shipped_trace_is_what_its_maker_makes(tmp_path):
    write_trace(small_trace(), tmp_path / "again.csv.gz")
    again = gzip.decompress((tmp_path / "again.csv.gz").read_bytes())
    assert gzip.decompress(SMALL_TRACE.read_bytes()) == again
    assert SMALL_TRACE.stat().st_size < 50_000
    trace = read_trace(SMALL_TRACE)
    assert set(trace.slo_class) == {"chat", "coding", "summarization"}
    assert trace.gap_cv > 2


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="output_tokens has 1 rows: expected 2"):
        Trace.build(arrived_at_s=[0, 1], prompt_tokens=[1, 2], output_tokens=[1])
    with pytest.raises(ValueError, match="expected names among"):
        Trace.build(arrived_at_s=[0], prompt_tokens=[1], output_tokens=[1], colour=["red"])
