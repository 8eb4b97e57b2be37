"""However the bytes of a stream are cut, only the last data event changes, and only by two keys."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.http.stream import StreamTail, append_member, write_into

EXTRA = {"slo": {"verdict": "promised"}, "service_tier": "default"}


def sse(*chunks):
    return b"".join(f"data: {json.dumps(c, separators=(',', ':'), ensure_ascii=False)}\n\n".encode() for c in chunks)


def chunk(text="", finish=None, index=0):
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]}


DONE = b"data: [DONE]\n\n"
USAGE = {"choices": [], "usage": {"total_tokens": 3}}
TRICK = chunk('"finish_reason":"stop" data: [DONE]\n\n')
CASES = {
    "plain": (sse(chunk("Hé"), chunk("llo 🌍"), chunk("", "stop")) + DONE, 1, chunk("", "stop")),
    "usage": (sse(chunk("a"), chunk("b", "length"), USAGE) + DONE, 1, USAGE),
    "one event": (sse(chunk("a", "stop")) + DONE, 1, chunk("a", "stop")),
    "two choices": (
        sse(chunk("a"), chunk("b", "stop"), chunk("c", index=1), chunk("d", "stop", 1)) + DONE,
        2,
        chunk("d", "stop", 1),
    ),
    "two choices and usage": (sse(chunk("b", "stop"), chunk("d", "stop", 1), USAGE) + DONE, 2, USAGE),
    "text that looks like an end": (sse(TRICK, chunk("", "stop")) + DONE, 1, chunk("", "stop")),
    "comments": (b": keep-alive\n\n" + sse(chunk("a", "stop")) + b": keep-alive\n\n" + DONE, 1, chunk("a", "stop")),
    "no end mark": (sse(chunk("a"), chunk("b", "stop")), 1, chunk("b", "stop")),
    "spaced": (
        b'data: {"choices": [{"finish_reason": "stop"}]}\n\n' + DONE,
        1,
        {"choices": [{"finish_reason": "stop"}]},
    ),
}


def pass_through(pieces, num_choices):
    tail = StreamTail(lambda: EXTRA, num_choices)
    return b"".join([*map(tail.feed, pieces), tail.close()])


def datas(stream):
    return [json.loads(e[6:]) for e in stream.split(b"\n\n") if e.startswith(b"data: {")]


@pytest.mark.parametrize("name", CASES)
def test_every_stream_whole_and_byte_by_byte(name):
    stream, num_choices, last = CASES[name]
    whole = pass_through([stream], num_choices)
    assert pass_through([stream[i : i + 1] for i in range(len(stream))], num_choices) == whole
    assert datas(whole)[-1] == {**last, **EXTRA}
    assert datas(whole)[:-1] == datas(stream)[:-1]
    assert whole.endswith(DONE) == stream.endswith(DONE)


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 400), max_size=12))
def test_cutting_a_stream_elsewhere_changes_nothing(name, cuts):
    stream, num_choices, _ = CASES[name]
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert pass_through(pieces, num_choices) == pass_through([stream], num_choices)


def test_an_ordinary_chunk_goes_out_as_the_very_object_that_came_in():
    tail = StreamTail(lambda: EXTRA)
    ordinary = sse(chunk("token"))
    assert tail.feed(ordinary) is ordinary


def test_nothing_waits_before_the_last_choice_has_finished():
    tail = StreamTail(lambda: EXTRA, num_choices=2)
    for data in (sse(chunk("a")), sse(chunk("b", "stop")), sse(chunk("c", index=1))):
        assert tail.feed(data) == data
    assert tail.feed(sse(chunk("d", "stop", 1))) == b""


@pytest.mark.parametrize(
    "stream",
    [
        sse(chunk("a")) + sse({"error": {"message": "broken"}}) + DONE,
        sse(chunk("a")),
        b"",
        b"data: [DONE]\n\n",
        b'data: {"choices":[{"finish_reason":"stop"\n\n' + DONE,
        b'data: ["finish_reason":"stop"]\n\n' + DONE,
        b"half an event",
        b'data: {"finish_reason":"stop"}\r\n\r\ndata: [DONE]\r\n\r\n',
    ],
)
def test_a_stream_that_is_not_ours_to_read_passes_unchanged(stream):
    assert pass_through([stream], 1) == stream
    assert pass_through([stream[i : i + 1] for i in range(len(stream))], 1) == stream


def test_a_whole_document_gets_the_keys_and_keeps_the_rest():
    document = '{"a": "é🌍", "service_tier": null, "x": 1.5}'.encode()
    assert json.loads(write_into(document, EXTRA)) == {"a": "é🌍", "x": 1.5, **EXTRA}
    half = b'{"a": "\\ud83d"}'
    assert json.loads(write_into(half, EXTRA))["a"] == "\ud83d"
    for other in (b"", b"[1]", b"nonsense", b"\xff"):
        assert write_into(other, EXTRA) == other


@pytest.mark.parametrize("body", [b'{"a":1}', b' {"a":1} \r\n', '{"a":"é}"}'.encode(), b'{"vllm_xargs":{"b":2},"a":1}'])
def test_a_member_is_appended_without_touching_a_byte(body):
    longer = append_member(body, "vllm_xargs", {"slo_class": "chat"})
    assert longer.startswith(body.rstrip()[:-1])
    assert json.loads(longer) == {**json.loads(body), "vllm_xargs": {"slo_class": "chat"}}
