"""The mutations of `scripts/mutations.py` are of this code, so that running them says something."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "scripts" / "mutations.py")
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda one: one.name)
def test_the_line_of_a_mutation_is_there_once_and_its_tests_exist(mutation):
    assert (ROOT / "src" / "slos_serve" / mutation.file).read_text(encoding="utf-8").count(mutation.line) == 1
    assert mutation.line != mutation.becomes
    assert all((ROOT / test).exists() for test in mutation.tests.split())
