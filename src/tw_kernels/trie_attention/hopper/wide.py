"""Gluon pass for dk and dv of wide heads on sm_90; the loader and the order of programs are backward.py's.

Layout    as in backward.py, with v and do (.., Dv); no sums: dq is a pass of its own, the portable one.
Grid      one program per block of keys and key head; where dk and dv together are too many registers, two launches.
Work      tiles of TILE queries, so that the logits leave registers for the sums. For D = 192 columns of q, k and dk
          come in three tiles of 64, since a tile's sides are powers of two.
Numerics  as backward.py.
Source    FlashAttention-3 (arXiv:2407.08608), appendix B, over listed tiles.
Guarded by tests/kernels/test_hopper.py (emulated; on a GPU) and, for what ptxas makes of it, test_hopper_compile.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tw_kernels.trie_attention.hopper.backward import _item, _load
from tw_kernels.trie_attention.hopper.compat import tma_store, tma_store_wait
from tw_kernels.trie_attention.hopper.parts import read_int, visible


@gluon.jit
def _compute(
    dk_desc, dv_desc, q_smem, k_smem, v_smem, do_smem, stats_smem,
    tile_smem, kv_full, full, empty, plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks, group, scale, factor,
    HALF: gl.constexpr, DV: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    TILE: gl.constexpr, COLUMNS: gl.constexpr, CHUNKS: gl.constexpr, WITH_DK: gl.constexpr, WITH_DV: gl.constexpr,
):  # fmt: skip
    """dk, dv or both of one half of the keys."""
    M: gl.constexpr = BLOCK // 2
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    V_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    KEYS: gl.constexpr = gl.SliceLayout(1, S_L)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_L)
    dtype: gl.constexpr = q_smem.dtype
    first_k = block * BLOCK + HALF * M
    k_rows = first_k + gl.arange(0, M, KEYS)
    k_ends = gl.load(end_ptr + k_rows, mask=k_rows < n_rows, other=0)
    counts = plan_ptr + 3 * num_blocks + block
    n_tiles = (gl.load(counts) + gl.load(counts + num_blocks)) * (BLOCK // TILE * group)
    v = v_smem.index(HALF).reshape([M, DV])
    zero = gl.zeros([M, TILE], gl.float32, S_L)
    dk = ()  # CHUNKS tiles of (M, COLUMNS)
    if WITH_DK:
        for _ in gl.static_range(CHUNKS):
            dk += (gl.zeros([M, COLUMNS], gl.float32, K_L),)  # type: ignore[assignment]
    if WITH_DV:
        dv = gl.zeros([M, DV], gl.float32, V_L)
    mbarrier.wait(kv_full, 0)
    for step in range(0, n_tiles):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        do = do_smem.index(stage).reshape([TILE, DV])
        s = zero
        for i in gl.static_range(CHUNKS):
            k = k_smem.index(HALF * CHUNKS + i).reshape([M, COLUMNS])
            q = q_smem.index(stage * CHUNKS + i).reshape([TILE, COLUMNS])
            s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=i > 0, is_async=True)  # (keys, queries)
        if WITH_DK:
            dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        first_q = read_int(tile_smem, 2 * stage)
        head = read_int(tile_smem, 2 * stage + 1)
        lse = stats_smem.index(2 * stage).load(QUERIES)
        s = warpgroup_mma_wait(1 if WITH_DK else 0, deps=[s])
        p = gl.exp2(s * factor - lse[None, :])
        if head % 2 == 1:
            q_rows = first_q + gl.arange(0, TILE, QUERIES)
            p = gl.where(visible(q_rows[None, :], k_rows[:, None], k_ends[:, None], 0, 0, 0, False), p, 0.0)
        if WITH_DV:
            p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, V_L, 2), assert_trivial=True)
            dv = warpgroup_mma(p16, do, dv, is_async=True)
        if WITH_DK:
            delta = stats_smem.index(2 * stage + 1).load(QUERIES)
            dp = warpgroup_mma_wait(1 if WITH_DV else 0, deps=[dp])
            ds = (p * (dp - delta[None, :])).to(dtype)
            ds16 = gl.convert_layout(ds, gl.DotOperandLayout(0, K_L, 2), assert_trivial=True)
            sums = ()
            for i in gl.static_range(CHUNKS):
                q = q_smem.index(stage * CHUNKS + i).reshape([TILE, COLUMNS])
                sums += (warpgroup_mma(ds16, q, dk[i], is_async=True),)  # type: ignore[assignment]
            dk = ()
            for i in gl.static_range(CHUNKS):
                done, ds16 = warpgroup_mma_wait(0, deps=[sums[i], ds16])
                dk += (done,)  # type: ignore[assignment]
        if WITH_DV:
            dv, p16 = warpgroup_mma_wait(0, deps=[dv, p16])
        mbarrier.arrive(empty.index(stage), count=1)
    # k and v of this half are spent; dk and dv leave through them.
    if WITH_DK:
        for i in gl.static_range(CHUNKS):
            k_smem.index(HALF * CHUNKS + i).reshape([M, COLUMNS]).store((dk[i] * scale).to(dtype))
    if WITH_DV:
        v_smem.index(HALF).reshape([M, DV]).store(dv.to(dtype))
    fence_async_shared()
    if WITH_DK:
        for i in gl.static_range(CHUNKS):
            tma_store(dk_desc, [kv_head, first_k, i * COLUMNS], k_smem.index(HALF * CHUNKS + i))
    if WITH_DV:
        tma_store(dv_desc, [kv_head, first_k, 0], v_smem.index(HALF))
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_rows", "num_blocks", "longest", "kv_heads", "group"])
def _wide_dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, plan_ptr, end_ptr,
    n_rows, num_blocks, longest, kv_heads, group, scale, factor,
    D: gl.constexpr, DV: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    TILE: gl.constexpr, COLUMNS: gl.constexpr, WITH_DK: gl.constexpr, WITH_DV: gl.constexpr,
):  # fmt: skip
    """dk, dv or both of one block of keys and one key head."""
    M: gl.constexpr = BLOCK // 2
    CHUNKS: gl.constexpr = D // COLUMNS
    dtype: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    kv_head, block = _item(plan_ptr + 5 * num_blocks, num_blocks, kv_heads, longest)
    k_smem = gl.allocate_shared_memory(dtype, [2 * CHUNKS, 1, M, COLUMNS], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, M, DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 1, TILE, COLUMNS], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, TILE, DV], do_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, TILE], stats_desc.layout)
    tile_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_load, (
                q_desc, k_desc, v_desc, do_desc, stats_desc, q_smem, k_smem, v_smem, do_smem, stats_smem,
                tile_smem, kv_full, full, empty, plan_ptr, block, kv_head, num_blocks, kv_heads, group, BLOCK, STAGES,
                M, TILE, COLUMNS, CHUNKS,
            )),
            (_compute, (
                dk_desc, dv_desc, q_smem, k_smem, v_smem, do_smem, stats_smem, tile_smem, kv_full, full, empty,
                plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks, group, scale, factor,
                0, DV, BLOCK, STAGES, TILE, COLUMNS, CHUNKS, WITH_DK, WITH_DV,
            )),
            (_compute, (
                dk_desc, dv_desc, q_smem, k_smem, v_smem, do_smem, stats_smem, tile_smem, kv_full, full, empty,
                plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks, group, scale, factor,
                1, DV, BLOCK, STAGES, TILE, COLUMNS, CHUNKS, WITH_DK, WITH_DV,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
