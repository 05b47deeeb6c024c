"""Block plan of a packed trie: which tiles of the (query, key) square a kernel visits, and which of them it must test.

Rows are cut into blocks. From the minimum and maximum of subtree_end over each key block, with q0 the first row of the
query block and q1 one past its last:

    skipped   the key block comes later, or max <= q0            no pair is visible
    full      the key block comes earlier, and min >= q1         every pair is visible
    partial   the others                                         the kernel tests each pair

A window skips more by the bounds of depth, and tests more. One int32 tensor holds it all, in this order, for B blocks:

    per query block   (B,) partial tiles, (B,) full tiles, (B,) blocks from most tiles to fewest
    per key block     the same three (the transpose, for dk and dv)
    query lists       block i has i + 1 places: partial key blocks ascending from the left, full ones from the right
    key lists         block j has B - j places, filled likewise with query blocks

Kernels read it in `tiles.tile_list`. Building it never waits for the device: on a GPU three small launches
(plan_kernels.py), elsewhere torch operations on the (B, B) table. Guarded by tests/kernels/test_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tw_core.errors import ShapeError
from tw_core.masks import block_bounds, depth_from_subtree_end
from tw_kernels.trie_attention.config import plan_block
from tw_kernels.trie_attention.memo import once_per_rows


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Tiles of one packed trie; build it with `make_plan`, once for all layers, heads and passes.

    Attributes:
        data: The lists. Shape (6 B + B (B + 1),), int32; layout in the module docstring.
        num_rows: N.
        block: Rows of a block.
        window: The window it was made for; None for none.
    """

    data: Tensor
    num_rows: int
    block: int
    window: int | None = None

    @property
    def num_blocks(self) -> int:
        """B."""
        return -(-self.num_rows // self.block)

    def tiles(self, *, by_key: bool = False) -> list[tuple[list[int], list[int]]]:
        """(partial, full) block numbers of each query block (of each key block): for tests and for looking at it."""
        data, blocks = self.data.tolist(), self.num_blocks
        side = 3 * blocks * by_key
        start = 6 * blocks + by_key * blocks * (blocks + 1) // 2
        lists = []
        for i in range(blocks):
            capacity = blocks - i if by_key else i + 1
            partial, full = data[side + i], data[side + blocks + i]
            places = data[start : start + capacity]
            lists.append((places[:partial], places[capacity - full :][::-1]))
            start += capacity
        return lists

    def order(self, *, by_key: bool = False) -> list[int]:
        """Blocks from most tiles to fewest, the later first among equals."""
        start = (5 if by_key else 2) * self.num_blocks
        return self.data[start : start + self.num_blocks].tolist()


def plan_size(num_rows: int, block: int) -> int:
    """Entries of a plan's tensor."""
    blocks = (num_rows + block - 1) // block
    return 6 * blocks + blocks * (blocks + 1)


def make_plan(
    subtree_end: Tensor, *, depth: Tensor | None = None, window: int | None = None, block: int | None = None
) -> BlockPlan:
    """Plan the tiles of a packed trie, without waiting for the device.

    Args:
        subtree_end: `PackedTrie.subtree_end`. Shape (N,), int32 or int64.
        depth: `PackedTrie.position_ids`, used with a window; derived from subtree_end when None. Shape (N,), int32 or
            int64, on the device of subtree_end.
        window: As in `trie_attention`; the plan then serves calls with this window only.
        block: Rows of a block, a power of two of at least 16. Defaults to `config.plan_block(device)`.

    Raises:
        ShapeError: `subtree_end` is not one row, or `depth` has another shape.
        ValueError: A dtype or device differs from the above, `block` is not a power of two of at least 16, or `window`
            is below 1.
    """
    if subtree_end.dim() != 1 or (depth is not None and depth.shape != subtree_end.shape):
        got = tuple(subtree_end.shape), None if depth is None else tuple(depth.shape)
        raise ShapeError(f"subtree_end and depth must have one shape (N,), got {got[0]} and {got[1]}; pass one row")
    for name, rows in (("subtree_end", subtree_end), ("depth", depth)):
        if rows is None:
            continue
        if rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 (or int64), got {rows.dtype}; take it from PackedTrie")
        if rows.device != subtree_end.device:
            raise ValueError(
                f"{name} must be on the device of subtree_end, {subtree_end.device}, got {rows.device}; "
                "call PackedTrie.to(device)"
            )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (1 is the row alone), got {window}; pass None for none")
    block = plan_block(subtree_end.device) if block is None else block
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two of at least 16, got {block}; leave it out for the usual one")
    if window is not None and depth is None:
        depth = depth_from_subtree_end(subtree_end)
    data = plan_data(subtree_end, depth if window is not None else None, window, block)
    return BlockPlan(data, subtree_end.shape[0], block, window)


def plan_data(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> Tensor:
    """The tensor of `BlockPlan.data`."""
    subtree_end = subtree_end.to(torch.int32).contiguous()
    depth = None if depth is None else depth.to(torch.int32).contiguous()
    if subtree_end.shape[0] == 0:
        return subtree_end.new_empty(0)
    if subtree_end.device.type == "cuda":
        from tw_kernels.trie_attention.plan_kernels import launch_plan

        return launch_plan(subtree_end, depth, window, block)
    return _plan_data_torch(subtree_end, depth, window, block)


def _plan_data_torch(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> Tensor:
    """The plan from a (B, B) table of tiles."""
    n, device = subtree_end.shape[0], subtree_end.device
    low, high = block_bounds(subtree_end, block)  # (B,)
    blocks = low.shape[0]
    index = torch.arange(blocks, device=device)
    first = index * block
    past = (first + block).clamp_(max=n)
    # (query block, key block)
    # The diagonal always: a kernel waits for the first tile of a block, and one outside of a forest may have none.
    met = ((index <= index[:, None]) & (high > first[:, None])) | (index == index[:, None])
    full = met & (index < index[:, None]) & (low >= past[:, None])
    if depth is not None and window is not None:
        shallow, deep = block_bounds(depth, block)
        met &= shallow[:, None] - deep < window
        full &= deep[:, None] - shallow < window
    partial = met & ~full
    data = subtree_end.new_zeros(plan_size(n, block))
    lists = data[6 * blocks :]
    row_start = index * (index + 1) // 2
    key_start = blocks * (blocks + 1) // 2 + index * blocks - index * (index - 1) // 2
    sides = ((partial, full, row_start, index + 1), (partial.T, full.T, key_start, blocks - index))
    for side, (some, whole, start, capacity) in enumerate(sides):
        counts = torch.stack([some.sum(1), whole.sum(1)])  # (2, B)
        # Most tiles first, the later block first among equals.
        order = blocks - 1 - counts.sum(0).flip(0).argsort(descending=True, stable=True)
        data[3 * blocks * side : 3 * blocks * (side + 1)] = torch.cat([counts.flatten(), order])
        left = start[:, None] + some.cumsum(1) - 1
        right = (start + capacity)[:, None] - whole.cumsum(1)
        numbers = index.to(torch.int32).expand(blocks, blocks)
        lists[left[some]] = numbers[some]
        lists[right[whole]] = numbers[whole]
    return data


def cached_plan(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> BlockPlan:
    """`make_plan`, remembered for the layers that follow, each of which brings another view (`memo.once_per_rows`)."""
    depth = None if window is None else depth
    rows = [x for x in (subtree_end, depth) if x is not None]
    return once_per_rows(
        rows, ("plan", window, block), lambda: make_plan(subtree_end, depth=depth, window=window, block=block)
    )
