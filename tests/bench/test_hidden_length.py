"""What the benchmark hides must stay hidden: the planner may not learn a true length from `max_tokens`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from slos_serve.vllm_plugin.engine.tracking import Tracker


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"hidden_max_tokens": 256}, 256),
        ({"hidden_max_tokens": 7}, 30),  # never under what the engine will produce
        ({"hidden_max_tokens": "many"}, 30),
        ({"hidden_max_tokens": 10**9}, 900),
        ({}, 30),
        (None, 30),
    ],
)
def test_the_planner_sees_the_limit_of_the_class_and_not_the_true_length(extra, expected):
    tracker = Tracker.__new__(Tracker)
    tracker.scheduler = SimpleNamespace(max_model_len=1000)
    request = SimpleNamespace(max_tokens=30, num_prompt_tokens=100, sampling_params=SimpleNamespace(extra_args=extra))
    assert tracker._max_output_tokens(request) == expected
