"""Triton construction of the block plan on a GPU: bounds of each block, lists of each block, order of the blocks.

Layout    plan.py's; bounds: (4, B) int32, min and max of subtree_end, min and max of depth.
Grid      bounds (B,); lists (B, 2), one program per query block and one per key block; order (cdiv(B, CHUNK), 2).
Guarded by tests/kernels/test_plan.py, which compares with the torch construction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels.trie_attention.plan import plan_size

CHUNK = 128
INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["n_rows", "num_blocks"])
def _bounds_kernel(end_ptr, depth_ptr, bounds_ptr, n_rows, num_blocks, BLOCK: tl.constexpr):
    """Minimum and maximum of subtree_end, and of depth, over one block."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    low = tl.load(end_ptr + rows, mask=inside, other=INT32_MAX)
    high = tl.load(end_ptr + rows, mask=inside, other=0)
    tl.store(bounds_ptr + block, tl.min(low, 0))
    tl.store(bounds_ptr + num_blocks + block, tl.max(high, 0))
    if depth_ptr is not None:
        shallow = tl.load(depth_ptr + rows, mask=inside, other=INT32_MAX)
        deep = tl.load(depth_ptr + rows, mask=inside, other=0)
        tl.store(bounds_ptr + 2 * num_blocks + block, tl.min(shallow, 0))
        tl.store(bounds_ptr + 3 * num_blocks + block, tl.max(deep, 0))


@triton.jit(do_not_specialize=["n_rows", "num_blocks", "window"])
def _lists_kernel(
    bounds_ptr, plan_ptr, n_rows, num_blocks, window,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Counts and lists of one query block (second grid axis 0) or of one key block (1)."""
    me = tl.program_id(0)
    by_key = tl.program_id(1) == 1
    i, blocks = me.to(tl.int64), num_blocks.to(tl.int64)
    first_other = tl.where(by_key, me, 0)
    past_other = tl.where(by_key, num_blocks, me + 1)
    start = tl.where(by_key, blocks * (blocks + 1) // 2 + i * blocks - i * (i - 1) // 2, i * (i + 1) // 2)
    left_ptr = plan_ptr + 6 * blocks + start
    right_ptr = left_ptr + (past_other - first_other) - 1
    n_partial = tl.zeros((), tl.int32)
    n_full = tl.zeros((), tl.int32)
    for chunk in range(first_other, past_other, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        inside = other < past_other
        q_block = tl.where(by_key, other, me)
        k_block = tl.where(by_key, me, other)
        first_q = q_block * BLOCK
        past_q = tl.minimum(first_q + BLOCK, n_rows)
        low = tl.load(bounds_ptr + k_block, mask=inside, other=0)
        high = tl.load(bounds_ptr + num_blocks + k_block, mask=inside, other=0)
        met = inside & ((high > first_q) | (k_block == q_block))  # the diagonal always, as in _plan_data_torch
        full = met & (k_block < q_block) & (low >= past_q)
        if HAS_WINDOW:
            shallow_k = tl.load(bounds_ptr + 2 * num_blocks + k_block, mask=inside, other=0)
            deep_k = tl.load(bounds_ptr + 3 * num_blocks + k_block, mask=inside, other=0)
            shallow_q = tl.load(bounds_ptr + 2 * num_blocks + q_block, mask=inside, other=0)
            deep_q = tl.load(bounds_ptr + 3 * num_blocks + q_block, mask=inside, other=0)
            met = met & (shallow_q - deep_k < window)
            full = full & met & (deep_q - shallow_k < window)
        partial = (met & (full == 0)).to(tl.int32)
        whole = full.to(tl.int32)
        tl.store(left_ptr + n_partial + tl.cumsum(partial, 0) - 1, other, mask=partial > 0)
        tl.store(right_ptr - n_full - tl.cumsum(whole, 0) + 1, other, mask=whole > 0)
        n_partial += tl.sum(partial, 0)
        n_full += tl.sum(whole, 0)
    counts_ptr = plan_ptr + tl.where(by_key, 3, 0) * num_blocks + me
    tl.store(counts_ptr, n_partial)
    tl.store(counts_ptr + num_blocks, n_full)


@triton.jit(do_not_specialize=["num_blocks"])
def _order_kernel(plan_ptr, num_blocks, CHUNK: tl.constexpr):
    """Put CHUNK blocks at their rank: most tiles first, the later block first among equals."""
    counts_ptr = plan_ptr + 3 * tl.program_id(1) * num_blocks
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = mine < num_blocks
    my_count = tl.load(counts_ptr + mine, mask=inside, other=0)
    my_count += tl.load(counts_ptr + num_blocks + mine, mask=inside, other=0)
    rank = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(0, num_blocks, CHUNK):
        other = chunk + tl.arange(0, CHUNK)
        count = tl.load(counts_ptr + other, mask=other < num_blocks, other=-1)
        count += tl.load(counts_ptr + num_blocks + other, mask=other < num_blocks, other=0)
        before = (count[None, :] > my_count[:, None]) | (
            (count[None, :] == my_count[:, None]) & (other[None, :] > mine[:, None])
        )
        rank += tl.sum((before & (other < num_blocks)[None, :]).to(tl.int32), 1)
    tl.store(counts_ptr + 2 * num_blocks + rank, mine, mask=inside)


def launch_plan(subtree_end: Tensor, depth: Tensor | None, window: int | None, block: int) -> Tensor:
    """Allocate and fill a plan's tensor.

    Args:
        subtree_end: Shape (N,), int32, N >= 1.
        depth: Shape (N,), int32; None without a window.
        window: As in `make_plan`.
        block: Rows of a block.
    """
    n = subtree_end.shape[0]
    blocks = -(-n // block)
    data = subtree_end.new_empty(plan_size(n, block))
    bounds = subtree_end.new_empty((4, blocks))
    has_window = window is not None
    with torch.cuda.device_of(subtree_end):
        _bounds_kernel[(blocks,)](
            subtree_end, depth if has_window else None, bounds, n, blocks, BLOCK=block, num_warps=1
        )
        _lists_kernel[(blocks, 2)](
            bounds, data, n, blocks, window or 0, BLOCK=block, CHUNK=CHUNK, HAS_WINDOW=has_window, num_warps=1
        )
        _order_kernel[(-(-blocks // CHUNK), 2)](data, blocks, CHUNK=CHUNK, num_warps=8)
    return data
