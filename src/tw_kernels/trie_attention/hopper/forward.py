"""Gluon forward of trie attention for sm_90: one warp group loads, two compute 64 query rows each.

Layout    q, o: (N, H, D); k, v: (N, Hkv, D), as descriptors (launch.py). subtree_end: (N,) int32. lse: (H, N) float32.
Grid      one program a multiprocessor; the loader draws the next item (block of queries, query head) from a counter,
          longest first within a key head, and hands it to the computing groups through shared memory.
Work      the plan's list of the block: the diagonal tiles, the other partial tiles, the full ones, KEYS keys each.
          Columns of q and k come in tiles of COLUMNS, a power of two: for D = 192 three products of 64 make Q K^T.
Overlap   Q K^T of a tile is issued before P V of the tile before it, whose product runs under the softmax; the two
          computing groups run under each other. Keys, values and queries arrive by TMA, o leaves by TMA.
Numerics  as forward.py: logits, max, sum, accumulator in float32, base-2 exponentials; P rounded to v's dtype.
Source    FlashAttention-3 (arXiv:2407.08608), sections 3.1 and 3.2, over listed tiles.
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

from tw_kernels.trie_attention.hopper.compat import as_tiles, tma_load, tma_store, tma_store_wait
from tw_kernels.trie_attention.hopper.parts import LN_2, listed_block, read_int, tile_list, write_int


@gluon.jit
def _hand_over(item_smem, item_full, item_empty, turn, head, block, n_partial, n_tiles):
    """Give the computing groups item number `turn`; no tiles means that there is none left."""
    mbarrier.wait(item_empty, (turn & 1) ^ 1)
    write_int(item_smem, 0, head)
    write_int(item_smem, 1, block)
    write_int(item_smem, 2, n_partial)
    write_int(item_smem, 3, n_tiles)
    mbarrier.arrive(item_full, count=1)


@gluon.jit
def _take_over(item_smem, item_full, item_empty, turn):
    """The other side of `_hand_over`."""
    mbarrier.wait(item_full, turn & 1)
    head = read_int(item_smem, 0)
    block = read_int(item_smem, 1)
    n_partial = read_int(item_smem, 2)
    n_tiles = read_int(item_smem, 3)
    mbarrier.arrive(item_empty, count=1)
    return head, block, n_partial, n_tiles


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, end_desc, q_smem, k_smem, v_smem, end_smem, item_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty,
    plan_ptr, counter_ptr, num_blocks, kv_heads, group,
    D: gl.constexpr, COLUMNS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Draw items; load their queries, keys, values and the keys' subtree_end."""
    M: gl.constexpr = BLOCK // 2
    PARTS: gl.constexpr = BLOCK // KEYS  # of a listed block
    CHUNKS: gl.constexpr = D // COLUMNS
    num_items = num_blocks * kv_heads * group
    item = gl.program_id(0)
    turn = 0
    step = 0
    while item < num_items:
        part = item % group
        rank = (item // group) % num_blocks
        kv_head = (item // group) // num_blocks
        head = kv_head * group + part
        block = gl.load(plan_ptr + 2 * num_blocks + rank)
        partial, n_partial, full, n_full, list_step = tile_list(plan_ptr, block, num_blocks, False)
        n_tiles = (n_partial + n_full) * PARTS
        _hand_over(item_smem, item_full, item_empty, turn, head, block, n_partial * PARTS, n_tiles)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * CHUNKS * q_desc.block_type.nbytes)
        for i in gl.static_range(2 * CHUNKS):
            first_q = block * BLOCK + i // CHUNKS * M
            tma_load(q_desc, [head, first_q, i % CHUNKS * COLUMNS], q_full, q_smem.index(i))
        for t in range(0, n_tiles):
            first_k = listed_block(partial, n_partial, full, n_full, list_step, t // PARTS) * BLOCK + t % PARTS * KEYS
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), CHUNKS * k_desc.block_type.nbytes + end_desc.block_type.nbytes)
            for i in gl.static_range(CHUNKS):
                k_to = k_smem.index(stage * CHUNKS + i)
                tma_load(k_desc, [kv_head, first_k, i * COLUMNS], k_full.index(stage), k_to)
            tma_load(end_desc, [first_k], k_full.index(stage), end_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [kv_head, first_k, 0], v_full.index(stage), v_smem.index(stage))
            step += 1
        turn += 1
        item = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)
    _hand_over(item_smem, item_full, item_empty, turn, 0, 0, 0, 0)


@gluon.jit
def _softmax(s, row_max, row_sum, factor):
    """One step of the online softmax in base 2: p, and what earlier sums must be multiplied by."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
    # A row may not have met an ancestor yet: a finite pivot keeps -inf - -inf away.
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * factor - pivot[:, None])
    rescale = gl.exp2(row_max - pivot)
    return p, new_max, row_sum * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _products(
    q_smem, k_smem, zero, stage,
    HALF: gl.constexpr, M: gl.constexpr, CHUNKS: gl.constexpr, COLUMNS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Issue Q K^T of one half of the queries and the keys of a stage. (M, KEYS)"""
    s = zero
    for i in gl.static_range(CHUNKS):
        q = q_smem.index(HALF * CHUNKS + i).reshape([M, COLUMNS])
        k = k_smem.index(stage * CHUNKS + i).reshape([KEYS, COLUMNS])
        s = warpgroup_mma(q, k.permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def _compute(
    o_desc, q_smem, k_smem, v_smem, end_smem, o_smem, item_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty,
    lse_ptr, n_rows, factor,
    HALF: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, O_IN_Q: gl.constexpr,
):  # fmt: skip
    """Softmax over the ancestors of half of each item's queries."""
    M: gl.constexpr = BLOCK // 2
    PARTS: gl.constexpr = BLOCK // KEYS
    CHUNKS: gl.constexpr = D // COLUMNS
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_L)
    COLS: gl.constexpr = gl.SliceLayout(0, S_L)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_L)
    dtype: gl.constexpr = v_smem.dtype
    O_LAST: gl.constexpr = 2 * D // DV - 1 if O_IN_Q else 1  # each half's o lies within that half's q
    turn = 0
    step = 0
    head, block, n_partial, n_tiles = _take_over(item_smem, item_full, item_empty, turn)
    while n_tiles > 0:
        first_q = block * BLOCK + HALF * M
        q_rows = first_q + gl.arange(0, M, ROWS)
        zero = gl.zeros([M, KEYS], gl.float32, S_L)
        acc = gl.zeros([M, DV], gl.float32, O_L)
        row_max = gl.full([M], float("-inf"), gl.float32, ROWS)
        row_sum = gl.zeros([M], gl.float32, ROWS)
        # The diagonal block, which comes first and is the only one with keys after a query.
        stage = step % STAGES
        phase = (step // STAGES) & 1
        mbarrier.wait(q_full, turn & 1)
        mbarrier.wait(k_full.index(stage), phase)
        s = _products(q_smem, k_smem, zero, stage, HALF, M, CHUNKS, COLUMNS, KEYS)
        s = warpgroup_mma_wait(0, deps=[s])
        k_ends = end_smem.index(stage).load(COLS)
        mbarrier.arrive(k_empty.index(stage), count=1)
        k_rows = block * BLOCK + gl.arange(0, KEYS, COLS)
        seen = (k_rows[None, :] <= q_rows[:, None]) & (q_rows[:, None] < k_ends[None, :])
        s = gl.where(seen, s, float("-inf"))
        p, row_max, row_sum, rescale = _softmax(s, row_max, row_sum, factor)
        p16 = gl.convert_layout(p.to(dtype), P_L, assert_trivial=True)
        mbarrier.wait(v_full.index(stage), phase)
        for t in range(1, n_tiles):
            v_stage = stage
            v = v_smem.index(v_stage).reshape([KEYS, DV])
            step += 1
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s = _products(q_smem, k_smem, zero, stage, HALF, M, CHUNKS, COLUMNS, KEYS)
            pv = warpgroup_mma(p16, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            if t < n_partial:
                k_ends = end_smem.index(stage).load(COLS)
                seen = q_rows[:, None] < k_ends[None, :]
                if PARTS > 1:
                    seen = seen & ((t >= PARTS) | (k_rows[None, :] + t * KEYS <= q_rows[:, None]))
                s = gl.where(seen, s, float("-inf"))
            mbarrier.arrive(k_empty.index(stage), count=1)
            p, row_max, row_sum, rescale = _softmax(s, row_max, row_sum, factor)
            # The value barrier stands between softmax and wait: ptxas moves the wait up within a basic block.
            mbarrier.wait(v_full.index(stage), phase)
            acc, p16 = warpgroup_mma_wait(0, deps=[pv, p16])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = acc * gl.convert_layout(rescale, O_ROWS, assert_trivial=True)[:, None]
            p16 = gl.convert_layout(p.to(dtype), P_L, assert_trivial=True)
        if not O_IN_Q:
            mbarrier.arrive(q_empty, count=1)
        v = v_smem.index(stage).reshape([KEYS, DV])
        pv = warpgroup_mma(p16, v, acc, is_async=True)
        row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)  # rows past the end have met nothing
        lse = (row_max + gl.log2(row_sum)) * LN_2
        gl.store(lse_ptr + head.to(gl.int64) * n_rows + q_rows, lse, mask=q_rows < n_rows)
        acc, p16 = warpgroup_mma_wait(0, deps=[pv, p16])
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        acc = acc * gl.convert_layout(1.0 / row_sum, O_ROWS, assert_trivial=True)[:, None]
        tma_store_wait(0)
        o_smem.index(HALF * O_LAST).reshape([M, DV]).store(acc.to(dtype))
        fence_async_shared()
        tma_store(o_desc, [head, first_q, 0], o_smem.index(HALF * O_LAST))
        if O_IN_Q:
            tma_store_wait(0)
            mbarrier.arrive(q_empty, count=1)
        turn += 1
        head, block, n_partial, n_tiles = _take_over(item_smem, item_full, item_empty, turn)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["n_rows", "num_blocks", "kv_heads", "group"])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, end_desc, plan_ptr, counter_ptr, lse_ptr,
    n_rows, num_blocks, kv_heads, group, factor,
    D: gl.constexpr, DV: gl.constexpr, COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, O_IN_Q: gl.constexpr,
):  # fmt: skip
    """Allocate shared memory and barriers, then part ways."""
    dtype: gl.constexpr = q_desc.dtype
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    M: gl.constexpr = BLOCK // 2
    CHUNKS: gl.constexpr = D // COLUMNS
    q_smem = gl.allocate_shared_memory(dtype, [2 * CHUNKS, 1, M, COLUMNS], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 1, KEYS, COLUMNS], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, DV], v_desc.layout)
    if O_IN_Q:
        o_smem = as_tiles(q_smem, [2 * D // DV, 1, M, DV], o_desc.layout)
    else:
        o_smem = gl.allocate_shared_memory(dtype, [2, 1, M, DV], o_desc.layout)
    end_smem = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], end_desc.layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    item_full = gl.allocate_shared_memory(gl.int64, [1], BAR)
    item_empty = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(item_full, count=1)
    mbarrier.init(item_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_load, (
                q_desc, k_desc, v_desc, end_desc, q_smem, k_smem, v_smem, end_smem, item_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty,
                plan_ptr, counter_ptr, num_blocks, kv_heads, group, D, COLUMNS, BLOCK, KEYS, STAGES,
            )),
            (_compute, (
                o_desc, q_smem, k_smem, v_smem, end_smem, o_smem, item_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty,
                lse_ptr, n_rows, factor, 0, D, DV, COLUMNS, BLOCK, KEYS, STAGES, O_IN_Q,
            )),
            (_compute, (
                o_desc, q_smem, k_smem, v_smem, end_smem, o_smem, item_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty,
                lse_ptr, n_rows, factor, 1, D, DV, COLUMNS, BLOCK, KEYS, STAGES, O_IN_Q,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
