"""`ReasoningTrie`: the prefix tree of token sequences (SPEC section 3).

Built as a radix tree whose edges are slices of the given arrays: a sequence walks down by comparing whole slices, so
the Python work is per edge, never per token. Sequences are merged in first-seen order, children keep insertion order,
and flattening in depth-first preorder gives the rows. The given arrays are not kept: sequences are read back from rows.

What is trained is an edge: a row and its parent, with the number of sequences that train the token (its weight). The
first token of a sequence has no parent, so nothing predicts it and its mask value is ignored, as in any causal language
model.

Tests: tests/core/test_trie.py. Speed: benchmarks/bench_trie.py.
"""

from __future__ import annotations

from collections import deque
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
        loss_masks: Which tokens are trained, sequence after sequence; never a first token. Shape (E,), bool.
        origin: Numbers of these sequences in the trie that was split, 0..S-1 where none was. Shape (S,), int64.
    """

    __slots__ = (
        "_starts",
        "input_ids",
        "loss_masks",
        "origin",
        "parent",
        "position_ids",
        "sequence_ends",
        "subtree_end",
        "weights",
    )

    def __init__(self, sequences: list[np.ndarray], masks: list[_Mask], origin: np.ndarray | None = None) -> None:
        """Merges checked sequences; use the classmethods, which check."""
        self.origin: Int64[np.ndarray, " S"] = np.arange(len(sequences)) if origin is None else origin
        roots: dict[int, _Edge] = {}
        for sequence in sequences:
            _insert(roots, sequence)
        self._flatten(roots)
        self._count(roots, sequences, masks)

    @classmethod
    def from_sequences(cls, sequences: Iterable[Any], loss_masks: Iterable[Any] | None = None) -> ReasoningTrie:
        """The trie of any token sequences: a GRPO group, an agent's branching episodes, units.

        Args:
            sequences: Sequences of token ids (list, numpy or torch on the CPU). Shape (L_i,) each, L_i >= 1. Duplicates
                and prefixes of one another are welcome: each keeps its number and adds its weight.
            loss_masks: One mask a sequence, aligned with it: True (or 1) where the token is trained. Shape (L_i,) each.
                None trains all but the first token.

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
                f"loss_masks must have one mask a sequence, {len(rows)}, got {len(masks)}; pass None to train all"
            )
        return cls(rows, [_as_mask(mask, row.size, i) for i, (mask, row) in enumerate(zip(masks, rows, strict=True))])

    @classmethod
    def from_units(cls, units: Iterable[Unit | tuple[Any, Any]]) -> ReasoningTrie:
        """The trie of engine calls, with loss on the completions only.

        Args:
            units: `Unit`s or (context, completion) pairs of token ids. With an empty context the completion's first
                token has no parent and is not trained. An empty completion is context alone.

        Raises:
            TrieError: No unit, one that is not a pair, or one without any token.
        """
        sequences, masks = [], []
        for i, unit in enumerate(units):
            pair = tuple(unit) if isinstance(unit, Iterable) else (unit,)
            if len(pair) != 2:
                raise TrieError(
                    f"units[{i}] must be a pair (context, completion), got {len(pair)} parts; join them first"
                )
            seen, written = as_ids(pair[0], f"units[{i}].context"), as_ids(pair[1], f"units[{i}].completion")
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
        """Tokens E of the sequences one by one."""
        return int(self.loss_masks.size)

    @property
    def num_sequences(self) -> int:
        """Sequences S, duplicates included."""
        return int(self.sequence_ends.size)

    @property
    def sequence_lengths(self) -> Int64[np.ndarray, " S"]:
        """Tokens of each sequence. Shape (S,)."""
        lengths: Int64[np.ndarray, " S"] = self.position_ids[self.sequence_ends] + 1
        return lengths

    @property
    def sharing_ratio(self) -> float:
        """r = expanded tokens / trie tokens, at least 1."""
        return self.num_expanded_tokens / self.num_tokens

    def __repr__(self) -> str:
        sizes = f"num_tokens={self.num_tokens}, num_sequences={self.num_sequences}"
        return f"ReasoningTrie({sizes}, sharing_ratio={self.sharing_ratio:.2f})"

    def pack(self) -> PackedTrie:
        """The trie as one packed row of tensors, which share this trie's memory."""
        from tw_core.packing import PackedTrie

        return PackedTrie.from_trie(self)

    def sequence_rows(self, i: int) -> Int64[np.ndarray, " L"]:
        """Rows of sequence `i` in order: the path from its root to its last token. Shape (L_i,)."""
        row, runs = int(self.sequence_ends[i]), []
        while row >= 0:
            first = int(self._starts[self._starts.searchsorted(row, side="right") - 1])
            runs.append(np.arange(first, row + 1))
            row = int(self.parent[first])
        return np.concatenate(runs[::-1])

    def sequence(self, i: int) -> Int64[np.ndarray, " L"]:
        """Token ids of sequence `i`. Shape (L_i,)."""
        ids: Int64[np.ndarray, " L"] = self.input_ids[self.sequence_rows(i)]
        return ids

    def loss_mask(self, i: int) -> Bool[np.ndarray, " L"]:
        """Which tokens of sequence `i` are trained. Shape (L_i,); the first is always False."""
        lengths = self.sequence_lengths
        start = int(lengths[:i].sum())
        return self.loss_masks[start : start + int(lengths[i])]

    def split(self, max_tokens: int) -> list[ReasoningTrie]:
        """Cuts the trie by sequences into tries of at most `max_tokens` rows with the same summed loss.

        The sequences are cut into runs in preorder, so that neighbours in the tree stay together; of all such cuts this
        is one with the fewest rows in total (a cut repeats the rows that the sequences on its two sides share), and of
        these one with the fewest parts. Together the parts hold every sequence once (`origin` says which, ascending in
        each part), so their edges, counted with weights, are those of this trie.

        Raises:
            BudgetError: A single sequence is longer than `max_tokens`.
        """
        if self.num_tokens <= max_tokens:
            return [self]
        lengths = self.sequence_lengths
        longest = int(lengths.argmax())
        if lengths[longest] > max_tokens:
            raise BudgetError(
                f"sequence {longest} has {lengths[longest]} tokens, more than max_tokens={max_tokens}; "
                "raise max_tokens or drop the sequence"
            )
        order = self.sequence_ends.argsort(kind="stable")
        shared = _shared_rows(self.position_ids, self.sequence_ends[order])
        starts = np.cumsum(lengths) - lengths
        parts = []
        for low, high in _cheapest_cuts(lengths[order].tolist(), shared.tolist(), max_tokens):
            group = sorted(order[low:high].tolist())
            masks: list[_Mask] = [self.loss_masks[starts[i] : starts[i] + lengths[i]] for i in group]
            parts.append(ReasoningTrie([self.sequence(i) for i in group], masks, self.origin[group]))
        return parts

    def _flatten(self, roots: dict[int, _Edge]) -> None:
        """Lays the edges out in preorder and fills input_ids, position_ids, parent, subtree_end."""
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
        self._starts: Int64[np.ndarray, " B"] = first
        self.input_ids: Int64[np.ndarray, " N"] = np.concatenate([edge.tokens for edge in edges])
        self.position_ids: Int64[np.ndarray, " N"] = np.arange(rows) + np.repeat(np.array(depths) - first, lengths)
        self.parent: Int32[np.ndarray, " N"] = np.arange(-1, rows - 1, dtype=np.int32)
        self.parent[first] = above
        self.subtree_end: Int32[np.ndarray, " N"] = np.repeat(end.astype(np.int32), lengths)

    def _count(self, roots: dict[int, _Edge], sequences: list[np.ndarray], masks: list[_Mask]) -> None:
        """Walks each sequence once more over whole edges: its last row, its mask, and +1 on the rows that it trains."""
        self.weights: Int64[np.ndarray, " N"] = np.zeros(self.num_tokens, dtype=np.int64)
        self.loss_masks: Bool[np.ndarray, " E"] = np.zeros(sum(sequence.size for sequence in sequences), dtype=bool)
        ends, start = [], 0
        for sequence, mask in zip(sequences, masks, strict=True):
            trained = self.loss_masks[start : start + sequence.size]
            start += sequence.size
            if isinstance(mask, tuple):
                low, high = max(mask[0], 1), mask[1]
                trained[low:high] = True
            else:
                low, high = 1, sequence.size
                trained[1:] = mask[1:]
            children, at = roots, 0
            while True:
                edge = children[int(sequence[at])]
                size = min(edge.tokens.size, sequence.size - at)
                here, stop = max(low - at, 0), min(high - at, size)
                if here < stop:
                    row = edge.first_row
                    self.weights[row + here : row + stop] += trained[at + here : at + stop]
                at += size
                if at == sequence.size:
                    break
                children = edge.children
            ends.append(edge.first_row + size - 1)
        self.sequence_ends: Int32[np.ndarray, " S"] = np.array(ends, dtype=np.int32)


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


def _shared_rows(depth: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Rows that each sequence shares with the one before it; `ends`, their last rows, ascend. 0 for the first. (S,)."""
    if ends.size == 1:
        return np.zeros(1, dtype=np.int64)
    # The shallowest row after one end, up to the next, hangs below the last row that both have.
    shallowest = np.minimum.reduceat(depth[: ends[-1] + 1], np.minimum(ends[:-1] + 1, ends[-1]))
    return np.concatenate([[0], np.where(ends[1:] > ends[:-1], shallowest, depth[ends[:-1]] + 1)])


def _cheapest_cuts(lengths: list[int], shared: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cuts sequences 0..S-1 into runs of at most `max_tokens` rows, with the fewest rows, then parts, in total.

    A run low..high-1 has shared[low] + (new rows of each) rows, so cutting before `low` costs shared[low]. Feasible
    `low` only move right: the minimum over a sliding window, kept as a queue that ascends.
    """
    total = 0  # new rows up to here
    before = [(0, 0)]  # cost of the best cuts of the sequences before each: (repeated rows, parts)
    chosen: list[int] = []
    window: deque[tuple[tuple[int, int], int, int]] = deque()  # (cost of a last run from here on, low, rows left of it)
    for at, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        cost = (before[at][0] + common, before[at][1] + 1)
        while window and window[-1][0] >= cost:
            window.pop()
        window.append((cost, at, total - common))
        total += length - common
        while total - window[0][2] > max_tokens:
            window.popleft()
        before.append(window[0][0])
        chosen.append(window[0][1])
    runs, high = [], len(lengths)
    while high:
        runs.append((chosen[high - 1], high))
        high = chosen[high - 1]
    return runs[::-1]


def _as_mask(mask: Any, length: int, i: int) -> np.ndarray:
    array = np.asarray(mask)
    if array.shape != (length,):
        raise ShapeError(
            f"loss_masks[{i}] must have shape (L,)=({length},) to match sequences[{i}], got {array.shape}; "
            "give one entry a token"
        )
    if array.dtype != bool:
        if not np.isin(array, (0, 1)).all():
            raise TrieError(f"loss_masks[{i}] must hold 0 and 1 (or bools), got other values; pass a mask, not weights")
        array = array.astype(bool)
    return array
