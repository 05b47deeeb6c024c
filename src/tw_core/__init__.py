"""Reasoning trees: text, trajectories, units, tries, packed rows (torch and numpy alone)."""

from tw_core.check import FormatReport, Problem, check_format, check_ids
from tw_core.encode import encode_units
from tw_core.errors import BudgetError, GrammarError, ShapeError, ThreadWeaverError, TrieError
from tw_core.grammar import Block, Conclusion, Element, Outline, Outlines, Thread, Trajectory, parse, render
from tw_core.packing import PackedTrie, pack_forest
from tw_core.stats import ParallelStats, parallel_stats
from tw_core.tags import TAGS, TagIds
from tw_core.trie import ReasoningTrie
from tw_core.units import Unit, extract_units, fork_numbers

__all__ = [
    "TAGS",
    "Block",
    "BudgetError",
    "Conclusion",
    "Element",
    "FormatReport",
    "GrammarError",
    "Outline",
    "Outlines",
    "PackedTrie",
    "ParallelStats",
    "Problem",
    "ReasoningTrie",
    "ShapeError",
    "TagIds",
    "Thread",
    "ThreadWeaverError",
    "Trajectory",
    "TrieError",
    "Unit",
    "check_format",
    "check_ids",
    "encode_units",
    "extract_units",
    "fork_numbers",
    "pack_forest",
    "parallel_stats",
    "parse",
    "render",
]
