"""What the Hopper backward does before and after its main kernel; plain Triton, memory-bound.

Layout    o, do, dq: (N, H, D), stride(-1) == 1. lse: (H, N) float32. sums: (H, N, D) float32, dq before scale.
          stats: (2, H, W) float32, W = N rounded up to blocks: lse in units of log 2, then delta = do . o; 0 past N.
Grid      (cdiv(W, ROWS), H).
Guarded by tests/kernels/test_hopper.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tw_kernels.trie_attention.tiles import LOG2_E, load_tile, store_tile


@triton.jit(do_not_specialize=["n_rows", "width"])
def before_kernel(
    o_ptr, do_ptr, lse_ptr, stats_ptr, sums_ptr, stride_on, stride_oh, stride_don, stride_doh, n_rows, width,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fill the statistics of ROWS rows of one head; with `sums_ptr`, clear their sums."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    o = load_tile(o_ptr + head * stride_oh, first, stride_on, n_rows, D, ROWS, D).to(tl.float32)
    do = load_tile(do_ptr + head * stride_doh, first, stride_don, n_rows, D, ROWS, D).to(tl.float32)
    lse = tl.load(lse_ptr + head * n_rows + rows, mask=rows < n_rows, other=0.0) * LOG2_E
    stats_ptr += head * width + rows
    tl.store(stats_ptr, lse, mask=rows < width)
    tl.store(stats_ptr + tl.num_programs(1).to(tl.int64) * width, tl.sum(o * do, 1), mask=rows < width)
    if sums_ptr is not None:
        store_tile(sums_ptr + head * n_rows * D, tl.zeros((ROWS, D), tl.float32), first, D, n_rows, D, ROWS, D)


@triton.jit(do_not_specialize=["n_rows"])
def after_kernel(sums_ptr, dq_ptr, stride_dqn, stride_dqh, n_rows, scale, D: tl.constexpr, ROWS: tl.constexpr):
    """dq of ROWS rows of one head: the sums times the scale, rounded."""
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    dq = load_tile(sums_ptr + head * n_rows * D, first, D, n_rows, D, ROWS, D) * scale
    store_tile(dq_ptr + head * stride_dqh, dq, first, stride_dqn, n_rows, D, ROWS, D)
