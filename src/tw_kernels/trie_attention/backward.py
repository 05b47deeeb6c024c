"""Triton backward of trie attention: two passes without atomics, so its result is bitwise repeatable.

Layout    as in forward.py; delta: (H, N) float32, delta[h, i] = do[i, h] . o[i, h].
Grid      dq: one program per block of queries and query head, which also writes delta.
          dk, dv: one program per block of keys and key head, which adds up the query heads of the group.
Work      dq walks the plan's query rows, dk and dv its transpose; interval test in partial tiles only.
Numerics  logits are computed again; p = 2^(logits - lse); P and dS rounded to the inputs' dtype, sums in float32.
Source    FlashAttention-2 (arXiv:2307.08691), Algorithm 2, split by output.
Guarded by tests/kernels/test_triton.py, test_impls.py and, for what ptxas makes of it, test_compile.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tw_kernels.trie_attention.config import TileConfig, matmul_precision, padded
from tw_kernels.trie_attention.plan import BlockPlan
from tw_kernels.trie_attention.tiles import (
    LOG2_E,
    listed_block,
    load_row_floats,
    load_row_ints,
    load_tile,
    logits_base2,
    scheduled,
    store_tile,
    tile_list,
    visible,
)


@triton.jit
def _dq_step(
    q, do, dq, lse, delta, first_k, partial, q_rows, q_depths,
    k_ptr, v_ptr, end_ptr, depth_ptr, stride_kn, stride_vn, n_rows, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_N keys from row `first_k` give to dq, without the scale."""
    k = load_tile(k_ptr, first_k, stride_kn, n_rows, D, BLOCK_N, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    v = load_tile(v_ptr, first_k, stride_vn, n_rows, DV, BLOCK_N, BLOCK_DV)  # (BLOCK_N, BLOCK_DV)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    logits, bent = logits_base2(products, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(logits - lse[:, None])
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
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    ds = p * (dp - delta[:, None])
    if HAS_SOFTCAP:
        ds = ds * (1.0 - bent * bent)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_rows", "num_blocks", "window"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, depth_ptr, plan_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_on, stride_oh, stride_don, stride_doh, stride_dqn, stride_dqh,
    n_rows, num_blocks, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HEAD_SLOWEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta and dq of BLOCK_M queries, one head."""
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    STEPS: tl.constexpr = BLOCK // BLOCK_N
    kv_head, block, part = scheduled(
        tl.program_id(0), num_blocks, plan_ptr + 2 * num_blocks, KV_HEADS, GROUP * PARTS, HEAD_SLOWEST
    )
    head = kv_head * GROUP + part // PARTS
    first_q = block * BLOCK + (part % PARTS) * BLOCK_M
    if first_q >= n_rows:
        return
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    wide_head = head.to(tl.int64)
    q_rows = first_q + tl.arange(0, BLOCK_M)
    q_depths = q_rows
    if depth_ptr is not None:
        q_depths = load_row_ints(depth_ptr, first_q, n_rows, BLOCK_M)
    o = load_tile(o_ptr + wide_head * stride_oh, first_q, stride_on, n_rows, DV, BLOCK_M, BLOCK_DV)
    do = load_tile(do_ptr + wide_head * stride_doh, first_q, stride_don, n_rows, DV, BLOCK_M, BLOCK_DV)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # (BLOCK_M,)
    tl.store(delta_ptr + wide_head * n_rows + q_rows, delta, mask=q_rows < n_rows)
    lse = load_row_floats(lse_ptr + wide_head * n_rows, first_q, n_rows, BLOCK_M) * LOG2_E
    q = load_tile(q_ptr + wide_head * stride_qh, first_q, stride_qn, n_rows, D, BLOCK_M, BLOCK_D)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    partial, n_partial, full, n_full, step = tile_list(plan_ptr, block, num_blocks, False)
    key_block = listed_block(partial, n_partial, full, n_full, step, 0)
    for t in range(0, (n_partial + n_full) * STEPS):
        first_k = key_block * BLOCK + (t % STEPS) * BLOCK_N
        key_block = listed_block(partial, n_partial, full, n_full, step, (t + 1) // STEPS)
        dq = _dq_step(
            q, do, dq, lse, delta, first_k, t < n_partial * STEPS, q_rows, q_depths,
            k_ptr, v_ptr, end_ptr, depth_ptr, stride_kn, stride_vn, n_rows, window, scale, softcap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    store_tile(dq_ptr + wide_head * stride_dqh, dq * scale, first_q, stride_dqn, n_rows, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_step(
    k, v, dk, dv, head, first_q, partial, k_rows, k_ends, k_depths,
    q_ptr, do_ptr, lse_ptr, delta_ptr, depth_ptr, stride_qn, stride_qh, stride_don, stride_doh,
    n_rows, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_M queries of one head from row `first_q` give to dk, without the scale, and dv.

    Tiles are transposed (keys down, queries across): P^T and dS^T then enter their products from registers.
    """
    wide_head = head.to(tl.int64)
    if TMA:
        q = q_ptr.load([first_q, head * D])
        do = do_ptr.load([first_q, head * DV])
    else:
        q = load_tile(q_ptr + wide_head * stride_qh, first_q, stride_qn, n_rows, D, BLOCK_M, BLOCK_D)
        do = load_tile(do_ptr + wide_head * stride_doh, first_q, stride_don, n_rows, DV, BLOCK_M, BLOCK_DV)
    lse = load_row_floats(lse_ptr + wide_head * n_rows, first_q, n_rows, BLOCK_M) * LOG2_E
    products = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    logits, bent = logits_base2(products, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2(logits - lse[None, :])
    if partial:
        q_rows = first_q + tl.arange(0, BLOCK_M)
        q_depths = q_rows
        if depth_ptr is not None:
            q_depths = load_row_ints(depth_ptr, first_q, n_rows, BLOCK_M)
        seen = visible(
            q_rows[None, :], k_rows[:, None], k_ends[:, None], q_depths[None, :], k_depths[:, None],
            window, depth_ptr is not None,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    # Query rows past the end have q = do = delta = 0: they add p (0 - 0) and p^T 0.
    if WITH_DK:
        delta = load_row_floats(delta_ptr + wide_head * n_rows, first_q, n_rows, BLOCK_M)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - bent * bent)
    if WITH_DV:
        # Only now: with this product before that of dp, ptxas spills.
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if WITH_DK:
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["n_rows", "num_blocks", "window"])
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, end_ptr, depth_ptr, plan_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_don, stride_doh, stride_dkn, stride_dkh, stride_dvn, stride_dvh,
    n_rows, num_blocks, window, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HEAD_SLOWEST: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, one key head: one loop over (tile, query head of the group)."""
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    STEPS: tl.constexpr = BLOCK // BLOCK_M * GROUP  # query tiles and heads per block of the plan
    kv_head, block, part = scheduled(
        tl.program_id(0), num_blocks, plan_ptr + 5 * num_blocks, KV_HEADS, PARTS, HEAD_SLOWEST
    )
    first_k = block * BLOCK + part * BLOCK_N
    if first_k >= n_rows:
        return
    wide_head = kv_head.to(tl.int64)
    k = load_tile(k_ptr + wide_head * stride_kh, first_k, stride_kn, n_rows, D, BLOCK_N, BLOCK_D)
    v = load_tile(v_ptr + wide_head * stride_vh, first_k, stride_vn, n_rows, DV, BLOCK_N, BLOCK_DV)
    k_rows = first_k + tl.arange(0, BLOCK_N)
    k_ends = load_row_ints(end_ptr, first_k, n_rows, BLOCK_N)
    k_depths = k_rows
    if depth_ptr is not None:
        k_depths = load_row_ints(depth_ptr, first_k, n_rows, BLOCK_N)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    partial, n_partial, full, n_full, step = tile_list(plan_ptr, block, num_blocks, True)
    query_block = listed_block(partial, n_partial, full, n_full, step, 0)
    for t in range(0, (n_partial + n_full) * STEPS):
        head = kv_head * GROUP + t % GROUP
        first_q = query_block * BLOCK + (t // GROUP % (BLOCK // BLOCK_M)) * BLOCK_M
        query_block = listed_block(partial, n_partial, full, n_full, step, (t + 1) // STEPS)
        dk, dv = _dkv_step(
            k, v, dk, dv, head, first_q, t < n_partial * STEPS, k_rows, k_ends, k_depths,
            q_ptr, do_ptr, lse_ptr, delta_ptr, depth_ptr, stride_qn, stride_qh, stride_don, stride_doh,
            n_rows, window, scale, softcap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, HAS_SOFTCAP, WITH_DK, WITH_DV, TMA, PRECISION,
        )  # fmt: skip
    if WITH_DK:
        store_tile(dk_ptr + wide_head * stride_dkh, dk * scale, first_k, stride_dkn, n_rows, D, BLOCK_N, BLOCK_D)
    if WITH_DV:
        store_tile(dv_ptr + wide_head * stride_dvh, dv, first_k, stride_dvn, n_rows, DV, BLOCK_N, BLOCK_DV)


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    depth: Tensor | None,
    sinks: Tensor | None,
    plan: BlockPlan,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    dq_config: TileConfig,
    dkv_config: TileConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Allocate and compute dq, dk, dv and dsinks (None without sinks).

    Args:
        q: As in `launch_forward`, like every argument not named here.
        k: Shape (N, Hkv, D).
        v: Shape (N, Hkv, Dv).
        subtree_end: Shape (N,), int32.
        depth: Shape (N,), int32, or None without a window.
        sinks: Shape (H,) or None.
        plan: The forward's plan.
        o: The forward's output. Shape (N, H, Dv).
        lse: The forward's. Shape (H, N), float32.
        grad_o: Gradient of the loss by `o`. Shape (N, H, Dv), stride(-1) == 1.
        scale: Logit scale.
        window: Rows seen along the path, or None.
        softcap: Logit cap or None.
        dq_config: Tiles of the pass over queries.
        dkv_config: Tiles of the pass over keys.
    """
    n, kv_heads, head_dim = k.shape
    depth = depth if window is not None else None
    dq, delta = launch_dq(
        q, k, v, subtree_end, depth, plan, o, lse, grad_o,
        scale=scale, window=window, softcap=softcap, config=dq_config,
    )  # fmt: skip
    dk = k.new_empty((n, kv_heads, head_dim))
    dv = v.new_empty((n, kv_heads, v.shape[2]))
    grid = (plan.num_blocks * (plan.block // dkv_config.block_n) * kv_heads,)
    # Through the tensor memory accelerator, which also clips at the last row, where the layout is one it can describe.
    tma = dkv_config.tma and _describable(q) and _describable(grad_o)
    rows = [_describe(x, dkv_config.block_m) if tma else x for x in (q, grad_o)]
    constants = _constants(q, v, plan, softcap)
    # Wide heads leave no registers for two accumulators: dk and dv then come from a launch each.
    for with_dk, with_dv in ((True, False), (False, True)) if dkv_config.separate else ((True, True),):
        _dkv_kernel[grid](
            rows[0], k, v, subtree_end, depth, plan.data, rows[1], lse, delta, dk, dv,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            grad_o.stride(0), grad_o.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            n, plan.num_blocks, window or 0, scale, softcap or 1.0, **constants,
            WITH_DK=with_dk, WITH_DV=with_dv, TMA=tma, **dkv_config.options(),
        )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, None
    # The sink's probability times (0 - delta), over all rows.
    sink_p = torch.exp(sinks.float()[:, None] - lse)  # (H, N)
    return dq, dk, dv, -(sink_p * delta).sum(1).to(sinks.dtype)


def launch_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    depth: Tensor | None,
    plan: BlockPlan,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: TileConfig,
) -> tuple[Tensor, Tensor]:
    """Allocate and compute dq (N, H, D) and delta (H, N) float32; arguments as in `launch_backward`."""
    n, num_heads, head_dim = q.shape
    dq = q.new_empty((n, num_heads, head_dim))
    delta = q.new_empty((num_heads, n), dtype=torch.float32)
    _dq_kernel[(plan.num_blocks * (plan.block // config.block_m) * num_heads,)](
        q, k, v, subtree_end, depth, plan.data, o, grad_o, lse, delta, dq,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        o.stride(0), o.stride(1), grad_o.stride(0), grad_o.stride(1), dq.stride(0), dq.stride(1),
        n, plan.num_blocks, window or 0, scale, softcap or 1.0,
        **_constants(q, v, plan, softcap), **config.options(),
    )  # fmt: skip
    return dq, delta


def _constants(q: Tensor, v: Tensor, plan: BlockPlan, softcap: float | None) -> dict[str, int | bool | str]:
    """The compile-time arguments that both kernels take, the tiles apart."""
    num_heads, head_dim = q.shape[1:]
    kv_heads, value_dim = v.shape[1:]
    return {
        "D": head_dim, "DV": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
        "KV_HEADS": kv_heads, "GROUP": num_heads // kv_heads, "BLOCK": plan.block,
        "HAS_SOFTCAP": softcap is not None, "PRECISION": matmul_precision(q.dtype),
    }  # fmt: skip


def tma_addressable(x: Tensor) -> bool:
    """Whether TMA can address x (N, H, D): it starts at, and steps by, multiples of 16 bytes; D is contiguous.

    A dimension of one entry has no step. A step of 0, as expanded heads have, is none that the CUDA driver's
    documentation of tensor maps promises to take.
    """
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    return x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _describable(x: Tensor) -> bool:
    """Whether x (N, H, D) is rows of H * D contiguous elements that a TMA descriptor can tile."""
    n, num_heads, dim = x.shape
    return tma_addressable(x) and (num_heads == 1 or x.stride(1) == dim) and dim == padded(dim) and n > 1


def _describe(x: Tensor, block: int) -> TensorDescriptor:
    n, num_heads, dim = x.shape
    return TensorDescriptor(x, [n, num_heads * dim], [x.stride(0), 1], [block, dim])
