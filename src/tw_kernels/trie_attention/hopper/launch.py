"""Launchers of the Hopper kernels: they describe tensors to TMA, allocate and launch.

A tensor (N, H, D) is described in three dimensions, heads first, so that any strides of 16 bytes serve and TMA itself
clips the last tile of every head. Guarded by tests/kernels/test_hopper.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tw_kernels.trie_attention.backward import launch_dq, tma_addressable
from tw_kernels.trie_attention.config import config_for
from tw_kernels.trie_attention.hopper.backward import MOST_LONGEST, _dkv_kernel
from tw_kernels.trie_attention.hopper.forward import _forward_kernel
from tw_kernels.trie_attention.hopper.passes import after_kernel, before_kernel
from tw_kernels.trie_attention.hopper.support import BLOCK
from tw_kernels.trie_attention.hopper.wide import _wide_dkv_kernel
from tw_kernels.trie_attention.plan import BlockPlan, make_plan, plan_size
from tw_kernels.trie_attention.tiles import LOG2_E

STAGES = 2  # tiles in shared memory of what streams by: k and v forward, q and do backward
ROWS = 64  # of the passes before and after
# (D, Dv) -> tiles of the forward. Wide heads leave no shared memory for o, which then takes the place of q; those of
# 256 leave registers for the logits of 64 keys. COLUMNS is the largest power of two that divides D.
FORWARD_TILES = {
    (64, 64): {"KEYS": 128, "COLUMNS": 64, "O_IN_Q": False},
    (128, 128): {"KEYS": 128, "COLUMNS": 128, "O_IN_Q": False},
    (192, 128): {"KEYS": 128, "COLUMNS": 64, "O_IN_Q": True},
    (256, 256): {"KEYS": 64, "COLUMNS": 256, "O_IN_Q": True},
}
# (D, Dv) -> tiles of the pass for dk and dv of wide heads, and its launches: dk and dv together where registers allow.
WIDE_TILES = {(192, 128): {"TILE": 32, "COLUMNS": 64}, (256, 256): {"TILE": 32, "COLUMNS": 256}}
WIDE_PASSES = {
    (192, 128): [{"WITH_DK": True, "WITH_DV": True}],
    (256, 256): [{"WITH_DK": True, "WITH_DV": False}, {"WITH_DK": False, "WITH_DV": True}],
}
# Triton 3.10 turns contraction to multiply-add off by default.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_DTYPES = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.int32: gl.int32
}  # fmt: skip


@functools.cache
def tile_layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared memory of a (1, rows, dim) tile, or of `dim` entries of a vector when rows is 0."""
    element = _DTYPES[dtype]
    if rows:
        return gl.NVMMASharedLayout.get_default_for([1, rows, dim], element)
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=element.primitive_bitwidth, rank=1)


def describe(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of one head of x (N, H, D): `rows` rows and `columns` (default D) columns."""
    n, heads, dim = x.shape
    columns = columns or dim
    # The stride of a dimension of one entry means nothing; TMA wants a multiple of 16 bytes all the same.
    strides = [x.stride(1) if heads > 1 else dim, x.stride(0) if n > 1 else dim, 1]
    return TensorDescriptor(x, [heads, n, dim], strides, [1, rows, columns], tile_layout(rows, columns, x.dtype))


def describe_vector(x: Tensor, entries: int) -> TensorDescriptor:
    """Runs of `entries` entries of x, one-dimensional and contiguous."""
    return TensorDescriptor(x, [x.shape[0]], [1], [entries], tile_layout(0, entries, x.dtype))


def describable(x: Tensor) -> Tensor:
    """x, or a copy of it where TMA cannot address it."""
    return x if tma_addressable(x) else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Allocate o (N, H, Dv) and lse (H, N) float32, launch.

    Args:
        q: Shape (N, H, D), N >= 1, float16 or bfloat16; any strides, at the price of a copy where TMA cannot use them.
            (D, Dv) must be a key of `FORWARD_TILES`.
        k: Shape (N, Hkv, D).
        v: Shape (N, Hkv, Dv).
        subtree_end: Shape (N,), int32.
        plan: The plan of `subtree_end`, without a window, in blocks of 128 rows.
        scale: Logit scale, positive.
    """
    n, heads, dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    block = plan.block
    q, k, v = describable(q), describable(k), describable(v)
    end = subtree_end if subtree_end.data_ptr() % 16 == 0 else subtree_end.clone()
    o = q.new_empty((n, heads, value_dim))
    lse = q.new_empty((heads, n), dtype=torch.float32)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    tiles = FORWARD_TILES[dim, value_dim]
    keys, columns = tiles["KEYS"], tiles["COLUMNS"]
    _forward_kernel[(min(plan.num_blocks * heads, _multiprocessors(q.device)),)](
        describe(q, block // 2, columns), describe(k, keys, columns), describe(v, keys), describe(o, block // 2),
        describe_vector(end, keys), plan.data, counter, lse,
        n, plan.num_blocks, kv_heads, heads // kv_heads, scale * LOG2_E.value,
        D=dim, DV=value_dim, BLOCK=block, STAGES=STAGES, **tiles, **OPTIONS,
    )  # fmt: skip
    return o, lse


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    plan: BlockPlan,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    *,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate and compute dq, dk and dv.

    Args:
        q: As in `launch_forward`, like every argument not named here.
        k: Shape (N, Hkv, D).
        v: Shape (N, Hkv, Dv).
        subtree_end: Shape (N,), int32.
        plan: The forward's plan.
        o: The forward's output. Shape (N, H, Dv).
        lse: The forward's. Shape (H, N), float32.
        grad_o: Gradient of the loss by `o`. Shape (N, H, Dv).
        scale: Logit scale, positive.
        deterministic: Compute dq in a pass of its own, the portable one, instead of adding it up in any order; for wide
            heads it always is.
    """
    deterministic = deterministic or (q.shape[2], v.shape[2]) in WIDE_PASSES
    q, k, v, grad_o = describable(q), describable(k), describable(v), describable(grad_o)
    (dq, dk, dv), launches = _backward_launches(
        q, k, v, subtree_end, plan, o, lse, grad_o, scale=scale, with_dq=not deterministic
    )
    for launch in launches:
        launch()
    if deterministic:
        config = config_for(q, v, "dq")
        dq, _ = launch_dq(
            q, k, v, subtree_end, None, plan, o, lse, grad_o, scale=scale, window=None, softcap=None, config=config
        )
    return dq, dk, dv


def _backward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    plan: BlockPlan,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    *,
    scale: float,
    with_dq: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Callable[[], object]]]:
    """Allocate dq (without rows unless `with_dq`), dk and dv; the launches, in order, that fill them.

    q, k, v and grad_o must be describable; the rest as in `launch_backward`.
    """
    n, heads, dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    block = plan.block
    dq = q.new_empty((n if with_dq else 0, heads, dim))
    dk, dv = k.new_empty((n, kv_heads, dim)), v.new_empty((n, kv_heads, value_dim))
    width = plan.num_blocks * block
    stats = q.new_empty((2 * heads * width,), dtype=torch.float32)
    # One row where the sums are unused: a kernel has one signature.
    sums = q.new_empty((heads, n if with_dq else 1, dim), dtype=torch.float32).transpose(0, 1)
    launches: list[Callable[[], object]] = [functools.partial(
        before_kernel[(width // ROWS, heads)],
        o, grad_o, lse, stats, sums if with_dq else None,
        o.stride(0), o.stride(1), grad_o.stride(0), grad_o.stride(1), n, width, D=value_dim, ROWS=ROWS, **OPTIONS,
    )]  # fmt: skip
    longest = min(plan.num_blocks, MOST_LONGEST.value, _multiprocessors(q.device) // kv_heads)  # one wave of all heads
    if (dim, value_dim) in WIDE_PASSES:
        tiles = WIDE_TILES[dim, value_dim]
        rows, columns = tiles["TILE"], tiles["COLUMNS"]
        launches += [functools.partial(
            _wide_dkv_kernel[(plan.num_blocks * kv_heads,)],
            describe(q, rows, columns), describe(k, block // 2, columns), describe(v, block // 2),
            describe(grad_o, rows), describe_vector(stats, rows),
            describe(dk, block // 2, columns), describe(dv, block // 2), plan.data, subtree_end,
            n, plan.num_blocks, longest, kv_heads, heads // kv_heads, scale, scale * LOG2_E.value,
            D=dim, DV=value_dim, BLOCK=block, STAGES=STAGES, **tiles, **outputs, **OPTIONS,
        ) for outputs in WIDE_PASSES[dim, value_dim]]  # fmt: skip
        return (dq, dk, dv), launches
    launches += [functools.partial(
        _dkv_kernel[(plan.num_blocks * kv_heads,)],
        describe(q, block // 2), describe(k, block), describe(v, block), describe(grad_o, block // 2),
        describe_vector(stats, block // 2), describe(dk, block // 2), describe(dv, block // 2),
        describe(sums, block // 2, dim // 2), plan.data, subtree_end,
        n, plan.num_blocks, longest, kv_heads, heads // kv_heads, scale, scale * LOG2_E.value,
        D=dim, BLOCK=block, STAGES=STAGES, WITH_DQ=with_dq, **OPTIONS,
    )]  # fmt: skip
    if with_dq:
        launches += [functools.partial(
            after_kernel[(-(-n // ROWS), heads)],
            sums, dq, dq.stride(0), dq.stride(1), n, scale, D=dim, ROWS=ROWS, **OPTIONS,
        )]  # fmt: skip
    return (dq, dk, dv), launches


def plan_of_one_row(end: Tensor) -> BlockPlan:
    """`make_plan(end)` of one row without its kernels, so that those which read it may launch before they compile.

    Nothing is copied from the host, which a CUDA graph capture forbids.
    """
    data = end.new_zeros(plan_size(1, BLOCK))
    data[:6:3] = 1  # each side counts one partial tile, the first
    return BlockPlan(data, 1, BLOCK, None)


def try_one_row(device: torch.device, dim: int, value_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    """Compile and launch the kernels of one shape and one backward for one row on a device; raises what Triton raises.

    Every kernel compiles on a thread of its own: MLIR and LLVM run without the GIL, ptxas and the C compiler of the
    launchers are processes. So do the plan's kernels, which the call that asks needs next. The portable pass for dq is
    left out: it is compiled for the call's own heads, and impl="triton" stands on it too.
    """
    q, v = (torch.zeros((1, 1, columns), dtype=dtype, device=device) for columns in (dim, value_dim))
    end = torch.ones(1, dtype=torch.int32, device=device)
    lse = torch.zeros((1, 1), dtype=torch.float32, device=device)
    plan = plan_of_one_row(end)
    with_dq = not deterministic and (dim, value_dim) not in WIDE_PASSES
    _, launches = _backward_launches(q, q, v, end, plan, v, lse, v, scale=1.0, with_dq=with_dq)
    launches += [
        functools.partial(launch_forward, q, q, v, end, plan, scale=1.0),
        functools.partial(make_plan, end, block=BLOCK),
    ]
    triton.runtime.driver.active.get_current_target()  # Triton's driver is made at first use, without a lock
    stream = torch.cuda.current_stream(device)

    def on_the_callers_stream(launch: Callable[[], object]) -> None:
        with torch.cuda.stream(stream):  # device, stream and context are a thread's own; a stream brings its device
            torch.zeros(1, device=device)  # sets the context; describing a tensor to TMA, the first thing, does not
            launch()

    with ThreadPoolExecutor(len(launches), "trie-attention-compile") as pool:
        futures = [pool.submit(on_the_callers_stream, launch) for launch in launches]
    for future in futures:
        future.result()
