"""Reasoning trees: text, trajectories, units, tries, packed rows (torch and numpy alone)."""

from tw_core.errors import BudgetError, GrammarError, ShapeError, ThreadWeaverError, TrieError
from tw_core.tags import TAGS, TagIds
from tw_core.units import Unit

__all__ = [
    "TAGS",
    "BudgetError",
    "GrammarError",
    "ShapeError",
    "TagIds",
    "ThreadWeaverError",
    "TrieError",
    "Unit",
]
