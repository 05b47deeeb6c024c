"""Reasoning trees: text, trajectories, units, tries, packed rows (torch and numpy alone)."""

from tw_core.errors import BudgetError, GrammarError, ShapeError, ThreadWeaverError, TrieError
from tw_core.grammar import Block, Conclusion, Element, Outline, Outlines, Thread, Trajectory, parse, render
from tw_core.stats import ParallelStats, parallel_stats
from tw_core.tags import TAGS, TagIds
from tw_core.units import Unit, extract_units

__all__ = [
    "TAGS",
    "Block",
    "BudgetError",
    "Conclusion",
    "Element",
    "GrammarError",
    "Outline",
    "Outlines",
    "ParallelStats",
    "ShapeError",
    "TagIds",
    "Thread",
    "ThreadWeaverError",
    "Trajectory",
    "TrieError",
    "Unit",
    "extract_units",
    "parallel_stats",
    "parse",
    "render",
]
