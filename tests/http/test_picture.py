"""The picture of a request's tokens: what is in it, that it never fails, and that clients' words stay text."""

import re
from xml.etree import ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from slos_serve.core.story import state_of, story
from slos_serve.http.picture import picture, standalone

TIMES = st.none() | st.floats(0.1, 1e7)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "verdict": st.sampled_from(["promised", "promoted", "best-effort", "rejected", "pending", ""]),
        "reason": st.sampled_from(["", "compute", "memory", "observe", "of another version"]),
        "outcome": st.none()
        | st.sampled_from(["met", "missed", "declined", "rejected", "failed", "cancelled", "none"]),
        "promised": st.booleans(),
        "stages": st.fixed_dictionaries({"prefill": st.sampled_from(["met", "missed", ""])}),
        "asked": st.dictionaries(st.sampled_from(["ttft_ms", "tpot_ms", "e2e_ms", "max_gap_ms"]), st.floats(0.1, 1e6)),
        "ttft_ms": TIMES,
        "tpot_ms": TIMES,
        "num_prompt_tokens": st.integers(1, 10**6),
        "num_output_tokens": st.integers(0, 10**5),
        "tokens": st.lists(st.tuples(st.floats(0, 1e7), st.integers(1, 10**5)), max_size=50),
    },
)


@given(RECORDS)
def test_whatever_is_known_of_a_request_can_be_told_and_drawn(record):
    assert story(record)
    assert state_of(record)
    svg = picture(record)
    if svg:
        ET.fromstring(standalone(svg))
        assert "nan" not in svg
        assert "inf" not in svg.replace("infinite", "")
        assert len(svg) < 20_000


def test_late_tokens_are_marked_and_the_words_say_when_they_were_due():
    record = {
        "promise": {"ttft_ms": 400.0, "tpot_ms": 50.0},
        "ttft_ms": 612.0,
        "tpot_ms": 40.0,
        "num_output_tokens": 30,
    }
    svg = picture(record)
    assert svg.count('class="late"') == 1
    assert "first token after 612 ms, due after 400 ms" in svg
    assert "token 30 after 1772 ms, due after 2062 ms" in svg
    early = picture({**record, "ttft_ms": 200.0})
    assert 'class="late"' not in early


def test_no_token_and_no_deadline_is_no_picture():
    assert picture({"verdict": "best-effort", "reason": "requested"}) == ""


def test_a_picture_has_no_styles_of_its_own_that_a_strict_page_would_refuse():
    svg = picture({"asked": {"ttft_ms": 400.0}, "ttft_ms": 300.0, "num_output_tokens": 1})
    assert not re.search(r"style=|<script|href", svg)
