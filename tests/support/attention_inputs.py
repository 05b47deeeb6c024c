"""Packed tries for attention: shapes for tests, the tries of the benchmark tables, and random queries, keys and values.

A trie is described by its segments (`Node`: rows without a fork between them), so that 60,000 rows are built by a few
numpy calls; `expanded` says what the same trie costs sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Node:
    """A run of rows and what hangs below its last row; `ends` says that a sequence stops there."""

    length: int
    children: list[Node] = field(default_factory=list)
    ends: bool = False


@dataclass(frozen=True)
class TrieShape:
    """A packed trie without tokens.

    Attributes:
        name: For test ids and records.
        subtree_end: (N,) int32.
        depth: (N,) int64, the position ids.
        last_rows: (S,) int64, the last row of each sequence.
    """

    name: str
    subtree_end: Tensor
    depth: Tensor
    last_rows: Tensor

    def __str__(self) -> str:
        return self.name

    @property
    def num_rows(self) -> int:
        return len(self.depth)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs of the trie."""
        return int((self.depth + 1).sum())

    @property
    def visible_share(self) -> float:
        """Visible pairs over those of a causal mask."""
        return self.visible_pairs / (self.num_rows * (self.num_rows + 1) / 2)

    @property
    def expanded_lengths(self) -> Tensor:
        """(S,) length of each sequence."""
        return self.depth[self.last_rows] + 1

    @property
    def expanded_pairs(self) -> int:
        """(query, key) pairs of the sequences run one by one."""
        return int((self.expanded_lengths * (self.expanded_lengths + 1) // 2).sum())

    @property
    def sharing_ratio(self) -> float:
        """Expanded tokens over rows."""
        return int(self.expanded_lengths.sum()) / self.num_rows

    @property
    def pair_ratio(self) -> float:
        """Expanded pairs over visible pairs: the ratio of attention FLOPs."""
        return self.expanded_pairs / self.visible_pairs

    def sequence_rows(self, i: int) -> Tensor:
        """(L,) rows of sequence i in order: the last row and its ancestors."""
        last = int(self.last_rows[i])
        return torch.nonzero(self.subtree_end[: last + 1] > last)[:, 0]


def build(name: str, roots: Iterable[Node]) -> TrieShape:
    """Flatten a forest in preorder; children keep their order. Leaves always end a sequence."""
    lengths: list[int] = []
    levels: list[int] = []  # depth of each segment's first row
    last_of_subtree: list[int] = []  # index of the last segment below each segment
    ends: list[bool] = []
    for root in roots:
        stack: list[tuple[Node | int, int]] = [(root, 0)]
        while stack:
            node, level = stack.pop()
            if isinstance(node, int):  # all below segment `node` is written
                last_of_subtree[node] = len(lengths) - 1
                continue
            index = len(lengths)
            lengths.append(node.length)
            levels.append(level)
            last_of_subtree.append(index)
            ends.append(node.ends or not node.children)
            stack.append((index, 0))
            stack += [(child, level + node.length) for child in reversed(node.children)]
    counts = np.array(lengths, dtype=np.int64)
    stops = np.cumsum(counts)
    starts = stops - counts
    row = np.arange(int(counts.sum()))
    depth = row - np.repeat(starts - np.array(levels, dtype=np.int64), counts)
    subtree_end = np.repeat(stops[np.array(last_of_subtree, dtype=np.int64)], counts) if lengths else row
    return TrieShape(
        name=name,
        subtree_end=torch.from_numpy(subtree_end.astype(np.int32)),
        depth=torch.from_numpy(depth.astype(np.int64)),
        last_rows=torch.from_numpy(stops[np.array(ends, dtype=bool)] - 1) if lengths else torch.zeros(0).long(),
    )


# ---------------------------------------------------------------------------------------------- shapes for tests


def chain(length: int) -> TrieShape:
    """One sequence: plain causal attention."""
    return build(f"chain{length}", [Node(length)])


def empty() -> TrieShape:
    """No row at all."""
    return build("empty", [])


def star(prefix: int, branches: Sequence[int]) -> TrieShape:
    """A prompt and its answers: a GRPO group."""
    return build(f"star{prefix}x{len(branches)}", [Node(prefix, [Node(length) for length in branches])])


def comb(teeth: int, spine: int, tooth: int) -> TrieShape:
    """A spine that drops a branch after every `spine` rows: as deep as a trie of so many forks gets."""
    node = Node(spine)
    for _ in range(teeth):
        node = Node(spine, [node, Node(tooth)])
    return build(f"comb{teeth}", [node])


def trajectory(texts: Sequence[int], blocks: Sequence[Sequence[int]], below: Node | None = None) -> Node:
    """The units of one fork/join trajectory: joined path first, threads 2..n as branches.

    Args:
        texts: Rows of sequential text before each block and after the last; one more than `blocks`.
        blocks: Rows of each thread of each block.
        below: Children of the last text, for nesting.
    """
    node = below or Node(texts[-1], ends=True)
    for text, threads in zip(reversed(texts[:-1]), reversed(blocks), strict=True):
        joined = Node(sum(threads[1:]), [node]) if sum(threads[1:]) else node
        first = Node(threads[0], [joined], ends=True)
        node = Node(text, [first, *(Node(length) for length in threads[1:])], ends=True)
    return node


def fork_at(row: int, tail: int = 3) -> TrieShape:
    """A fork whose branches start right after row `row - 1`: three branches, of which the middle one forks again."""
    inner = Node(2, [Node(tail), Node(1)])
    return build(f"fork_at_{row}", [Node(row, [Node(tail), inner, Node(tail + 2)])])


def every_offset(tile: int = 128) -> TrieShape:
    """A fork after each of the first `tile` rows; the branches, of three rows, start at every offset of a tile."""
    return comb(tile, 1, 3)


def random_forest(seed: int, rows: int, *, max_children: int = 3, mean_length: float = 6.0) -> TrieShape:
    """A random nested forest of about `rows` rows: random segments, random numbers of children, several roots."""
    rng = np.random.default_rng(seed)
    left = rows

    def grow(level: int) -> Node:
        nonlocal left
        length = int(1 + rng.poisson(mean_length - 1))
        left -= length
        node = Node(length, ends=bool(rng.random() < 0.3))
        while left > 0 and len(node.children) < max_children and rng.random() < (0.9 if level < 12 else 0.2):
            node.children.append(grow(level + 1))
        return node

    roots = []
    while left > 0:
        roots.append(grow(0))
    return build(f"random{seed}", roots)


def small_tries() -> list[TrieShape]:
    """Every kind of trie at sizes off the tile grid, small enough for an interpreter."""
    nested = trajectory([3, 4], [[20, 31]])
    return [
        build("one_row", [Node(1)]),
        build("three_rows_apart", [Node(1), Node(1), Node(1)]),
        chain(77),
        star(37, [20, 1, 33, 12]),
        comb(9, 5, 7),
        build("fork_join", [trajectory([9, 6, 5, 8], [[14, 11], [7, 12, 9], [5, 6]])]),
        build("nested", [trajectory([11, 7], [[15, 9, 13]], below=nested)]),
        build("group", [Node(21, [trajectory([4, 3, 6], [[9, 5], [8, 8, 3]]), trajectory([7, 9], [[11, 6, 4]])])]),
        build("forest", [Node(13), Node(5, [Node(9), Node(2)]), Node(1), Node(30, [Node(1), Node(1)]), Node(17)]),
        random_forest(0, 150),
    ]


# ------------------------------------------------------------------------------- the tries of the benchmark tables


def chain_16k() -> TrieShape:
    """16,384 rows, plain causal."""
    return build("chain_16k", [Node(16_384)])


def _sft(scale: int = 1) -> Node:
    texts = [254 + 822, 346, 603, 947, 769]
    blocks = [[796, 2201], [2286, 2268], [1709, 1340, 1314, 1123], [1704, 1331, 1444]]
    return trajectory([t // scale for t in texts], [[t // scale for t in threads] for threads in blocks])


def sft_32k() -> TrieShape:
    """One trajectory, 4 blocks of 2 to 4 threads, 32,278 rows; lengths fitted to share 63 %, r 5.19 and 3.54."""
    return build("sft_32k", [_sft()])


def grpo_linear_33k() -> TrieShape:
    """8 completions of about 4k rows after a prompt of 2k, 33,304 rows; share 24 %, r 1.43 and 1.11."""
    completions = [3355, 4649, 4413, 4238, 4575, 4600, 4560, 866]
    return build("grpo_linear_33k", [Node(2048, [Node(length) for length in completions])])


def grpo_forkjoin_59k() -> TrieShape:
    """4 fork/join rollouts of one prompt, 59,366 rows; lengths fitted to share 18 %, r 2.93 and 1.95."""
    rollouts = [
        trajectory([298, 164], [[899, 1718, 1789, 1701]]),
        trajectory([206, 317, 272, 247], [[1279, 847, 754], [1733, 1539], [1309, 2036, 1941, 1104]]),
        trajectory([289, 212], [[1492, 859, 2028, 1363]]),
        trajectory([156, 265, 183], [[1769, 918], [1167, 1442, 790, 816, 1361]]),
    ]
    return build("grpo_forkjoin_59k", [Node(1097, rollouts)])


def chain_8k() -> TrieShape:
    """8,192 rows, plain causal."""
    return build("chain_8k", [Node(8192)])


def chain_128k() -> TrieShape:
    """131,072 rows, plain causal."""
    return build("chain_128k", [Node(131_072)])


def sft_64k() -> TrieShape:
    """Two trajectories like that of sft_32k side by side, 64,556 rows."""
    return build("sft_64k", [_sft(), _sft()])


def sft_3k() -> TrieShape:
    """The trajectory of sft_32k at a tenth of its lengths: a trie under 4k rows."""
    return build("sft_3k", [_sft(scale=10)])


def sft_800() -> TrieShape:
    """The trajectory of sft_32k at a fortieth of its lengths."""
    return build("sft_800", [_sft(scale=40)])


def short_64x1k() -> TrieShape:
    """A batch of 64 tries of 1,024 rows: a prompt of 256 and four completions of 192."""
    return build("short_64x1k", [Node(256, [Node(192) for _ in range(4)]) for _ in range(64)])


def tiny() -> TrieShape:
    """The shape of sft_32k at 300 rows, for the benchmark's own test."""
    return build("tiny", [_sft(scale=100)])
