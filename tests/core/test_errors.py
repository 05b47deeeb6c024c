"""The tree of exceptions, and annotations that work without jaxtyping."""

import subprocess
import sys

import pytest

from tw_core import BudgetError, GrammarError, ShapeError, ThreadWeaverError, TrieError


@pytest.mark.parametrize("error", [ShapeError, GrammarError, BudgetError])
def test_every_error_is_a_trie_error_and_a_value_error(error: type[Exception]) -> None:
    assert issubclass(error, TrieError)
    assert issubclass(error, ThreadWeaverError)
    assert issubclass(error, ValueError)


def test_shapes_are_inert_without_jaxtyping() -> None:
    code = (
        "import sys; sys.modules['jaxtyping'] = None\n"
        "import typing, numpy; from tw_core import _shapes\n"
        "for name in _shapes.__all__:\n"
        "    hint = getattr(_shapes, name)[numpy.ndarray, ' L']\n"
        "    assert typing.get_args(hint) == (numpy.ndarray, ' L'), hint\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
