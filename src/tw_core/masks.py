"""Who sees whom in a packed trie: one predicate, its views, and what follows from it (SPEC section 3).

Rows stand in depth-first preorder. Row i sees row j exactly when

    j <= i < subtree_end[j]

that is, j is i itself or an ancestor. A forest obeys the same rule. The views: dense bool, additive float (eager
models), a FlexAttention mask_mod, and a BlockMask made from per-block minima and maxima of subtree_end. All functions
take and return torch tensors on one device and, `check_forest` apart, never synchronise with the host.

Tests: tests/core/test_masks.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tw_core._shapes import Bool, Float, Int, Int32
from tw_core.errors import ShapeError, TrieError


def visible(i: Any, j: Any, subtree_end_of_j: Any) -> Any:
    """The predicate: whether row `i` sees row `j`. Works on ints, arrays and broadcasting tensors alike."""
    return (j <= i) & (i < subtree_end_of_j)


def dense_mask(subtree_end: Int[Tensor, " N"]) -> Bool[Tensor, "N N"]:
    """Entry (i, j): whether row i sees row j. N x N memory: for tests and small rows."""
    rows = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    return visible(rows[:, None], rows[None, :], subtree_end[None, :])  # type: ignore[no-any-return]


def additive_mask(subtree_end: Int[Tensor, " N"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "1 1 N N"]:
    """0 where row i sees row j, the dtype's minimum elsewhere: the 4-D mask that eager models add to their logits.

    A stock model hands it to every layer; on sliding-window layers that is wrong (they would see too much).
    """
    mask = torch.full(
        (1, 1, *(subtree_end.shape[0],) * 2), torch.finfo(dtype).min, dtype=dtype, device=subtree_end.device
    )
    return mask.masked_fill_(dense_mask(subtree_end), 0.0)


def mask_mod(
    subtree_end: Int[Tensor, " N"], *, depth: Int[Tensor, " N"] | None = None, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The predicate in FlexAttention's form: a function of (batch, head, query row, key row).

    With a window, also depth[i] - depth[j] < window; it reaches the function as a tensor: no value is compiled in.
    """
    if window is None:

        def trie_mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return visible(i, j, subtree_end[j])  # type: ignore[no-any-return]

        return trie_mask
    depth = _depth(subtree_end, depth)
    shallowest = depth - (window - 1)

    def windowed_trie_mask(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(i, j, subtree_end[j]) & (depth[j] >= shallowest[i])  # type: ignore[no-any-return]

    return windowed_trie_mask


def block_bounds(rows: Int[Tensor, " N"], block_size: int) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Minimum and maximum in each block of `block_size` rows, B = ceil(N / block_size).

    Those of subtree_end decide every tile: the keys of block b are hidden from all rows >= max[b] and shown to all
    later rows < min[b].
    """
    n = rows.shape[0]
    blocks = -(-n // block_size)
    padded = rows.new_empty((2, blocks * block_size))
    padded[:, :n] = rows
    padded[0, n:], padded[1, n:] = torch.iinfo(rows.dtype).max, torch.iinfo(rows.dtype).min
    low, high = padded.view(2, blocks, block_size)
    return low.amin(1), high.amax(1)


def block_mask(
    subtree_end: Int[Tensor, " N"],
    block_size: int = 128,
    *,
    depth: Int[Tensor, " N"] | None = None,
    window: int | None = None,
) -> BlockMask:
    """The FlexAttention BlockMask of a packed trie, from per-block bounds, never from N x N pairs.

    With q0 and q1 the first row of the query block and one past its last, and the bounds over the key block:
    skip <=> the key block comes later or max(subtree_end) <= q0; full <=> it ends at or before q0 + 1 and
    min(subtree_end) >= q1. A window skips blocks that are too shallow and keeps a block full only if its shallowest
    key is near enough to the deepest query.

    Args:
        subtree_end: Shape (N,), N >= 1.
        block_size: Rows of a block, for queries and keys.
        depth: `PackedTrie.position_ids`, used with a window; derived from subtree_end when None.
        window: Rows that a query sees along its path, itself included; None for all.

    Raises:
        ShapeError: There is no row.
    """
    n, device = subtree_end.shape[0], subtree_end.device
    if n == 0:
        raise ShapeError("subtree_end must have at least one row, got shape (0,); nothing attends in an empty row")
    low, high = block_bounds(subtree_end, block_size)
    first = torch.arange(low.shape[0], device=device) * block_size
    past = (first + block_size).clamp_(max=n)
    met = (first[None, :] <= first[:, None]) & (high[None, :] > first[:, None])
    full = met & (past[None, :] <= first[:, None] + 1) & (low[None, :] >= past[:, None])
    if window is not None:
        depth = _depth(subtree_end, depth)
        shallow, deep = block_bounds(depth, block_size)
        met &= shallow[:, None] - deep[None, :] < window
        full &= deep[:, None] - shallow[None, :] < window
    return BlockMask.from_kv_blocks(
        *_block_lists(met & ~full),
        *_block_lists(full),
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod(subtree_end, depth=depth, window=window),
        seq_lengths=(n, n),
    )


def _depth(subtree_end: Tensor, depth: Tensor | None) -> Tensor:
    return depth_from_subtree_end(subtree_end) if depth is None else depth


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) choice -> FlexAttention's counts (1, 1, B) and column lists (1, 1, B, B), chosen columns first."""
    counts = chosen.sum(1, dtype=torch.int32)
    columns = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], columns[None, None].contiguous()


def subtree_end_from_depth(depth: Int[Tensor, " N"]) -> Int32[Tensor, " N"]:
    """The first later row that is not deeper, N where there is none: all a preorder row needs (DESIGN "The one idea").

    Vectorised doubling over running minima: O(N log N) work, no loop over rows.
    """
    n = depth.shape[0]
    minima = [
        torch.cat([depth, depth.new_full((1,), -1)])
    ]  # minima[k][i] = min of depth[i : i + 2**k], the end counting as -1
    while 2 ** len(minima) <= n:
        half, step = minima[-1], 2 ** (len(minima) - 1)
        minima.append(torch.minimum(half, torch.cat([half[step:], half.new_full((step,), -1)])))
    end = torch.arange(1, n + 1, device=depth.device)
    for k in reversed(range(len(minima))):
        deeper = minima[k][end.clamp(max=n)] > depth
        end = end + deeper * 2**k
    return end.to(torch.int32)


def depth_from_subtree_end(subtree_end: Int[Tensor, " N"]) -> Int32[Tensor, " N"]:
    """Depth of each row: the rows before it less those whose subtree has ended."""
    rows = torch.arange(subtree_end.shape[0], dtype=subtree_end.dtype, device=subtree_end.device)
    ended = torch.searchsorted(subtree_end.sort().values, rows, right=True)
    return (rows - ended).to(torch.int32)


def parent_from_subtree_end(subtree_end: Int[Tensor, " N"]) -> Int32[Tensor, " N"]:
    """Row of each row's parent, -1 at a root: the last earlier row one level up."""
    n = subtree_end.shape[0]
    if n == 0:
        return subtree_end.to(torch.int32)
    depth = depth_from_subtree_end(subtree_end).long()
    rows = torch.arange(n, device=subtree_end.device)
    keys, order = (depth * n + rows).sort()  # by depth, then by row
    above = torch.searchsorted(keys, (depth - 1) * n + rows) - 1
    return torch.where(depth > 0, order[above.clamp(min=0)], -1).to(torch.int32)


def check_forest(subtree_end: Int[Tensor, "..."], position_ids: Int[Tensor, "..."] | None = None) -> None:
    """Raise unless `subtree_end` is that of a forest in preorder, along which `position_ids` rise by one.

    Costs a sort and host synchronisations.

    Raises:
        ShapeError: A tensor is not one-dimensional, or the two differ in length.
        TrieError: An interval is empty, leaves the row or crosses another; a depth does not follow its parent's.
    """
    if subtree_end.dim() != 1 or (position_ids is not None and position_ids.shape != subtree_end.shape):
        got = tuple(subtree_end.shape), None if position_ids is None else tuple(position_ids.shape)
        raise ShapeError(
            f"subtree_end and position_ids must have one shape (N,), got {got[0]} and {got[1]}; pass one row"
        )
    n = subtree_end.shape[0]
    rows = torch.arange(n, dtype=subtree_end.dtype, device=subtree_end.device)
    outside = (subtree_end <= rows) | (subtree_end > n)
    if bool(outside.any()):
        i = int(outside.int().argmax())
        raise TrieError(
            f"subtree_end[{i}] must lie in {i + 1}..{n}, got {int(subtree_end[i])}; take subtree_end from PackedTrie"
        )
    # Counting open subtrees gives a level for any intervals; levels give nested intervals: the same ones for a forest.
    level = depth_from_subtree_end(subtree_end)
    crossing = subtree_end_from_depth(level) != subtree_end
    if bool(crossing.any()):
        i = int(crossing.int().argmax())
        raise TrieError(
            f"subtree_end must be that of a forest in preorder, but the subtree of row {i}, which ends at "
            f"{int(subtree_end[i])}, crosses another; take subtree_end from PackedTrie"
        )
    if position_ids is not None and n > 1:
        offset = position_ids - level  # rows of one tree are contiguous, so it may change at roots only
        jumps = (level[1:] > 0) & (offset[1:] != offset[:-1])
        if bool(jumps.any()):
            i = int(jumps.int().argmax()) + 1
            raise TrieError(
                f"position_ids must rise by one from parent to child, but position_ids[{i}] is {int(position_ids[i])} "
                f"where {int(offset[i - 1] + level[i])} was expected; take both from the same PackedTrie"
            )
