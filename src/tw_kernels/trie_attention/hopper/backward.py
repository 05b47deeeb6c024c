"""Gluon backward of trie attention for sm_90: one warp group loads, two compute 64 keys each, over tiles of 64 queries.

Layout    q, do: (N, H, D); k, v, dk, dv: (N, Hkv, D); sums: (N, H, D) float32, all as descriptors (launch.py).
          stats: (2, H, W) float32, W = N rounded up to blocks: lse in units of log 2, then delta (passes.py).
Grid      one program per block of keys and key head, in the order of `_item`.
Work      the transpose of the plan, from the last row back, each tile for the group's heads; partial tiles with the
          interval test.
          Tiles are transposed (keys down, queries across), so P^T and dS^T enter their products from registers.
dq        with WITH_DQ each computing group makes half of its columns from the dS of both, and adds it to `sums` by TMA
          reductions, whose order is not fixed: fast, and not bitwise repeatable. Without, dq is another pass.
Overlap   both products of a tile are issued before its exponentials; dq leaves by TMA while the next tile is computed.
          No product is in flight across the loop's back edge, where ptxas would serialise all of them.
Numerics  as backward.py: p = 2^(logits - lse); P and dS rounded to the inputs' dtype, sums in float32.
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

from tw_kernels.trie_attention.hopper.compat import tma_add, tma_load, tma_store, tma_store_wait
from tw_kernels.trie_attention.hopper.parts import read_int, tile_list, visible, write_int

MOST_LONGEST = gl.constexpr(32)  # blocks of a head that may come before their turn


@gluon.jit
def _item(order_ptr, num_blocks, kv_heads, longest):
    """This program's key head and block of keys; `order_ptr` lists the blocks from most tiles to fewest.

    The `longest` blocks of every head come first, for balance. Then head follows head, its blocks from left to right:
    neighbours, which meet the same queries, run together and find them, and their dq, in L2. The last head's blocks run
    by length, so that the multiprocessors finish together.
    """
    L: gl.constexpr = gl.BlockedLayout([1, MOST_LONGEST], [32, 1], [gl.num_warps(), 1], [1, 0])
    program = gl.program_id(0)
    rest = program - longest * kv_heads
    shorter = gl.maximum(num_blocks - longest, 1)
    kv_head = gl.where(rest < 0, program % kv_heads, rest // shorter)
    place = rest % shorter
    rank = gl.where(rest < 0, program // kv_heads, longest + place)
    by_length = gl.load(order_ptr + rank)
    # Of all blocks but the longest, number `place` from the left: that, and the longest ones left of it.
    i = gl.arange(0, MOST_LONGEST, gl.SliceLayout(1, L))
    j = gl.arange(0, MOST_LONGEST, gl.SliceLayout(0, L))
    long_block = gl.load(order_ptr + i, mask=i < longest, other=2**30)
    others = gl.load(order_ptr + j, mask=j < longest, other=2**30)
    left_of_it = gl.sum((others[None, :] < long_block[:, None]).to(gl.int32), 1)
    by_place = place + gl.sum((long_block - left_of_it <= place).to(gl.int32), 0)
    return kv_head, gl.where((rest < 0) | (kv_head == kv_heads - 1), by_length, by_place)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, do_desc, stats_desc, q_smem, k_smem, v_smem, do_smem, stats_smem,
    tile_smem, kv_full, full, empty, plan_ptr, block, kv_head, num_blocks, kv_heads, group,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Load K and V once in tiles of ROWS, then queries, output gradients and statistics in tiles of TILE.

    Q and K come in CHUNKS tiles of COLUMNS side by side.
    """
    per_block = BLOCK // TILE * group  # tiles
    BYTES: gl.constexpr = (
        CHUNKS * q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * stats_desc.block_type.nbytes
    )
    mbarrier.expect(kv_full, BLOCK // ROWS * (CHUNKS * k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for i in gl.static_range(BLOCK // ROWS):
        first_k = block * BLOCK + i * ROWS
        for j in gl.static_range(CHUNKS):
            tma_load(k_desc, [kv_head, first_k, j * COLUMNS], kv_full, k_smem.index(i * CHUNKS + j))
        tma_load(v_desc, [kv_head, first_k, 0], kv_full, v_smem.index(i))
    partial, n_partial, full_tiles, n_full, list_step = tile_list(plan_ptr, block, num_blocks, True)
    width = num_blocks * BLOCK
    taken = 0  # partial tiles
    step = 0
    for t in range(0, n_partial + n_full):
        # Both lists run from the last row back; so do their tiles together, as neighbouring programs' do.
        last_partial = gl.load(partial - taken, mask=taken < n_partial, other=-1)
        last_full = gl.load(full_tiles + (t - taken) * list_step, mask=t - taken < n_full, other=-1)
        query_block = gl.maximum(last_partial, last_full)
        is_partial = (last_partial > last_full).to(gl.int32)
        taken += is_partial
        for part in range(0, per_block):
            head = kv_head * group + part % group
            first_q = query_block * BLOCK + (part // group) * TILE
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for j in gl.static_range(CHUNKS):
                tma_load(q_desc, [head, first_q, j * COLUMNS], bar, q_smem.index(stage * CHUNKS + j))
            tma_load(stats_desc, [head * width + first_q], bar, stats_smem.index(2 * stage))
            tma_load(do_desc, [head, first_q, 0], bar, do_smem.index(stage))
            tma_load(stats_desc, [(kv_heads * group + head) * width + first_q], bar, stats_smem.index(2 * stage + 1))
            write_int(tile_smem, 2 * stage, first_q)
            write_int(tile_smem, 2 * stage + 1, head * 2 + is_partial)
            mbarrier.arrive(bar, count=1)
            step += 1


@gluon.jit
def _compute(
    dk_desc, dv_desc, dq_desc, q_smem, k_smem, v_smem, do_smem, stats_smem, ds_smem, dq_smem,
    tile_smem, kv_full, full, empty, ds_full, done, plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks,
    group, scale, factor,
    HALF: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """dk and dv of one half of the keys; with WITH_DQ also one half of the columns of dq."""
    M: gl.constexpr = BLOCK // 2
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    K_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    Q_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    A_L: gl.constexpr = gl.DotOperandLayout(0, K_L, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, S_L)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_L)
    dtype: gl.constexpr = q_smem.dtype
    first_k = block * BLOCK + HALF * M
    k_rows = first_k + gl.arange(0, M, KEYS)
    k_ends = gl.load(end_ptr + k_rows, mask=k_rows < n_rows, other=0)
    counts = plan_ptr + 3 * num_blocks + block
    n_tiles = (gl.load(counts) + gl.load(counts + num_blocks)) * (2 * group)
    k_all = k_smem.index(0).reshape([BLOCK, D])
    k = k_all.slice(HALF * M, M, 0)
    v = v_smem.index(0).reshape([BLOCK, D]).slice(HALF * M, M, 0)
    zero = gl.zeros([M, M], gl.float32, S_L)
    dk = gl.zeros([M, D], gl.float32, K_L)
    dv = gl.zeros([M, D], gl.float32, K_L)
    mbarrier.wait(kv_full, 0)
    for step in range(0, n_tiles):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        q = q_smem.index(stage).reshape([M, D])
        do = do_smem.index(stage).reshape([M, D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)  # (keys, queries)
        dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        first_q = read_int(tile_smem, 2 * stage)
        head = read_int(tile_smem, 2 * stage + 1)
        lse = stats_smem.index(2 * stage).load(QUERIES)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * factor - lse[None, :])
        if head % 2 == 1:
            q_rows = first_q + gl.arange(0, M, QUERIES)
            p = gl.where(visible(q_rows[None, :], k_rows[:, None], k_ends[:, None], 0, 0, 0, False), p, 0.0)
        p16 = gl.convert_layout(p.to(dtype), A_L, assert_trivial=True)
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        delta = stats_smem.index(2 * stage + 1).load(QUERIES)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - delta[None, :])).to(dtype)
        ds16 = gl.convert_layout(ds, A_L, assert_trivial=True)
        dk = warpgroup_mma(ds16, q, dk, is_async=True)
        if WITH_DQ:
            # Two buffers: the other group has read one when it arrives at the next.
            buffer = (step & 1) * 2
            ds_smem.index(buffer + HALF).store(ds)
            fence_async_shared()
            mbarrier.arrive(ds_full, count=1)
            mbarrier.wait(ds_full, step & 1)
            k_columns = k_all.slice(HALF * (D // 2), D // 2, 1)
            dq = gl.zeros([M, D // 2], gl.float32, Q_L)
            dq = warpgroup_mma(
                ds_smem.index(buffer).permute((1, 0)), k_columns.slice(0, M, 0), dq, use_acc=False, is_async=True
            )
            dq = warpgroup_mma(ds_smem.index(buffer + 1).permute((1, 0)), k_columns.slice(M, M, 0), dq, is_async=True)
            dv, dk, p16, ds16 = warpgroup_mma_wait(2, deps=[dv, dk, p16, ds16])
            mbarrier.arrive(empty.index(stage), count=1)
            dq = warpgroup_mma_wait(0, deps=[dq])
            tma_store_wait(1)  # the tile before the last has left its buffer
            out = dq_smem.index(buffer + HALF)
            out.reshape([M, D // 2]).store(dq)
            fence_async_shared()
            tma_add(dq_desc, [head // 2, first_q, HALF * (D // 2)], out)
        else:
            dv, dk, p16, ds16 = warpgroup_mma_wait(0, deps=[dv, dk, p16, ds16])
            mbarrier.arrive(empty.index(stage), count=1)
    # The stages are spent once the other group has finished too; dk and dv leave through them.
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    spent = q_smem if HALF == 0 else do_smem
    spent.index(0).reshape([M, D]).store((dk * scale).to(dtype))
    spent.index(1).reshape([M, D]).store(dv.to(dtype))
    fence_async_shared()
    tma_store(dk_desc, [kv_head, first_k, 0], spent.index(0))
    tma_store(dv_desc, [kv_head, first_k, 0], spent.index(1))
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_rows", "num_blocks", "longest", "kv_heads", "group"])
def _dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc, dq_desc, plan_ptr, end_ptr,
    n_rows, num_blocks, longest, kv_heads, group, scale, factor,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys and one key head; with WITH_DQ its part of dq, added to what is there."""
    M: gl.constexpr = BLOCK // 2
    dtype: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    kv_head, block = _item(plan_ptr + 5 * num_blocks, num_blocks, kv_heads, longest)
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, M, D], do_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, M], stats_desc.layout)
    DS_L: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, M], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [4 if WITH_DQ else 1, M, M], DS_L)
    dq_smem = gl.allocate_shared_memory(gl.float32, [4 if WITH_DQ else 1, 1, M, D // 2], dq_desc.layout)
    tile_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    done = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(done, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_load, (
                q_desc, k_desc, v_desc, do_desc, stats_desc, q_smem, k_smem, v_smem, do_smem, stats_smem,
                tile_smem, kv_full, full, empty, plan_ptr, block, kv_head, num_blocks, kv_heads, group, BLOCK, STAGES,
                BLOCK, M, D, 1,
            )),
            (_compute, (
                dk_desc, dv_desc, dq_desc, q_smem, k_smem, v_smem, do_smem, stats_smem, ds_smem, dq_smem,
                tile_smem, kv_full, full, empty, ds_full, done, plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks,
                group, scale, factor, 0, D, BLOCK, STAGES, WITH_DQ,
            )),
            (_compute, (
                dk_desc, dv_desc, dq_desc, q_smem, k_smem, v_smem, do_smem, stats_smem, ds_smem, dq_smem,
                tile_smem, kv_full, full, empty, ds_full, done, plan_ptr, end_ptr, block, kv_head, n_rows, num_blocks,
                group, scale, factor, 1, D, BLOCK, STAGES, WITH_DQ,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
