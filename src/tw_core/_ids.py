"""Token ids as every function of tw_core wants them: one-dimensional, int64, not negative."""

from typing import Any

import numpy as np

from tw_core._shapes import Int64
from tw_core.errors import ShapeError, TrieError


def as_ids(value: Any, name: str) -> Int64[np.ndarray, " L"]:
    """Converts an array-like of token ids, without a copy where it already is an int64 array.

    Args:
        value: List, numpy array or torch tensor of integers. Shape (L,); L may be 0.
        name: What the value is called in an error message, e.g. "token_ids" or "sequences[3]".
    Returns:
        Shape (L,), int64; may share memory with `value`.
    Raises:
        ShapeError: The value is not one-dimensional.
        TrieError: An element is not an integer, is negative, or does not fit int64.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        # ragged lists; tensors elsewhere than on the CPU, of a dtype that numpy lacks, or with a gradient
        raise ShapeError(
            f"{name} must be one flat sequence of integer token ids on the CPU, got {_words(value)}; "
            "pass a list, a numpy array or an integer tensor.cpu()"
        ) from error
    if array.ndim != 1:
        raise ShapeError(f"{name} must have shape (L,), got {array.shape}; pass one flat sequence of token ids")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TrieError(
            f"{name} must hold integers, got dtype {array.dtype}; pass token ids, not text, floats or masks"
        )
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise TrieError(f"{name} must fit int64, got {array.max()} at index {array.argmax()}; pass token ids")
    ids = array.astype(np.int64, copy=False)
    if ids.min() < 0:
        row = int(ids.argmin())
        raise TrieError(
            f"{name} must not be negative, got {int(ids[row])} at index {row}; drop padding and ignore marks"
        )
    return ids


def _words(value: Any) -> str:
    """What a value is, in an error message."""
    device = getattr(value, "device", None)
    return f"a {type(value).__name__}" + (
        f" of {value.dtype} on {device}" if device is not None else " of uneven parts"
    )
