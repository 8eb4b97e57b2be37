"""What holds for every test."""

import pytest
from tests.collector import Collector


def pytest_collection_modifyitems(items):
    """Warnings are errors, but not those that vLLM and PyTorch raise while a real engine runs."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="module")
def collector():
    """Return a collector of spans that a module's servers send theirs to."""
    collector = Collector()
    yield collector
    collector.close()
