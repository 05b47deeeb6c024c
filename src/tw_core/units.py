"""Units: what the engine saw and what it wrote (SPEC section 2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tw_core._ids import as_ids
from tw_core._shapes import Int64


@dataclass(frozen=True, eq=False)
class Unit:
    """One engine call: the ids it was given and the ids it returned.

    Iterates as a pair, `context, completion = unit`; equal by value; arrays may share memory with the ids
    they were cut from, so treat them as read-only.

    Attributes:
        context: Shape (C,), int64. Anything array-like is accepted and converted.
        completion: Shape (G,), int64.
    Raises:
        TrieError: Ids that are not integers, are negative, or not one-dimensional.
    """

    context: Int64[np.ndarray, " C"]
    completion: Int64[np.ndarray, " G"]

    def __init__(self, context: Any, completion: Any) -> None:
        object.__setattr__(self, "context", as_ids(context, "context"))
        object.__setattr__(self, "completion", as_ids(completion, "completion"))

    def __iter__(self) -> Iterator[Int64[np.ndarray, " L"]]:
        return iter((self.context, self.completion))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Unit):
            return NotImplemented
        return np.array_equal(self.context, other.context) and np.array_equal(self.completion, other.completion)

    def __hash__(self) -> int:
        return hash((self.context.tobytes(), self.completion.tobytes()))
