"""`PackedTrie`: a trie, or a forest of tries, as one row of tensors; packing many tries into few rows.

The wire format between layers is what the fields say: plain integer tensors. Tests: tests/core/test_packing.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tw_core import masks
from tw_core._shapes import Bool, Int32, Int64
from tw_core.errors import BudgetError, TrieError

if TYPE_CHECKING:
    from tw_core.trie import ReasoningTrie


class TrainedTokens(NamedTuple):
    """Which (sequence, offset) is which target; T trained tokens, by sequence, then offset. T = sum(target_weights).

    With per-target log-probs `logps` (M,), `logps[targets]` are those of the sequences one by one, and gradients of
    shared tokens add up: what a loss needs that treats each sequence differently.

    Attributes:
        sequences: Number of the sequence. Shape (T,), int64.
        offsets: Offset of the token in it. Shape (T,), int64.
        targets: Index into target_rows, target_ids, target_weights. Shape (T,), int64.
    """

    sequences: Int64[Tensor, " T"]
    offsets: Int64[Tensor, " T"]
    targets: Int64[Tensor, " T"]


@dataclass(frozen=True, eq=False)
class PackedTrie:
    """One packed row: N tokens in preorder, M targets, S sequences.

    Attributes:
        input_ids: Token of each row. Shape (N,), int64.
        position_ids: Depth of each row, 0 at a root. Shape (N,), int64.
        parent: Row of the parent, -1 at a root. Shape (N,), int32.
        subtree_end: One past the last row of the row's subtree. Shape (N,), int32. Row i sees row j <=>
            j <= i < subtree_end[j].
        target_rows: Row whose hidden state predicts the target: its parent. Shape (M,), int64. A branch point stands
            here once a trained child.
        target_ids: Token to predict. Shape (M,), int64.
        target_weights: How many sequences train it. Shape (M,), int64, at least 1.
        target_children: Row that holds the target token itself; ascending, which orders the targets. Shape (M,), int64.
        sequence_ends: Row of each sequence's last token. Shape (S,), int32.
        loss_mask: Which tokens are trained, sequence after sequence; never a first token. Shape (E,), bool.
        num_padding: Rows at the end that `pad_to` added.
    """

    input_ids: Int64[Tensor, " N"]
    position_ids: Int64[Tensor, " N"]
    parent: Int32[Tensor, " N"]
    subtree_end: Int32[Tensor, " N"]
    target_rows: Int64[Tensor, " M"]
    target_ids: Int64[Tensor, " M"]
    target_weights: Int64[Tensor, " M"]
    target_children: Int64[Tensor, " M"]
    sequence_ends: Int32[Tensor, " S"]
    loss_mask: Bool[Tensor, " E"]
    num_padding: int = 0

    @classmethod
    def from_trie(cls, trie: ReasoningTrie) -> PackedTrie:
        """See `ReasoningTrie.pack`."""
        children = np.flatnonzero(trie.weights)
        return cls(
            input_ids=torch.from_numpy(trie.input_ids),
            position_ids=torch.from_numpy(trie.position_ids),
            parent=torch.from_numpy(trie.parent),
            subtree_end=torch.from_numpy(trie.subtree_end),
            target_rows=torch.from_numpy(trie.parent[children].astype(np.int64)),
            target_ids=torch.from_numpy(trie.input_ids[children]),
            target_weights=torch.from_numpy(trie.weights[children]),
            target_children=torch.from_numpy(children),
            sequence_ends=torch.from_numpy(trie.sequence_ends),
            loss_mask=torch.from_numpy(trie.loss_masks),
        )

    @property
    def num_rows(self) -> int:
        """N, padding included."""
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Rows without padding: each shared token counts once."""
        return self.num_rows - self.num_padding

    @property
    def num_expanded_tokens(self) -> int:
        """Tokens of the sequences one by one."""
        return self.loss_mask.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences S, duplicates included."""
        return self.sequence_ends.shape[0]

    @property
    def sharing_ratio(self) -> float:
        """r = expanded tokens / trie tokens."""
        return self.num_expanded_tokens / self.num_tokens

    @property
    def device(self) -> torch.device:
        """Where every tensor is."""
        return self.input_ids.device

    @property
    def sequence_lengths(self) -> Int64[Tensor, " S"]:
        """Tokens of each sequence. Shape (S,)."""
        return self.position_ids[self.sequence_ends.long()] + 1

    def sequence_rows(self, i: int) -> Int64[Tensor, " L"]:
        """Rows of sequence `i` in order: the path from its root to its last token. Shape (L_i,), int64."""
        end = int(self.sequence_ends[i])
        return torch.nonzero(self.subtree_end[: end + 1] > end)[:, 0]

    def sequence_targets(self, i: int) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " T"]]:
        """Where the trained tokens of sequence `i` stand among the targets.

        For losses that weigh sequences differently (policy gradients): `loss[targets]` are the per-token losses of
        sequence `i` at its `offsets`. `trained_tokens` has all sequences at once.

        Returns:
            offsets (T_i,) int64, into the sequence, ascending; targets (T_i,) int64, into target_rows, target_ids and
            target_weights.
        """
        lengths = self.sequence_lengths
        start = int(lengths[:i].sum())
        offsets = torch.nonzero(self.loss_mask[start : start + int(lengths[i])])[:, 0]
        return offsets, torch.searchsorted(self.target_children, self.sequence_rows(i)[offsets])

    def expanded_rows(self) -> Int64[Tensor, " E"]:
        """`sequence_rows` of all sequences, one after another. Shape (E,), int64."""
        return torch.from_numpy(self._expanded_rows()).to(self.device)

    def _expanded_rows(self) -> np.ndarray:
        """Climbs all paths at once, from branch to branch.

        With numpy: on a CPU torch wakes all its threads for repeat_interleave and searchsorted, which takes longer than
        the work.
        """
        parent, position, last = (x.cpu().numpy() for x in (self.parent, self.position_ids, self.sequence_ends))
        starts = np.flatnonzero(parent != np.arange(-1, self.num_rows - 1))  # rows that do not follow their parent
        starts = np.concatenate([[0], starts])
        lengths = self.sequence_lengths.cpu().numpy()
        start = lengths.cumsum() - lengths
        sequence, last = np.arange(self.num_sequences), last.astype(np.int64)
        expanded = np.empty(self.num_expanded_tokens, dtype=np.int64)
        while last.size:
            first = starts[starts.searchsorted(last, side="right") - 1]
            size = last + 1 - first
            within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
            expanded[np.repeat(start[sequence] + position[first], size) + within] = np.repeat(first, size) + within
            above = parent[first].astype(np.int64)
            sequence, last = sequence[above >= 0], above[above >= 0]
        return expanded

    def trained_tokens(self) -> TrainedTokens:
        """All trained tokens of all sequences, in order, and their targets: `sequence_targets` for every sequence."""
        chosen = np.flatnonzero(self.loss_mask.cpu().numpy())
        lengths = self.sequence_lengths.cpu().numpy()
        ends = lengths.cumsum()
        sequence = ends.searchsorted(chosen, side="right")
        targets = self.target_children.cpu().numpy().searchsorted(self._expanded_rows()[chosen])
        offsets = chosen - (ends - lengths)[sequence]
        return TrainedTokens(*(torch.from_numpy(x).to(self.device) for x in (sequence, offsets, targets)))

    def sequences(self) -> list[Int64[Tensor, " L"]]:
        """The token ids that were merged, one tensor a sequence: the inverse of packing."""
        return list(torch.split(self.input_ids[self.expanded_rows()], self.sequence_lengths.tolist()))

    def dense_mask(self) -> Bool[Tensor, "N N"]:
        """Entry (i, j): whether row i sees row j."""
        return masks.dense_mask(self.subtree_end)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTrie:
        """The same row on another device."""
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **tensors)

    def pad_to(self, n: int) -> PackedTrie:
        """Appends isolated rows up to `n`: token 0, depth 0, each its own root, no target; they see only themselves.

        Raises:
            BudgetError: The row is longer than `n`.
        """
        extra = n - self.num_rows
        if extra < 0:
            raise BudgetError(
                f"n must be at least the number of rows, {self.num_rows}, got {n}; split the trie before packing it"
            )
        if extra == 0:
            return self
        zeros = self.input_ids.new_zeros(extra)
        own_end = torch.arange(self.num_rows + 1, n + 1, dtype=torch.int32, device=self.device)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, zeros]),
            position_ids=torch.cat([self.position_ids, zeros]),
            parent=torch.cat([self.parent, self.parent.new_full((extra,), -1)]),
            subtree_end=torch.cat([self.subtree_end, own_end]),
            num_padding=self.num_padding + extra,
        )

    @staticmethod
    def concat(packed: Sequence[PackedTrie]) -> PackedTrie:
        """A forest: the rows of several packed tries one after another, which do not see each other.

        Targets and sequences keep their order, so sequence 0 of `packed[1]` becomes number `packed[0].num_sequences`.

        Raises:
            TrieError: Nothing to concatenate, padded rows among it, or tries on different devices.
        """
        if not packed:
            raise TrieError("packed is empty; pass at least one PackedTrie")
        devices = {str(trie.device) for trie in packed}
        if len(devices) > 1:
            raise TrieError(
                f"all tries must be on one device, got {', '.join(sorted(devices))}; call .to(device) on each first"
            )
        if padded := [i for i, trie in enumerate(packed) if trie.num_padding]:
            raise TrieError(
                f"packed[{padded[0]}] has {packed[padded[0]].num_padding} rows of padding; concatenate first, then pad"
            )
        starts = np.cumsum([0, *(trie.num_rows for trie in packed)]).tolist()
        joined: dict[str, Tensor] = {}
        for name in _TENSORS:
            shift = name in _ROW_NUMBERS
            joined[name] = torch.cat(
                [
                    getattr(trie, name) + start if shift else getattr(trie, name)
                    for trie, start in zip(packed, starts, strict=False)
                ]
            )
        joined["parent"][torch.cat([trie.parent for trie in packed]) < 0] = -1
        return PackedTrie(**joined, num_padding=0)


_TENSORS = tuple(field.name for field in fields(PackedTrie) if field.name != "num_padding")
_ROW_NUMBERS = {"parent", "subtree_end", "target_rows", "target_children", "sequence_ends"}


def pack_forest(tries: Sequence[ReasoningTrie], max_tokens: int) -> list[PackedTrie]:
    """Packs tries into few forests of at most `max_tokens` rows: best-fit decreasing.

    Inside a forest tries keep their given order; forests are ordered by their first trie. Padding is the caller's
    choice (`pad_to`).

    Raises:
        BudgetError: One trie alone is larger; `split` it first.
    """
    bins = plan_forest([trie.num_tokens for trie in tries], max_tokens)
    return [PackedTrie.concat([tries[i].pack() for i in chosen]) for chosen in bins]


def plan_forest(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which tries go together: best-fit decreasing over their sizes. See `pack_forest`."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free rows, bin), ascending
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] > max_tokens:
            raise BudgetError(
                f"tries[{i}] has {sizes[i]} rows, more than max_tokens={max_tokens}; "
                "use trie.split(max_tokens) before packing"
            )
        at = bisect_left(room, (sizes[i], -1))
        if at == len(room):
            bins.append([i])
            insort(room, (max_tokens - sizes[i], len(bins) - 1))
        else:
            free, chosen = room.pop(at)
            bins[chosen].append(i)
            insort(room, (free - sizes[i], chosen))
    return sorted(map(sorted, bins))
