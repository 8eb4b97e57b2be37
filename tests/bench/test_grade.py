from __future__ import annotations

import pytest

from slos_serve.bench.client import BenchRequest, StreamResult
from slos_serve.bench.grade import entry, grade_run, grade_stream, lateness, request_row, verdict
from slos_serve.core.types import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def request(name="r", *, slo=SLO, slo_class="chat", tokens=21, thinking=0):
    return BenchRequest(
        request_id=name, offset_s=0.0, prompt_token_ids=[1] * 10, output_tokens=tokens, hidden_max_tokens=64,
        slo=slo, slo_class=slo_class, thinking_tokens=thinking,
    )  # fmt: skip


def stream(name="r", *, first=0.5, gap=0.05, tokens=21, sent=0.0, **more):
    chunks = [(sent + first + gap * i, i + 1) for i in range(tokens)]
    more = {"status": 200, "finish_reason": "length", "finished_s": chunks[-1][0] if chunks else sent} | more
    return StreamResult(request_id=name, sent_s=sent, chunks=chunks, prompt_tokens=10, **more)


def graded(result, **kwargs):
    return grade_stream(request(), result, **kwargs).graded


def test_a_stream_in_time_is_met_where_nothing_is_promised():
    assert graded(stream()).outcome == "met"
    assert not graded(stream()).promised


def test_a_late_first_token_is_missed():
    late = grade_stream(request(), stream(first=1.25))
    assert late.graded.outcome == "missed"
    assert late.lateness_s == pytest.approx(0.25)


def test_time_gained_on_the_first_token_may_be_spent_on_the_others():
    # 0.5 s early; 20 gaps of 0.12 s are 0.4 s over what 0.1 s a token grants
    assert graded(stream(gap=0.12)).outcome == "met"
    assert not graded(stream(gap=0.12)).met_mean_tpot
    assert graded(stream(gap=0.13)).outcome == "missed"


def test_a_promise_in_the_stream_or_in_the_header_counts():
    by_slo = graded(stream(slo={"verdict": "promised"}, headers={"x-slo-verdict": "pending"}))
    by_header = graded(stream(headers={"x-slo-verdict": "promised"}))
    assert (by_slo.outcome, by_slo.promised) == ("met", True)
    assert (by_header.outcome, by_header.promised) == ("met", True)


def test_a_broken_promise_is_missed_and_promised():
    result = graded(stream(first=2.0, slo={"verdict": "promoted"}))
    assert (result.outcome, result.promised) == ("missed", True)


def test_a_request_without_a_promise_is_declined_even_in_time():
    assert graded(stream(slo={"verdict": "best-effort", "reason": "compute"})).outcome == "declined"


def test_one_verdict_makes_the_server_one_that_promises():
    results = [stream("a", slo={"verdict": "promised"}), stream("b")]
    grades = grade_run([request("a"), request("b")], results)
    assert [g.graded.outcome for g in grades] == ["met", "declined"]


def test_an_observing_server_promises_nothing():
    result = stream(headers={"x-slo-verdict": "best-effort", "x-slo-reason": "observe"})
    assert verdict(result) == ""
    assert graded(result).outcome == "met"


def test_a_server_that_has_stepped_down_promises_nothing_meanwhile():
    observed = stream("b", headers={"x-slo-verdict": "best-effort", "x-slo-reason": "observe"})
    late = stream("c", first=9.0, headers={"x-slo-verdict": "best-effort", "x-slo-reason": "observe"})
    results = [stream("a", slo={"verdict": "promised"}), observed, late]
    grades = grade_run([request("a"), request("b"), request("c")], results)
    assert [g.graded.outcome for g in grades] == ["met", "met", "missed"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_rejected(status):
    assert graded(stream(tokens=0, status=status, error="HTTP")).outcome == "rejected"


def test_an_error_is_failed_however_many_tokens_came():
    assert graded(stream(error="the stream ended without a finish reason")).outcome == "failed"


def test_a_request_without_slo_is_outside():
    result = grade_stream(request(slo=Slo(), slo_class="best-effort"), stream())
    assert result.graded.outcome == "none"
    assert result.lateness_s is None


def test_thinking_tokens_have_their_own_pace():
    slo = Slo(ttft_s=1.0, tpot_s=0.1, thinking_tpot_s=0.02)
    thinks = grade_stream(request(slo=slo, thinking=15), stream(first=1.0, gap=0.05))
    answers = grade_stream(request(slo=slo, thinking=0), stream(first=1.0, gap=0.05))
    assert thinks.graded.outcome == "missed"
    assert answers.graded.outcome == "met"


def test_lateness_looks_at_the_first_token_every_tenth_and_the_last():
    result = stream(first=1.0, gap=0.1)
    result.chunks[13] = (result.chunks[13][0] + 0.09, 14)
    assert lateness(request(), result) == pytest.approx(0.0)
    result.chunks[19] = (result.chunks[19][0] + 0.04, 20)
    assert lateness(request(), result) == pytest.approx(0.04)


def test_the_entry_has_the_agreed_keys_and_its_outcomes_add_up():
    results = [
        stream("a", slo={"verdict": "promised", "promise_lead_ms": 400}),
        stream("b", first=3, slo={"verdict": "promised"}),
        stream("c", slo={"verdict": "best-effort"}),
        stream("d", tokens=0, status=429, error="HTTP 429"),
        stream("e", tokens=3, error="lost"),
    ]
    classes = ["chat", "chat", "coding", "coding", "coding"]
    requests = [request(r.request_id, slo_class=name) for r, name in zip(results, classes, strict=True)]
    found = entry(grade_run(requests, results), system="slos-serve", scenario="test", span_s=10.0, rate_rps=0.5)
    keys = """system scenario rate_rps num_requests met missed declined rejected failed cancelled promised kept
        attainment attainment_mean_tpot attainment_window goodput_rps ttft_s tpot_s drain_s by_class"""
    assert set(keys.split()) <= set(found)
    outcomes = ("met", "missed", "declined", "rejected", "failed", "cancelled")
    assert [found[key] for key in outcomes] == [1, 1, 1, 1, 1, 0]
    assert (found["promised"], found["kept"], found["attainment"]) == (2, 1, 0.2)
    assert sum(found["by_class"]["coding"][key] for key in outcomes) == found["by_class"]["coding"]["num_requests"] == 3


def test_a_row_tells_what_was_asked_and_what_came():
    row = request_row(grade_stream(request(), stream(slo={"verdict": "promised", "reason": ""})))
    assert row["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert (row["outcome"], row["verdict"], row["ttft_s"]) == ("met", "promised", 0.5)
    assert row["chunks"][0] == [0.5, 1]
