"""Gluon functions that the forward and the backward share, and the portable kernels' own in Gluon's dialect.

The plan's layout is read in tiles.py and the visibility predicate stands there; both are taken from it.
Guarded by tests/kernels/test_hopper.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tw_kernels.trie_attention import tiles

LN_2 = gl.constexpr(tiles.LN_2.value)

tile_list = gluon.jit(tiles.tile_list.fn)
listed_block = gluon.jit(tiles.listed_block.fn)
visible = gluon.jit(tiles.visible.fn)


@gluon.jit
def write_int(smem, i, value):
    """Put one integer into entry i of (n, 1) shared memory."""
    smem.index(i).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def read_int(smem, i):
    """Entry i of (n, 1) shared memory as a scalar."""
    return gl.sum(smem.index(i).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
