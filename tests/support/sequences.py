"""Hypothesis strategies for sets of token sequences, and the trie written the slow way, as the oracle of the fast one.

`grow` inserts token by token into nested dicts and knows rows by the prefix they spell; nothing here uses tw_core.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np

Prefix = tuple[int, ...]


@st.composite
def sequence_sets(draw: st.DrawFn, most: int = 8, longest: int = 12) -> list[list[int]]:
    """Sequences over few tokens, often continuing an earlier one: branches, duplicates, prefixes, several roots."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, most))):
        own = draw(st.lists(st.integers(0, 2), max_size=5))
        if sequences and draw(st.booleans()):
            earlier = draw(st.sampled_from(sequences))
            own = earlier[: draw(st.integers(0, len(earlier)))] + own
        sequences.append(own[:longest] or [0])
    return sequences


@st.composite
def masked_sets(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    """Sequences and a loss mask for each."""
    sequences = draw(sequence_sets())
    masks = [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in sequences]
    return sequences, masks


@dataclass(frozen=True)
class SlowTrie:
    """Rows of a trie by the prefix they spell, in depth-first preorder."""

    prefixes: list[Prefix]

    @property
    def input_ids(self) -> list[int]:
        return [prefix[-1] for prefix in self.prefixes]

    @property
    def depth(self) -> list[int]:
        return [len(prefix) - 1 for prefix in self.prefixes]

    @property
    def parent(self) -> list[int]:
        row = {prefix: i for i, prefix in enumerate(self.prefixes)}
        return [row[prefix[:-1]] if len(prefix) > 1 else -1 for prefix in self.prefixes]

    @property
    def subtree_end(self) -> list[int]:
        return [1 + max(j for j, b in enumerate(self.prefixes) if b[: len(a)] == a) for a in self.prefixes]


def grow(sequences: list[list[int]]) -> SlowTrie:
    """The trie of some sequences: nested dicts keep the order in which children were first seen."""
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    rows: list[Prefix] = []

    def visit(node: dict[int, Any], prefix: Prefix) -> None:
        for token, below in node.items():
            rows.append((*prefix, token))
            visit(below, rows[-1])

    visit(root, ())
    return SlowTrie(rows)


def trained_edges(sequences: list[list[int]], masks: list[list[bool]] | None = None) -> Counter[tuple[Prefix, int]]:
    """(prefix, next token) of each trained token, as often as sequences train it; None trains all but the first."""
    masks = masks or [[True] * len(sequence) for sequence in sequences]
    return Counter(
        (tuple(sequence[:at]), sequence[at])
        for sequence, mask in zip(sequences, masks, strict=True)
        for at in range(1, len(sequence))
        if mask[at]
    )


def spelled_edges(packed: Any) -> Counter[tuple[Prefix, int]]:
    """(prefix, target) of each target of a PackedTrie, as often as its weight says, from dense visibility alone."""
    edges: Counter[tuple[Prefix, int]] = Counter()
    mask, ids = packed.dense_mask().numpy(), packed.input_ids.numpy()
    for row, target, weight in zip(
        packed.target_rows.tolist(), packed.target_ids.tolist(), packed.target_weights.tolist(), strict=True
    ):
        edges[tuple(ids[mask[row]].tolist()), target] += weight
    return edges


def lognormal_sizes(count: int, seed: int, largest: int) -> np.ndarray:
    """Sizes of many samples: lognormal with median 500, cut at `largest`."""
    return np.clip(np.random.default_rng(seed).lognormal(np.log(500), 0.8, count).astype(int), 1, largest)


def trajectory_units(
    rng: np.random.Generator, blocks: int, threads: int, prompt: np.ndarray, text: int, thread: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Units of one fork/join trajectory of random ids: `text` tokens before each block and at the end."""

    def tokens(count: int) -> np.ndarray:
        return rng.integers(100, 150_000, count)

    context, units = prompt, []
    for _ in range(blocks):
        opened = tokens(text)
        units.append((context, opened))
        context = joined = np.concatenate([context, opened])
        for number in range(threads):
            header, body = np.array([1, 2, 3, 4 + number]), tokens(thread)
            units.append((np.concatenate([context, header]), body))
            joined = np.concatenate([joined, header, body])
        context = np.append(joined, 1)
    units.append((context, tokens(text)))
    return units


def sft_24k(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """One SFT trajectory of 5 blocks x 4 threads: 26 units, about 24k rows."""
    rng = np.random.default_rng(seed)
    return trajectory_units(rng, 5, 4, rng.integers(100, 150_000, 200), text=180, thread=645)


def grpo_groups(trajectories: int, seed: int = 0) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """A GRPO batch: 8 fork/join rollouts a prompt, 7 units each, about 5k tokens a unit."""
    groups = []
    for group in range(trajectories // 8):
        rng = np.random.default_rng([seed, group])
        prompt = rng.integers(100, 150_000, 1_000)
        rollouts = [trajectory_units(rng, 1, 5, prompt, text=2_000, thread=1_000) for _ in range(8)]
        groups.append([unit for rollout in rollouts for unit in rollout])
    return groups
