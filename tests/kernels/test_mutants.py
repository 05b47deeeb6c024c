"""The mutation check of tests/kernels/mutants.py: its edits apply in every run; the check itself is a slow test."""

import pytest

from tests.kernels.mutants import FOLDER, MUTANTS, ROOT, survives


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_edit_applies(mutant) -> None:
    text = (ROOT / "src" / FOLDER / mutant.file).read_text()
    assert mutant.old in text
    assert mutant.new != mutant.old


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_ordinary_tests_catch(mutant) -> None:
    assert survives(mutant) is None
