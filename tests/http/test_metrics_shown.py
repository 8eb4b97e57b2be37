"""Gauges show what is known now, and nothing where nothing is."""

import math


def test_a_headroom_that_is_not_known_any_more_is_no_number(hub, registry):
    name = "slos_serve_prefill_headroom_tokens_per_second"
    hub.feed({"snapshot": {"headroom_tokens_per_s": 6157.0}})
    assert registry.get_sample_value(name) == 6157
    hub.feed({"snapshot": {"num_promised": 1}})
    assert registry.get_sample_value(name) == 6157  # an older engine, or a part of the news
    hub.feed({"snapshot": {"headroom_tokens_per_s": None}})
    assert math.isnan(registry.get_sample_value(name))
