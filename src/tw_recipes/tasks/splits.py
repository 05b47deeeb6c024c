"""Which split a problem belongs to: a hash of the problem itself, so that it is the same whatever the seed.

Tests: tests/recipes/tasks.
"""

from typing import Any, Literal, get_args

import numpy as np

Style = Literal["sequential", "forkjoin"]
Split = Literal["train", "test"]

TEST_SHARE = 16  # one problem in so many belongs to the test split
_VAIN_DRAWS = 20  # a single one of the smallest finds nothing new in 1 of 70 cases


def mix(keys: np.ndarray) -> np.ndarray:
    """splitmix64's mixing: uint64 in, uint64 out, every bit of the key in every bit of the result."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def is_test(keys: np.ndarray) -> np.ndarray:
    """Which problems belong to the test split, by their keys (uint64). Shape (n,) -> (n,), bool."""
    return mix(keys) % np.uint64(TEST_SHARE) == 0


def stream(count: int, *, seed: int, split: Split, salt: int) -> np.random.Generator:
    """The generator of one split; splits draw from different streams.

    Raises:
        ValueError: `count` or `split` is not possible.
    """
    if split not in get_args(Split):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return np.random.default_rng([seed, get_args(Split).index(split), salt])


class Search:
    """Counts the draws that found no new problem, so that asking for more than there are ends.

    Args:
        count: Problems that are wanted.
    """

    def __init__(self, count: int) -> None:
        self.count, self._found, self._vain = count, 0, 0

    def wants_more(self, found: int) -> bool:
        """Whether to draw again, with so many distinct problems at hand.

        Raises:
            ValueError: Draw after draw has found nothing new.
        """
        self._vain = self._vain + 1 if found == self._found else 0
        self._found = found
        if found < self.count and self._vain > _VAIN_DRAWS:
            raise ValueError(f"count must be at most {found}, all that this split has, got {self.count}; ask for fewer")
        return found < self.count


def check_rows(style: Any, offset: int) -> None:
    """Refuse an unknown style or a negative offset.

    Raises:
        ValueError: Either is not possible.
    """
    if style not in get_args(Style):
        raise ValueError(f'style must be "sequential" or "forkjoin", got {style!r}')
    if offset < 0:
        raise ValueError(f"offset must be at least 0, got {offset}")
