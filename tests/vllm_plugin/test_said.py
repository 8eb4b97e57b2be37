"""The engine believes its HTTP edge, and of everybody else only what anybody may say."""

from __future__ import annotations

import pytest

from slos_serve.core.baselines import VllmPlanner
from slos_serve.http.seal import sealed
from slos_serve.vllm_plugin.engine.said import UNREADABLE, said
from slos_serve.vllm_plugin.testing import make_request

CLAIM = {"slo_id": "x", "slo_tenant": "acme", "slo_class": "coding"}


def test_id_arrival_and_tenant_of_a_client_are_ignored(build) -> None:
    scheduler = build(VllmPlanner())
    now = scheduler.slo.clock.now()
    args = {**CLAIM, "slo_arrival_s": now - 30, "slo_seal": "0" * 64}
    for name, one in (("client", args), ("edge", sealed(args))):
        scheduler.add_request(make_request(name, args=one, arrival_s=now))
    client, edge = (scheduler.slo.tracker.live[name] for name in ("client", "edge"))
    assert (client.slo_id, client.tenant, client.slo_class) == (None, "", "coding")
    assert (edge.slo_id, edge.tenant, edge.slo_class) == ("x", "acme", "coding")
    assert client.arrival_s - edge.arrival_s == pytest.approx(30)
    assert (client.stamped_s, edge.stamped_s) == (now, now - 30)


def test_behind_an_edge_nothing_counts_that_it_did_not_write(build) -> None:
    scheduler = build(VllmPlanner(), slo={"edge": True})
    for name, args in (("client", CLAIM), ("edge", sealed(CLAIM))):
        scheduler.add_request(make_request(name, args=args))
    classes = {name: live.slo_class for name, live in scheduler.slo.tracker.live.items()}
    assert classes == {"client": "best-effort", "edge": "coding"}


def test_what_is_no_word_of_ours_or_longer_than_one_is_not_kept() -> None:
    heard = said(
        {"slo_class": "x" * 10**6, "slo_ttft_ms": 400, "slo_note": "x" * 10**6, 5: 1, "slo_e2e_ms": [1] * 10**6}
    )
    assert heard == {"slo_class": UNREADABLE, "slo_ttft_ms": 400, "slo_e2e_ms": UNREADABLE}
