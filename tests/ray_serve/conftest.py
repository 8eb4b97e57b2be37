"""Make `parts` importable, and fleets on clocks that stand still."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from parts import Clocks

from slos_serve.ray_serve.fleet import Fleet


@pytest.fixture
def clocks():
    return Clocks()


@pytest.fixture
def fleet(clocks):
    return Fleet("model", wall=clocks.wall, monotonic=clocks.monotonic)
