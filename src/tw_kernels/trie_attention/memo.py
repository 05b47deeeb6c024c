"""Work done once per packed row and shared by all layers: remembered on a tensor object, or on what views stand on.

What may be remembered, and for which CUDA stream, `remembered_for` says for both, and so for the block plan (plan.py).
Guarded by tests/kernels/test_memo.py, test_api.py and test_plan.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

CACHED_VALUES = 16


def remembered_for(x: Tensor) -> int | None:
    """The CUDA stream (0 elsewhere) that alone may use what is made of `x` now; None: it must not be remembered.

    On another stream nothing orders the reader after the maker. Nothing is remembered while torch.compile traces; of
    tensors of inference mode, which carry no version, so that a write would go unnoticed; nor inside a CUDA graph
    capture, whose replays see new rows and fill what the capture has made only then.
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    if not x.is_cuda:
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return int(torch.cuda.current_stream(x.device).cuda_stream)


# ------------------------------------------------------------------------------------------------- by tensor object

# tensor -> (its version when the entries were made, entries). Keys are weak: an entry lives as long as its tensor does.
_entries: Any = WeakIdKeyDictionary()


def once_per_tensor(tensor: Tensor, key: Hashable, build: Callable[[Tensor], T]) -> T:
    """Return `build(alias of tensor)`, from memory when the same tensor object comes again unchanged.

    Writing into the tensor drops what was remembered; what never is, `remembered_for` says. What is built under
    inference mode is made of normal tensors, which a later training pass can use.

    Args:
        tensor: The tensor that the work depends on.
        key: Names the work and its other inputs.
        build: Does the work; it must not keep a reference to `tensor` itself, hence the alias.
    """
    stream = remembered_for(tensor)
    if stream is None:
        return build(tensor)
    version, remembered = _entries.get(tensor, (None, None))
    if version != tensor._version:
        remembered = {}
        _entries[tensor] = (tensor._version, remembered)
    if (key, stream) not in remembered:
        with torch.inference_mode(False):
            remembered[key, stream] = build(tensor.detach())
    value: T = remembered[key, stream]
    return value


# ------------------------------------------------------------------------------------------- by what views stand on

# key -> (weak references that keep the key's storage addresses from being used again, value); the newest last.
_values: OrderedDict[Hashable, tuple[tuple[StorageWeakRef, ...], Any]] = OrderedDict()
_lock = threading.Lock()


def once_per_rows(rows: Sequence[Tensor], key: Hashable, build: Callable[[], T]) -> T:
    """Return `build()`, from memory when other views of the same rows come, unchanged.

    For layers of which each brings another view: the work is found again by what the views stand on, storage (held
    weakly), offset, shape, version and stream. A write through torch raises the version and thereby drops the value.
    (Writes that autograd cannot see either, such as through `.data` or numpy, are not noticed.) The newest
    `CACHED_VALUES` are kept; what never is, `remembered_for` says.

    Args:
        rows: The tensors that the work depends on, all on one device.
        key: Names the work and its other inputs.
        build: Does the work; its value must not share memory with `rows`, which would never be forgotten.
    """
    streams = [remembered_for(x) for x in rows]
    if None in streams:
        return build()
    try:
        place = (tuple(_standing(x) for x in rows), key, streams[0])
    except RuntimeError:  # no storage of its own: a wrapper of torch.func, or a fake tensor
        return build()
    value: T
    with _lock:
        if place in _values:
            _values.move_to_end(place)
            value = _values[place][1]
            return value
    with torch.inference_mode(False):  # a later training pass saves it for its backward
        value = build()
    with _lock:
        for stale in [k for k, (refs, _) in _values.items() if any(r.expired() for r in refs)]:  # type: ignore[no-untyped-call]
            del _values[stale]
        refs = tuple(StorageWeakRef(x.untyped_storage()) for x in rows)  # type: ignore[no-untyped-call]
        _values[place] = (refs, value)
        if len(_values) > CACHED_VALUES:
            _values.popitem(last=False)
    return value


def _standing(x: Tensor) -> tuple[Hashable, ...]:
    """What a view stands on. The memory's weak reference keeps a dead storage's address from naming another."""
    storage = x.untyped_storage()
    return (storage._cdata, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version)
