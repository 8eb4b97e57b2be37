"""The reference names every word, key, header, route and metric that there is."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from slos_serve.core.words import MEANINGS
from slos_serve.http.answers import EXPOSED_HEADERS
from slos_serve.http.metrics import SloMetrics
from slos_serve.http.routes import ROUTES
from slos_serve.http.slo import BODY_KEYS, KNOWN_HEADERS, OBJECTIVE_HEADER, SESSION_HEADERS

TEXT = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
METRICS = CollectorRegistry()
SloMetrics(METRICS)
HEADERS = [name.decode() for name in (*KNOWN_HEADERS, OBJECTIVE_HEADER, *SESSION_HEADERS)]


@pytest.mark.parametrize("key", [*BODY_KEYS, *(word for words in MEANINGS.values() for word in words if word)])
def test_every_key_and_word_is_explained(key):
    assert f"`{key}`" in TEXT


@pytest.mark.parametrize("words", MEANINGS.values())
def test_words_mean_there_what_they_mean_here(words):
    for word, meaning in words.items():
        assert not word or f"| `{word}` | {meaning}" in TEXT


@pytest.mark.parametrize("name", [name for name in HEADERS if not name.endswith(("-s", "-us"))])
def test_every_header_a_client_may_send_is_listed(name):
    assert name in TEXT


@pytest.mark.parametrize("name", [name for name in EXPOSED_HEADERS if name.startswith("x-")])
def test_every_header_of_an_answer_is_listed(name):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_is_listed(path):
    assert f"`{path}`" in TEXT


@pytest.mark.parametrize("metric", [one.name for one in METRICS.collect()])
def test_every_metric_is_listed(metric):
    assert f"`{metric}`" in TEXT or f"`{metric}_total`" in TEXT
