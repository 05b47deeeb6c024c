"""Rollouts graded and measured: accuracy, token latency, speedup, beside the published figures.

Names load on first use (PEP 562).
"""

from importlib import import_module
from typing import Any

_HOME = {
    "EvalResult": "tw_recipes.evaluation.evaluate",
    "ExactGrader": "tw_recipes.evaluation.grading",
    "Grade": "tw_recipes.evaluation.grading",
    "GraderPool": "tw_recipes.evaluation.grading",
    "evaluate": "tw_recipes.evaluation.evaluate",
    "load_problems": "tw_recipes.evaluation.benchmarks",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
