"""One readable line for what ended badly, few of them, and nothing that a client could forge."""

import json
import logging

import pytest

from slos_serve import logs
from slos_serve.core.words import MEANINGS, Reason
from slos_serve.http.notices import EVERY_S, Notices

ASKED = {"ttft_ms": 400.0, "tpot_ms": 50.0}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def notices(clock):
    return Notices(clock)


@pytest.fixture(autouse=True)
def _heard(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.slos_serve")


def record(outcome="missed", verdict="promised", reason="", **more):
    known = {"id": "0af3", "request_id": "chatcmpl-7", "class": "chat", "tenant": "acme", "asked": ASKED}
    return {
        **known,
        "verdict": verdict,
        "reason": reason,
        "outcome": outcome,
        "ttft_ms": 512.0,
        "tpot_ms": 28.0,
        **more,
    }


def test_a_broken_promise_is_a_warning_that_says_what_was_promised_and_what_came(notices, caplog):
    notices.tell(record())
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    expected = (
        "SLO: a promise was broken: chatcmpl-7 (class chat, tenant acme); "
        "promised ttft 400 ms, tpot 50 ms; first token after 512 ms; 28 ms per token"
    )
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (record("declined", "best-effort", "compute"), ["declined", "compute: " + MEANINGS[Reason][Reason.COMPUTE]]),
        (record("rejected", "rejected", "queue-full"), ["refused (429)", "queue-full"]),
        (record("missed", "best-effort", "observe"), ["without a promise", "asked ttft 400 ms"]),
        (record("failed"), ["failed"]),
        (record(hops=2), ["after 2 other replicas"]),
    ],
)
def test_each_bad_end_is_told_with_its_reason(notices, caplog, ended, words):
    notices.tell(ended)
    (message,) = caplog.messages
    assert all(word in message for word in words)


@pytest.mark.parametrize("outcome", ["met", "cancelled", "none", None])
def test_what_went_well_or_was_given_up_is_not_told(notices, caplog, outcome):
    notices.tell(record(outcome))
    assert not caplog.messages


def test_a_thousand_bad_ends_are_one_line_and_a_number(notices, clock, caplog):
    for _ in range(1000):
        notices.tell(record())
    notices.tell(record(**{"class": "coding"}))
    assert len(caplog.messages) == 2
    clock.now += EVERY_S
    notices.tell(record())
    assert caplog.messages[-1].endswith("(and 999 more of this class since the last such line)")


def test_several_parts_of_one_request_are_one(notices, clock, caplog):
    one = record()
    notices.tell(one)
    clock.now += EVERY_S
    notices.tell(one)
    assert len(caplog.messages) == 1


def test_a_name_that_a_client_chose_cannot_begin_a_line_of_its_own(notices, caplog):
    notices.tell(record(request_id="x\nERROR all is lost\x1b[2J"))
    assert "\n" not in caplog.messages[0]
    assert "\x1b" not in caplog.messages[0]


def test_a_line_carries_its_facts_for_logs_of_json(notices, caplog):
    notices.tell(record())
    facts = json.loads(logs.JsonFormatter().format(caplog.records[0]))["slos_serve"]
    assert facts["request_id"] == "chatcmpl-7"
    assert (facts["event"], facts["asked"], facts["ttft_ms"]) == ("broken", ASKED, 512.0)


def test_the_hub_tells_of_its_own_requests_and_of_refusals(hub, say, caplog):
    hub.feed({"verdicts": [say.verdict("a", asked=ASKED)], "finished": [say.finished("a", "missed", ttft_ms=512.0)]})
    hub.feed({"verdicts": [say.verdict("b")], "finished": [say.finished("b", "missed", slo_class="coding", client=3)]})
    hub.reject("c", slo_class="chat", tenant="", reason="queue-full")
    assert [message.split(":")[1].strip() for message in caplog.messages] == [
        "a promise was broken",
        "a request was refused (429)",
    ]
