"""Every request of a run with faults has one end, and what must not happen is never called by another name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.bench.client import BenchRequest, StreamResult
from slos_serve.bench.endings import COMPLETED, FAILED, LOST, REFUSED, UNFINISHED, account, ending
from slos_serve.core.types import Slo

ASKED = BenchRequest(
    request_id="r", offset_s=0.0, prompt_token_ids=[1], output_tokens=3, hidden_max_tokens=3, slo=Slo(ttft_s=1.0),
    slo_class="chat",
)  # fmt: skip


def came(tokens=3, error=None, status=200):
    chunks = [(0.1 * i, i) for i in range(1, tokens + 1)]
    return StreamResult(request_id="r", sent_s=0.0, status=status, chunks=chunks, finished_s=1.0, error=error)


@pytest.mark.parametrize(
    ("result", "there", "gone"),
    [
        (came(), COMPLETED, COMPLETED),
        (came(2), LOST, LOST),  # silently cut short
        (came(1, "the stream ended without a finish reason"), LOST, LOST),
        (came(1, "cut off: still running at the end of the run"), UNFINISHED, UNFINISHED),
        (came(0, "HTTP 429: queue-full", 429), REFUSED, REFUSED),
        (came(0, "HTTP 500: engine died", 500), FAILED, FAILED),
        (came(1, "EngineCore encountered an issue"), FAILED, FAILED),
        (came(1, "ClientPayloadError: Response payload is not completed"), LOST, FAILED),
        (came(0, "ClientConnectorError: Cannot connect to host", 0), LOST, FAILED),
        (came(1, "TimeoutError: "), LOST, LOST),
    ],
)
def test_how_a_request_ended_depends_on_whether_the_server_may_go(result, there, gone):
    assert ending(ASKED, result) == there
    assert ending(ASKED, result, server_may_go=True) == gone


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, "cut off: x", "HTTP 429: x", "TimeoutError: "]))))
def test_every_request_is_counted_once(ends):
    results = [came(tokens, error, 429 if error and "429" in error else 200) for tokens, error in ends]
    counts = account([ASKED] * len(results), results)
    doubled = counts.pop("doubled")
    assert counts.pop("offered") == sum(counts.values()) == len(results)
    assert doubled == sum(tokens > 3 for tokens, _ in ends)
