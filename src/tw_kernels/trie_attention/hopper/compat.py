"""Gluon's names that moved between Triton 3.6 and 3.9: the one place that tells the versions apart.

Guarded by tests/kernels/test_hopper_compile.py, which compiles the kernels with the installed Triton and with a second
one where there is one.
"""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

# Later versions renamed the two copies and made the reduction public.
RENAMED = hasattr(tma, "async_load")


@_core.builtin
def _add_3_6(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@_core.builtin
def as_tiles(smem: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory as tiles of another shape; the method for it was private once."""
    shape = [_core._unwrap_if_constexpr(size) for size in shape]
    return _semantic.memdesc_reinterpret(smem, smem.dtype, shape, _core._unwrap_if_constexpr(layout))


tma_load = tma.async_load if RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if RENAMED else tma.async_copy_shared_to_global
tma_add = tma.async_atomic_add if RENAMED else _add_3_6
tma_store_wait = tma.store_wait
