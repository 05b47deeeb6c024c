"""Triton functions shared by the forward and the backward of trie attention.

`visible` is the one visibility predicate of the kernels: only partial tiles evaluate it; full tiles test nothing. The
plan's layout is read in `tile_list`, and nowhere else in the kernels (plan.py writes it).
Guarded by tests/kernels/test_triton.py and by the mutants of tests/kernels/mutants.py.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible(q_rows, k_rows, k_ends, q_depths, k_depths, window, HAS_WINDOW: tl.constexpr):
    """Whether query rows see key rows; the arguments broadcast against each other."""
    seen = (k_rows <= q_rows) & (q_rows < k_ends)
    if HAS_WINDOW:
        seen = seen & (q_depths - k_depths < window)
    return seen


@triton.jit
def load_row_ints(ptr, first, n_rows, BLOCK: tl.constexpr):
    """(BLOCK,) entries of a (N,) int32 tensor; 0 outside, which as a subtree_end hides the key."""
    rows = first + tl.arange(0, BLOCK)
    return tl.load(ptr + rows, mask=rows < n_rows, other=0)


@triton.jit
def load_row_floats(ptr, first, n_rows, BLOCK: tl.constexpr):
    """(BLOCK,) entries of one head of a (H, N) float32 tensor; 0 outside."""
    rows = first + tl.arange(0, BLOCK)
    return tl.load(ptr + rows, mask=rows < n_rows, other=0.0)


@triton.jit
def tile_offsets(stride_n, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) offsets inside a tile, of 32 bits: `autograd._addressable` has copied what they do not reach."""
    return tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_inside(first, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) or (BLOCK, 1): which elements of a tile exist."""
    inside = (first + tl.arange(0, BLOCK) < n_rows)[:, None]
    if D != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    return inside


@triton.jit
def load_tile(head_ptr, first, stride_n, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) rows of one head of a (N, H, D) tensor; 0 outside."""
    pointers = head_ptr + first.to(tl.int64) * stride_n + tile_offsets(stride_n, BLOCK, BLOCK_D)
    return tl.load(pointers, mask=tile_inside(first, n_rows, D, BLOCK, BLOCK_D), other=0.0)


@triton.jit
def store_tile(head_ptr, tile, first, stride_n, n_rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (BLOCK, BLOCK_D) rows of one head of a (N, H, D) tensor, in its dtype."""
    pointers = head_ptr + first.to(tl.int64) * stride_n + tile_offsets(stride_n, BLOCK, BLOCK_D)
    inside = tile_inside(first, n_rows, D, BLOCK, BLOCK_D)
    tl.store(pointers, tile.to(head_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """Hyperbolic tangent by one exponential; the absolute error stays near one float32 epsilon."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))


@triton.jit
def logits_base2(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """q . k -> logits in units of log 2, and tanh(logits / softcap) for its derivative (the products without a cap)."""
    if HAS_SOFTCAP:
        bent = tanh(products * (scale / softcap))
        return bent * (softcap * LOG2_E), bent
    return products * (scale * LOG2_E), products


@triton.jit
def scheduled(program, num_blocks, order_ptr, HEADS: tl.constexpr, PARTS: tl.constexpr, HEAD_SLOWEST: tl.constexpr):
    """Program number -> (key head, block, part): the longest blocks first, as `order_ptr` lists them.

    With HEAD_SLOWEST one key head follows the other, so that its rows stay in L2; else the heads of a block stand
    together, for the better balance. PARTS programs share a block and a key head.
    """
    part = program % PARTS
    item = program // PARTS
    if HEAD_SLOWEST:
        head = item // num_blocks
        rank = item % num_blocks
    else:
        head = item % HEADS
        rank = item // HEADS
    block = tl.load(order_ptr + rank, mask=rank < num_blocks, other=0)
    return head, block, part


@triton.jit
def tile_list(plan_ptr, block, num_blocks, BY_KEY: tl.constexpr):
    """The list of one query block (BY_KEY: of one key block), for `listed_block`.

    Returns (partial, n_partial, full, n_full, step): the places of its first partial and its first full tile, how many
    there are of each, and the step from one full tile to the next. Query blocks meet keys from the first row on, key
    blocks meet queries from the last row back: programs that run together then read the same rows, which stay in L2.
    """
    side = (3 if BY_KEY else 0) * num_blocks
    n_partial = tl.load(plan_ptr + side + block, mask=block < num_blocks, other=0)
    n_full = tl.load(plan_ptr + side + num_blocks + block, mask=block < num_blocks, other=0)
    i = block.to(tl.int64)
    blocks = num_blocks.to(tl.int64)
    lists = plan_ptr + 6 * blocks
    if BY_KEY:
        past = lists + blocks * (blocks + 1) // 2 + (i + 1) * blocks - i * (i + 1) // 2
        return past - (blocks - i) + n_partial - 1, n_partial, past - n_full, n_full, 1
    else:
        start = lists + i * (i + 1) // 2
        return start + n_partial - 1, n_partial, start + i, n_full, -1


@triton.jit
def listed_block(partial, n_partial, full, n_full, step, t):
    """Entry t of a list: its partial tiles (of a query block: the diagonal first), then its full ones.

    0 past the end, where the kernels read ahead.
    """
    pointer = tl.where(t < n_partial, partial - t, full + (t - n_partial) * step)
    return tl.load(pointer, mask=t < n_partial + n_full, other=0)
