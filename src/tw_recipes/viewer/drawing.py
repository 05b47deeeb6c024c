r"""A trie as plain characters: one line a segment, in preorder, as far right as it is deep.

    rows 0..5     ......
    rows 6..6          +#
    rows 7..8           +##
    rows 9..9           +#
    rows 10..11        +##

A segment is a run of rows without a branch. "#" is trained, "." is context, "+" starts a branch beside others.
Guarded by tests/recipes/viewer/test_drawing.py.
"""

from typing import NamedTuple

import numpy as np

from tw_core import ReasoningTrie


class Segment(NamedTuple):
    """A run of rows without a branch.

    Attributes:
        first: Its first row.
        past: One past its last row.
        depth: Depth of its first row.
        trained: Its rows that are trained.
        ends: Sequences that end in it.
        branch: Whether it starts beside others: its parent row (or the head of the trie) has several children.
    """

    first: int
    past: int
    depth: int
    trained: int
    ends: int
    branch: bool


def segments(trie: ReasoningTrie) -> list[Segment]:
    """The segments of a trie, in preorder."""
    parent = trie.parent.astype(np.int64)
    children = np.bincount(parent + 1, minlength=trie.num_tokens + 1)  # of "no parent", then of each row
    branch = children[parent + 1] > 1
    starts = np.flatnonzero(branch | (parent != np.arange(-1, trie.num_tokens - 1)))
    if not len(starts) or starts[0]:
        starts = np.concatenate([[0], starts])
    trained = np.add.reduceat((trie.weights > 0).astype(np.int64), starts)
    place = starts.searchsorted(trie.sequence_ends, side="right") - 1
    ends = np.bincount(place, minlength=len(starts))
    past = np.append(starts[1:], trie.num_tokens)
    columns = (starts, past, trie.position_ids[starts], trained, ends, branch[starts])
    return [Segment(*(column.item() for column in row)) for row in zip(*columns, strict=True)]


def draw_trie(trie: ReasoningTrie, *, width: int = 100, max_lines: int = 60) -> str:
    """The drawing, at most `width` characters wide; segments past `max_lines` are counted in the last line.

    Raises:
        ValueError: `width` leaves no room for the bars.
    """
    found = segments(trie)
    labels = [f"rows {s.first}..{s.past - 1}" for s in found]
    margin = max(map(len, labels[:max_lines])) + 2
    if width < margin + 20:
        raise ValueError(f"width must be at least {margin + 20} for this trie, got {width}; widen the terminal")
    per_column = max(1.0, (int(trie.position_ids.max()) + 1) / (width - margin - 1))
    lines = []
    for segment, label in zip(found[:max_lines], labels, strict=False):
        left = int(segment.depth / per_column)
        right = max(left + 1, round((segment.depth + segment.past - segment.first) / per_column))
        rows = trie.weights[segment.first : segment.past] > 0
        cuts = np.minimum(np.arange(right - left) * len(rows) // (right - left), len(rows) - 1)
        bar = "".join("#" if some else "." for some in np.logical_or.reduceat(rows, cuts))
        lines.append(f"{label:<{margin}}{' ' * left}{'+' if segment.branch else ' '}{bar}".rstrip())
    if len(found) > max_lines:
        lines.append(f"and {len(found) - max_lines} more segments")
    return "\n".join(lines)
