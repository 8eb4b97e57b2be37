"""A decode that was held under asynchronous scheduling comes back without drafts, and that is no evidence."""

from __future__ import annotations

from types import SimpleNamespace

from slos_serve.vllm_plugin.engine import view
from slos_serve.vllm_plugin.learning.drafting import DraftWatch


def running(**drafts):
    requests = [SimpleNamespace(request_id=name, spec_token_ids=list(ids)) for name, ids in drafts.items()]
    return SimpleNamespace(running=requests)


def test_only_who_is_held_loses_its_placeholders() -> None:
    scheduler = running(held=[-1, -1], runs=[-1, -1], prompt=[])
    assert view.drop_stale_drafts(scheduler, {"runs": 3}) == ["held"]
    assert [request.spec_token_ids for request in scheduler.running] == [[], [-1, -1], []]


def test_the_step_in_which_it_comes_back_counts_for_no_acceptance() -> None:
    watch = DraftWatch()
    live = {name: SimpleNamespace(has_begun=True, slo_class=name) for name in ("held", "runs")}
    watch.note_plan({"held": 3, "runs": 3})
    assert watch.without({"runs": 4}, held=["held"]) == frozenset()
    undrafted = watch.without({"held": 1, "runs": 4}, held=[])
    assert undrafted == {"held"}
    outputs = [
        SimpleNamespace(request_id="held", new_token_ids=[7]),
        SimpleNamespace(request_id="runs", new_token_ids=[7] * 4),
    ]
    watch.observe_outputs(live, {"runs": [1, 2, 3]}, outputs, undrafted)
    assert set(watch.acceptance) == {"runs"}
    assert watch.without({"held": 4, "runs": 4}, held=[]) == frozenset()
