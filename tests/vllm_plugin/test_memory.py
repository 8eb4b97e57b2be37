"""What is kept of requests does not grow with how many there were."""

from __future__ import annotations

import gc
from collections import Counter

from slos_serve.vllm_plugin.testing import Engine, make_request

COUNTED = ("slos_serve", "numpy", "collections")


def census() -> Counter[str]:
    """Return how many objects of our own, and of what we keep things in, are alive."""
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    return Counter(
        kind.__name__ for kind in kinds if str(kind.__module__).startswith(COUNTED) or kind in {dict, list, set}
    )


def test_twenty_thousand_requests_leave_as_many_objects_as_two_thousand(build, tmp_path) -> None:
    slo = {"record": str(tmp_path / "steps.jsonl"), "always_plan": False, "config": None}
    scheduler = build(slo=slo, max_num_seqs=256, max_num_batched_tokens=8192, num_blocks=4000, prefix_caching=False)
    scheduler.slo.housekeeper.stop()  # what it does is done here
    engine = Engine(scheduler)

    def serve(first: int, count: int) -> None:
        for i in range(first, first + count, 250):
            for k in range(i, i + 250):
                args = (
                    {"slo_class": "chat"},
                    None,
                    {"slo_ttft_ms": 5000 + k, "slo_tpot_ms": 100},
                    {"slo_class": f"x{k}"},
                )
                request = make_request(f"r{k}", prompt_tokens=8 + k % 20, max_tokens=2, args=args[k % 4], seed=k % 50)
                scheduler.add_request(request)
            engine.run()
            engine.outputs.clear()
            engine.finished.clear()
            engine.batches.clear()
            scheduler.slo.recorder.flush()

    serve(0, 2000)
    before = census()
    serve(2000, 18_000)
    after = census()
    grown = {name: after[name] - before[name] for name in after if after[name] > 1.1 * before[name] + 200}
    assert grown == {}
    assert not scheduler.slo.faults.counts
    slo_runtime = scheduler.slo
    assert len(slo_runtime.tracker.table.classes) < 20
    assert len(slo_runtime.promises.tally.classes) < 20
    assert len(slo_runtime.tracker.table._store) <= 512
