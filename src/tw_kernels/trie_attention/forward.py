"""Triton forward of trie attention.

Layout    q, o: (N, H, D); k, v: (N, Hkv, D), stride(-1) == 1. subtree_end, depth: (N,) int32. lse: (H, N) float32.
Grid      one program per block of queries and query head; the order is `tiles.scheduled`.
Work      the plan's partial tiles, diagonal first, with the interval test; then its full tiles, without any test; in
          one loop, whose branch costs less than the seam between two.
Numerics  logits, max, sum, accumulator in float32, base-2 exponentials; P rounded to v's dtype.
Source    FlashAttention-2 (arXiv:2307.08691), Algorithm 1, over listed tiles.
Guarded by tests/kernels/test_triton.py, test_impls.py and, for what ptxas makes of it, test_compile.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tw_kernels.trie_attention.config import TileConfig, matmul_precision, padded
from tw_kernels.trie_attention.plan import BlockPlan
from tw_kernels.trie_attention.tiles import (
    LN_2,
    LOG2_E,
    listed_block,
    load_row_ints,
    load_tile,
    scheduled,
    store_tile,
    tanh,
    tile_list,
    visible,
)


@triton.jit
def _attend(
    q, acc, row_sum, row_max, first_k, partial, q_rows, q_depths,
    k_ptr, v_ptr, end_ptr, depth_ptr, stride_kn, stride_vn, n_rows, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from row `first_k`; only a partial tile is tested."""
    k = load_tile(k_ptr, first_k, stride_kn, n_rows, D, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    factor = scale * LOG2_E
    if HAS_SOFTCAP:
        logits = softcap * tanh(logits * (scale / softcap))
        factor = LOG2_E
    if partial:
        k_ends = load_row_ints(end_ptr, first_k, n_rows, BLOCK_N)
        k_rows = first_k + tl.arange(0, BLOCK_N)
        k_depths = k_rows
        if depth_ptr is not None:
            k_depths = load_row_ints(depth_ptr, first_k, n_rows, BLOCK_N)
        seen = visible(
            q_rows[:, None], k_rows[None, :], k_ends[None, :], q_depths[:, None], k_depths[None, :],
            window, depth_ptr is not None,
        )  # fmt: skip
        logits = tl.where(seen, logits, float("-inf"))
    # scale > 0 (autograd.py sees to it), so scaling may follow the maximum and melt into the subtraction.
    new_max = tl.maximum(row_max, tl.max(logits, 1) * factor)  # (BLOCK_M,)
    # A row may not have met an ancestor yet: a finite pivot keeps -inf - -inf away.
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(logits * factor - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    v = load_tile(v_ptr, first_k, stride_vn, n_rows, DV, BLOCK_N, BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=["n_rows", "num_blocks", "window"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, depth_ptr, sinks_ptr, plan_ptr, o_ptr, lse_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_on, stride_oh,
    n_rows, num_blocks, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HEAD_SLOWEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over the ancestors of BLOCK_M queries, one head."""
    PARTS: tl.constexpr = BLOCK // BLOCK_M  # programs per block of the plan
    STEPS: tl.constexpr = BLOCK // BLOCK_N  # key tiles per block of the plan
    kv_head, block, part = scheduled(
        tl.program_id(0), num_blocks, plan_ptr + 2 * num_blocks, KV_HEADS, GROUP * PARTS, HEAD_SLOWEST
    )
    head = kv_head * GROUP + part // PARTS
    first_q = block * BLOCK + (part % PARTS) * BLOCK_M
    if first_q >= n_rows:
        return
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    q = load_tile(q_ptr + head.to(tl.int64) * stride_qh, first_q, stride_qn, n_rows, D, BLOCK_M, BLOCK_D)
    q_rows = first_q + tl.arange(0, BLOCK_M)
    q_depths = q_rows
    if depth_ptr is not None:
        q_depths = load_row_ints(depth_ptr, first_q, n_rows, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if sinks_ptr is not None:
        # A sink is one more logit, whose value is zero.
        sink = tl.load(sinks_ptr + head, mask=head < KV_HEADS * GROUP, other=0.0).to(tl.float32)
        row_max = tl.zeros((BLOCK_M,), tl.float32) + sink * LOG2_E
        row_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)

    partial, n_partial, full, n_full, step = tile_list(plan_ptr, block, num_blocks, False)
    # The number of the next tile is read one step ahead, so that its loads need not wait for it.
    key_block = listed_block(partial, n_partial, full, n_full, step, 0)
    for t in range(0, (n_partial + n_full) * STEPS):
        first_k = key_block * BLOCK + (t % STEPS) * BLOCK_N
        key_block = listed_block(partial, n_partial, full, n_full, step, (t + 1) // STEPS)
        acc, row_sum, row_max = _attend(
            q, acc, row_sum, row_max, first_k, t < n_partial * STEPS, q_rows, q_depths,
            k_ptr, v_ptr, end_ptr, depth_ptr, stride_kn, stride_vn, n_rows, window, scale, softcap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip

    # Rows past the end have met nothing.
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    store_tile(o_ptr + head.to(tl.int64) * stride_oh, acc, first_q, stride_on, n_rows, DV, BLOCK_M, BLOCK_DV)
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head.to(tl.int64) * n_rows + q_rows, lse, mask=q_rows < n_rows)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    depth: Tensor | None,
    sinks: Tensor | None,
    plan: BlockPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: TileConfig,
) -> tuple[Tensor, Tensor]:
    """Allocate o (N, H, Dv) and lse (H, N) float32, launch.

    Args:
        q: Shape (N, H, D), N >= 1.
        k: Shape (N, Hkv, D).
        v: Shape (N, Hkv, Dv).
        subtree_end: Shape (N,), int32.
        depth: Shape (N,), int32; needed with a window, else None.
        sinks: Shape (H,) or None.
        plan: The plan of `subtree_end` and `window`.
        scale: Logit scale, positive.
        window: Rows seen along the path, or None.
        softcap: Logit cap or None.
        config: Tiles; block_m and block_n divide plan.block.
    """
    n, num_heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    o = q.new_empty((n, num_heads, value_dim))
    lse = q.new_empty((num_heads, n), dtype=torch.float32)
    grid = (plan.num_blocks * (plan.block // config.block_m) * num_heads,)
    _forward_kernel[grid](
        q, k, v, subtree_end, depth if window is not None else None, sinks, plan.data, o, lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), o.stride(0), o.stride(1),
        n, plan.num_blocks, window or 0, scale, softcap or 1.0,
        D=head_dim, DV=value_dim, BLOCK_D=padded(head_dim), BLOCK_DV=padded(value_dim),
        KV_HEADS=kv_heads, GROUP=num_heads // kv_heads,
        BLOCK=plan.block, HAS_SOFTCAP=softcap is not None, PRECISION=matmul_precision(q.dtype), **config.options(),
    )  # fmt: skip
    return o, lse
