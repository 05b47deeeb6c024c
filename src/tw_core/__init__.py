"""Reasoning trees: text, trajectories, units, tries, packed rows (torch and numpy alone)."""

from tw_core.errors import BudgetError, GrammarError, ShapeError, ThreadWeaverError, TrieError
from tw_core.stats import ParallelStats, parallel_stats
from tw_core.tags import TAGS, TagIds
from tw_core.units import Unit, extract_units

__all__ = [
    "TAGS",
    "BudgetError",
    "GrammarError",
    "ParallelStats",
    "ShapeError",
    "TagIds",
    "ThreadWeaverError",
    "TrieError",
    "Unit",
    "extract_units",
    "parallel_stats",
]
