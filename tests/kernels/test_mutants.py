"""The mutation check of tests/kernels/mutants.py as a slow test."""

import pytest

from tests.kernels.mutants import MUTANTS, survives


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_ordinary_tests_catch(mutant) -> None:
    assert survives(mutant) is None
