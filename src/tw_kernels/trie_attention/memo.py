"""Work done once per packed row and shared by all layers: remembered on the tensor it was made from."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

# tensor -> (its version when the entries were made, entries). Keys are weak: an entry lives as long as its tensor does.
_entries: Any = WeakIdKeyDictionary()


def once_per_tensor(tensor: Tensor, key: Hashable, build: Callable[[Tensor], T]) -> T:
    """Return `build(alias of tensor)`, from memory when the same tensor object comes again unchanged.

    Writing into the tensor drops what was remembered. Inference tensors carry no version, so they are never remembered;
    nor is anything while torch.compile traces. What is built under inference mode is made of normal tensors, which a
    later training pass can use.

    Args:
        tensor: The tensor that the work depends on.
        key: Names the work and its other inputs.
        build: Does the work; it must not keep a reference to `tensor` itself, hence the alias.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return build(tensor)
    version, remembered = _entries.get(tensor, (None, None))
    if version != tensor._version:
        remembered = {}
        _entries[tensor] = (tensor._version, remembered)
    if key not in remembered:
        with torch.inference_mode(False):
            remembered[key] = build(tensor.detach())
    value: T = remembered[key]
    return value
