"""`ReasoningTrie`: the prefix tree of token sequences (SPEC section 3).

Built as a radix tree whose edges are slices of the given arrays: a sequence walks down by comparing whole slices, so the Python
work is per edge, never per token. Sequences are merged in first-seen order, children keep insertion order, and flattening in
depth-first preorder gives the rows.

What is trained is an edge: a row and its parent, with the number of sequences that train the token (its weight). The
first token of a sequence has no parent, so nothing predicts it and its mask value is ignored, as in any causal language model.

Tests: tests/core/test_trie.py. Speed: benchmarks/bench_trie.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from tw_core._ids import as_ids
from tw_core._shapes import Bool, Int32, Int64
from tw_core.errors import BudgetError, ShapeError, TrieError

if TYPE_CHECKING:
    from tw_core.packing import PackedTrie
    from tw_core.units import Unit

# A loss mask: the trained offsets lo..hi-1, or one bool a token.
_Mask = tuple[int, int] | np.ndarray


class _Edge:
    """A run of tokens without a branch; its children by first token, in insertion order."""

    __slots__ = ("children", "first_row", "tokens")

    def __init__(self, tokens: np.ndarray, children: dict[int, _Edge]):
        self.tokens = tokens
        self.children = children
        self.first_row = -1


class ReasoningTrie:
    """The prefix tree of token sequences, in preorder, with who trains what.

    Build it with `from_sequences`, `from_units` or `from_text`.

    Attributes:
        input_ids: Token of each row. Shape (N,), int64.
        position_ids: Depth of each row, 0 at the root. Shape (N,), int64.
        parent: Row of the parent, -1 at a root. Shape (N,), int32.
        subtree_end: One past the last row of the row's subtree. Shape (N,), int32.
        weights: How many of the sequences train the row's token. Shape (N,), int64.
        sequence_ends: Row of each sequence's last token. Shape (S,), int32.
        origin: Which sequences of the trie it was split from these are; 0..S-1 where it was not split. Shape (S,), int64.
    """

    __slots__ = (
        "_masks",
        "_roots",
        "_sequences",
        "input_ids",
        "origin",
        "parent",
        "position_ids",
        "sequence_ends",
        "subtree_end",
        "weights",
    )

    def __init__(self, sequences: list[np.ndarray], masks: list[_Mask], origin: np.ndarray | None = None) -> None:
        """Merges checked sequences; use the classmethods, which check."""
        self._sequences, self._masks = sequences, masks
        self.origin: Int64[np.ndarray, " S"] = np.arange(len(sequences)) if origin is None else origin
        roots: dict[int, _Edge] = {}
        for sequence in sequences:
            _insert(roots, sequence)
        self._flatten(roots)
        self._count()

    @classmethod
    def from_sequences(cls, sequences: Iterable[Any], loss_masks: Iterable[Any] | None = None) -> ReasoningTrie:
        """The trie of any token sequences: a GRPO group, an agent's branching episodes, units.

        Args:
            sequences: Sequences of token ids (list, numpy or torch). Shape (L_i,) each, L_i >= 1. Duplicates and prefixes of one
                another are welcome: each keeps its number and adds its weight.
            loss_masks: One mask a sequence, aligned with it: True (or 1) where the token is trained. Shape (L_i,) each. None trains
                all but the first token.
        Raises:
            TrieError: No sequence, an empty one, or ids that are not non-negative integers.
            ShapeError: A mask does not have its sequence's length, or there are not as many masks as sequences.
        """
        rows = [as_ids(sequence, f"sequences[{i}]") for i, sequence in enumerate(sequences)]
        if not rows:
            raise TrieError("sequences is empty; pass at least one sequence of token ids")
        for i, row in enumerate(rows):
            if row.size == 0:
                raise TrieError(f"sequences[{i}] is empty; drop it before building the trie")
        if loss_masks is None:
            return cls(rows, [(1, row.size) for row in rows])
        masks = list(loss_masks)
        if len(masks) != len(rows):
            raise ShapeError(
                f"loss_masks must have one mask a sequence, got {len(masks)} for {len(rows)}; add the missing ones"
            )
        return cls(rows, [_as_mask(mask, row.size, i) for i, (mask, row) in enumerate(zip(masks, rows, strict=True))])

    @classmethod
    def from_units(cls, units: Iterable[Unit | tuple[Any, Any]]) -> ReasoningTrie:
        """The trie of engine calls, with loss on the completions only.

        Args:
            units: `Unit`s or (context, completion) pairs of token ids. With an empty context the completion's first token has no
                parent and is not trained. An empty completion is context alone.
        Raises:
            TrieError: No unit, or one without any token.
        """
        sequences, masks = [], []
        for i, (context, completion) in enumerate(units):
            seen, written = as_ids(context, f"units[{i}].context"), as_ids(completion, f"units[{i}].completion")
            sequences.append(np.concatenate([seen, written]))
            if sequences[-1].size == 0:
                raise TrieError(f"units[{i}] is empty; drop it before building the trie")
            masks.append((seen.size, seen.size + written.size))
        if not sequences:
            raise TrieError("units is empty; pass at least one unit")
        return cls(sequences, list(masks))

    @classmethod
    def from_text(cls, text: str, tokenizer: Any, prompt: str = "") -> ReasoningTrie:
        """The trie of one fork/join trajectory, from its text.

        Args:
            text: The response: reasoning with zero or more blocks, and the answer.
            tokenizer: A transformers tokenizer that has each tag as one token.
            prompt: What stands before the response; tags inside it are plain text, and it carries no loss.
        Raises:
            GrammarError: The text is not well-formed, or a tag is not one token.
        """
        from tw_core.encode import encode_units

        return cls.from_units(encode_units(text, tokenizer, prompt))

    @property
    def num_tokens(self) -> int:
        """Rows N: each shared token counts once."""
        return int(self.input_ids.size)

    @property
    def num_expanded_tokens(self) -> int:
        """Tokens of the sequences one by one."""
        return sum(sequence.size for sequence in self._sequences)

    @property
    def num_sequences(self) -> int:
        """Sequences S, duplicates included."""
        return len(self._sequences)

    @property
    def sharing_ratio(self) -> float:
        """r = expanded tokens / trie tokens, at least 1."""
        return self.num_expanded_tokens / self.num_tokens

    def __repr__(self) -> str:
        return f"ReasoningTrie(num_tokens={self.num_tokens}, num_sequences={self.num_sequences}, sharing_ratio={self.sharing_ratio:.2f})"

    def pack(self) -> PackedTrie:
        """The trie as one packed row of tensors."""
        from tw_core.packing import PackedTrie

        return PackedTrie.from_trie(self)

    def sequence(self, i: int) -> Int64[np.ndarray, " L"]:
        """Token ids of sequence `i`. Shape (L_i,)."""
        return self._sequences[i]

    def loss_mask(self, i: int) -> Bool[np.ndarray, " L"]:
        """Which tokens of sequence `i` are trained. Shape (L_i,); the first is always False."""
        mask, length = self._masks[i], self._sequences[i].size
        if isinstance(mask, tuple):
            offsets = np.arange(length)
            mask = (offsets >= mask[0]) & (offsets < mask[1])
        else:
            mask = mask.copy()
        mask[0] = False
        return mask

    def split(self, max_tokens: int) -> list[ReasoningTrie]:
        """Cuts the trie by sequences into tries of at most `max_tokens` rows with the same summed loss.

        Sequences that are neighbours in the tree stay together, so that little of the shared prefix is repeated: groups are filled
        greedily in preorder. Together the parts hold every sequence once (`origin` says which), so their edges, counted with
        weights, are those of this trie.

        Raises:
            BudgetError: A single sequence is longer than `max_tokens`.
        """
        if self.num_tokens <= max_tokens:
            return [self]
        lengths = [sequence.size for sequence in self._sequences]
        longest = int(np.argmax(lengths))
        if lengths[longest] > max_tokens:
            raise BudgetError(
                f"sequence {longest} has {lengths[longest]} tokens, more than max_tokens={max_tokens}; "
                "raise max_tokens or drop the sequence"
            )
        order = np.argsort(self.sequence_ends, kind="stable")
        groups: list[list[int]] = []
        size = 0
        for place, i in enumerate(order.tolist()):
            shared = 0
            if place:
                last, end = int(self.sequence_ends[order[place - 1]]), int(self.sequence_ends[i])
                shared = int(np.count_nonzero(self.subtree_end[: last + 1] > end))  # rows of the common path
            if not groups or size + lengths[i] - shared > max_tokens:
                groups.append([])
                size = shared = 0
            groups[-1].append(i)
            size += lengths[i] - shared
        return [
            ReasoningTrie([self._sequences[i] for i in group], [self._masks[i] for i in group], self.origin[group])
            for group in map(sorted, groups)
        ]

    def _flatten(self, roots: dict[int, _Edge]) -> None:
        """Lays the edges out in preorder and fills input_ids, position_ids, parent, subtree_end, sequence_ends."""
        edges: list[_Edge] = []
        above: list[int] = []  # last row of the parent edge
        depths: list[int] = []
        stack = [(edge, -1, 0) for edge in reversed(roots.values())]
        rows = 0
        while stack:
            edge, parent_row, depth = stack.pop()
            edges.append(edge)
            above.append(parent_row)
            depths.append(depth)
            edge.first_row = rows
            rows += edge.tokens.size
            depth += edge.tokens.size
            stack.extend((child, rows - 1, depth) for child in reversed(edge.children.values()))
        lengths = np.array([edge.tokens.size for edge in edges])
        first = np.cumsum(lengths) - lengths
        # An edge's subtree ends where the next edge that is not deeper begins.
        end = np.full(len(edges), rows)
        waiting: list[int] = []
        for at, depth in enumerate(depths):
            while waiting and depths[waiting[-1]] >= depth:
                end[waiting.pop()] = first[at]
            waiting.append(at)
        self.input_ids: Int64[np.ndarray, " N"] = np.concatenate([edge.tokens for edge in edges])
        self.position_ids: Int64[np.ndarray, " N"] = np.arange(rows) + np.repeat(np.array(depths) - first, lengths)
        self.parent: Int32[np.ndarray, " N"] = np.arange(-1, rows - 1, dtype=np.int32)
        self.parent[first] = above
        self.subtree_end: Int32[np.ndarray, " N"] = np.repeat(end.astype(np.int32), lengths)
        self._roots = roots

    def _count(self) -> None:
        """Walks each sequence once more over whole edges: its last row, and +1 on the rows that it trains."""
        self.weights: Int64[np.ndarray, " N"] = np.zeros(self.num_tokens, dtype=np.int64)
        ends = []
        for sequence, mask in zip(self._sequences, self._masks, strict=True):
            children, at = self._roots, 0
            while True:
                edge = children[int(sequence[at])]
                size = min(edge.tokens.size, sequence.size - at)
                row = edge.first_row
                if isinstance(mask, tuple):
                    if mask[0] < at + size and mask[1] > at:
                        self.weights[row + max(mask[0] - at, 0) : row + min(mask[1] - at, size)] += 1
                else:
                    self.weights[row : row + size] += mask[at : at + size]
                at += size
                if at == sequence.size:
                    break
                children = edge.children
            ends.append(row + size - 1)
        self.weights[self.parent < 0] = 0
        self.sequence_ends: Int32[np.ndarray, " S"] = np.array(ends, dtype=np.int32)
        del self._roots


def _insert(children: dict[int, _Edge], sequence: np.ndarray) -> None:
    """Adds one sequence below `children`, splitting at most one edge."""
    at, length = 0, sequence.size
    while at < length:
        token = int(sequence[at])
        edge = children.get(token)
        if edge is None:
            children[token] = _Edge(sequence[at:], {})
            return
        size = min(edge.tokens.size, length - at)
        differs = edge.tokens[:size] != sequence[at : at + size]
        cut = int(differs.argmax())
        if differs[cut]:
            edge.children = {int(edge.tokens[cut]): _Edge(edge.tokens[cut:], edge.children)}
            edge.tokens = edge.tokens[:cut]
            size = cut
        at += size
        children = edge.children


def _as_mask(mask: Any, length: int, i: int) -> np.ndarray:
    array = np.asarray(mask)
    if array.shape != (length,):
        raise ShapeError(f"loss_masks[{i}] must have shape (L,)=({length},) to match sequences[{i}], got {array.shape}")
    if array.dtype != bool:
        if not np.isin(array, (0, 1)).all():
            raise TrieError(f"loss_masks[{i}] must hold 0 and 1 (or bools), got other values; pass a mask, not weights")
        array = array.astype(bool)
    return array
