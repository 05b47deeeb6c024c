r"""Long multiplication, written in two notations: labelled digits for small models, ordinary numbers for real ones.

    labelled   2wB7*1wA41aA821wB91aB56…      row of 7, the digit at place B of factor 2, times factor 1: per digit the
                                             label of the factor's digit, the digit, a label of the row, result, carry
               1aA81aA08001xA8               a column: label, digit, running sum for each row; then the result's digit
    plain      294 * 37: 294 * 7 = 2058; 294 * 30 = 8820; 2058 + 8820 = 10878

A label is [number][kind][place]: kind w a factor, x a product, a..l a row, m..t a limb (the product with some digits of
the multiplier, what a thread computes); places A.. from the lowest up. Numbers are written from the lowest digit up.
No label stands for two things in one text, so copying is a look-up.

Tests: tests/recipes/tasks/test_multiply.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from tw_recipes.tasks.text import Pieces, chars

PLACES = "ABCDEFGHIJKLMNOPQRSTUVWX"
ROWS, LIMBS = "abcdefghijkl", "mnopqrst"
FACTOR, PRODUCT = "w", "x"

Value = TypeVar("Value")


class Limb(NamedTuple):
    """What one thread of a forked product is to do: the multiplier's digits from place `start` to before `end`."""

    number: int
    start: int
    end: int


class Notation(Protocol[Value]):
    """How numbers and steps are written; `Value` is a number of that notation."""

    def factor(self, index: int) -> Value:
        """Factor `index` of the problem, 0-based."""

    def width(self, value: Value) -> int:
        """Digits of a number, leading zeros included."""

    def product(self, node: int, left: Value, right: Value) -> tuple[Pieces, Value]:
        """The whole product, worked out in one piece."""

    def limb(self, node: int, left: Value, right: Value, limb: Limb) -> tuple[str, Pieces, Value]:
        """(outline, work, partial product) of one thread."""

    def join(self, node: int, left: Value, right: Value, parts: Sequence[Value]) -> tuple[Pieces, Value]:
        """The sum of the threads' partial products."""

    def name(self, value: Value) -> str:
        """How an outline refers to a number."""

    def answer(self, value: Value) -> Pieces:
        """From the product to the end of the response."""


@dataclass(frozen=True, eq=False)
class Digits:
    """A number of many problems at once.

    Attributes:
        values: Digits from the lowest place up. Shape (n, width).
        prefix: Of the digits' labels.
        offset: Places below the lowest digit, for partial products.
    """

    values: np.ndarray
    prefix: str
    offset: int = 0

    @property
    def width(self) -> int:
        """Digits."""
        return self.values.shape[1]

    def label(self, place: int) -> str:
        """The label of one digit."""
        return self.prefix + PLACES[place]

    def digit(self, place: int) -> np.ndarray:
        """One digit as characters. Shape (n, 1)."""
        return chars(self.values[:, place : place + 1])

    def written(self) -> Pieces:
        """Every digit after its label."""
        return [piece for place in range(self.width) for piece in (self.label(place), self.digit(place))]


class Labelled:
    """The notation of labelled digits, for many problems at once.

    Args:
        factors: Shape (n, k), 0..999.
    """

    def __init__(self, factors: np.ndarray):
        split = factors[:, :, None] // 10 ** np.arange(3) % 10
        self.factors = [Digits(split[:, i], f"{i + 1}{FACTOR}") for i in range(factors.shape[1])]

    def factor(self, index: int) -> Digits:
        """See `Notation`."""
        return self.factors[index]

    def width(self, value: Digits) -> int:
        """See `Notation`."""
        return value.width

    def product(self, node: int, left: Digits, right: Digits) -> tuple[Pieces, Digits]:
        """See `Notation`."""
        return self._part(node, left, right, Limb(0, 0, right.width), f"{node}{PRODUCT}")

    def limb(self, node: int, left: Digits, right: Digits, limb: Limb) -> tuple[str, Pieces, Digits]:
        """See `Notation`."""
        work, part = self._part(node, left, right, limb, f"{node}{LIMBS[limb.number]}")
        return f"{left.label(0)}*{right.label(limb.start)}", work, Digits(part.values, part.prefix, limb.start)

    def join(self, node: int, left: Digits, right: Digits, parts: Sequence[Digits]) -> tuple[Pieces, Digits]:
        """See `Notation`."""
        return _columns(parts, f"{node}{PRODUCT}", left.width + right.width)

    def name(self, value: Digits) -> str:
        """See `Notation`."""
        return value.label(0)

    def answer(self, value: Digits) -> Pieces:
        """See `Notation`: read off by labels, then copied into the box at short distance."""
        return ["=", *value.written(), "\n", "</think>\n\n\\boxed{", chars(value.values), "}"]

    def _part(self, node: int, left: Digits, right: Digits, limb: Limb, prefix: str) -> tuple[Pieces, Digits]:
        """`left` times some digits of `right`: a row a digit, then the sum of the rows."""
        places = range(limb.start, limb.end)
        if len(places) == 1:
            return _row(left, right, limb.start, prefix)
        pieces: Pieces = []
        rows = []
        for place in places:
            work, row = _row(left, right, place, f"{node}{ROWS[place]}")
            pieces += work
            rows.append(Digits(row.values, row.prefix, place - limb.start))
        work, total = _columns(rows, prefix, left.width + len(places))
        return [*pieces, *work], total


def _row(left: Digits, right: Digits, place: int, prefix: str) -> tuple[Pieces, Digits]:
    """`left` times one digit of `right`."""
    by, carry = right.values[:, place], np.zeros(len(left.values), dtype=np.int64)
    row = Digits(np.empty((len(by), left.width + 1), dtype=np.int64), prefix)
    pieces: Pieces = [right.label(place), right.digit(place), "*"]
    for i in range(left.width):
        both = left.values[:, i] * by + carry
        row.values[:, i], carry = both % 10, both // 10
        pieces += [left.label(i), left.digit(i), row.label(i), row.digit(i), chars(carry[:, None])]
    row.values[:, left.width] = carry
    return [*pieces, row.label(left.width), row.digit(left.width), "\n"], row


def _columns(parts: Sequence[Digits], prefix: str, width: int) -> tuple[Pieces, Digits]:
    """Column addition, a line a place."""
    count = len(parts[0].values)
    total = Digits(np.empty((count, width), dtype=np.int64), prefix)
    carry = np.zeros(count, dtype=np.int64)
    pieces: Pieces = []
    for place in range(width):
        running = carry
        for part in parts:
            at = place - part.offset
            if 0 <= at < part.width:
                running = running + part.values[:, at]
                pieces += [part.label(at), part.digit(at), chars(running[:, None] % 10), chars(running[:, None] // 10)]
        total.values[:, place], carry = running % 10, running // 10
        pieces += [total.label(place), total.digit(place), "\n"]
    assert not carry.any(), "a product has more digits than its factors together"
    return pieces, total


class Plain:
    """Ordinary notation, one problem.

    Args:
        factors: k integers.
    """

    def __init__(self, factors: Sequence[int]):
        self.factors = [(value, 3) for value in factors]

    def factor(self, index: int) -> tuple[int, int]:
        """See `Notation`; a number is (value, digits it may have)."""
        return self.factors[index]

    def width(self, value: tuple[int, int]) -> int:
        """See `Notation`."""
        return value[1]

    def product(self, node: int, left: tuple[int, int], right: tuple[int, int]) -> tuple[Pieces, tuple[int, int]]:
        """See `Notation`."""
        work, total = _plain_part(left[0], right[0], 0, right[1])
        return [f"{left[0]} * {right[0]}: ", work, "\n"], (total, left[1] + right[1])

    def limb(
        self, node: int, left: tuple[int, int], right: tuple[int, int], limb: Limb
    ) -> tuple[str, Pieces, tuple[int, int]]:
        """See `Notation`."""
        by = right[0] % 10**limb.end - right[0] % 10**limb.start
        work, total = _plain_part(left[0], right[0], limb.start, limb.end)
        return f"{left[0]} * {by}", [work, "\n"], (total, left[1] + limb.end)

    def join(
        self, node: int, left: tuple[int, int], right: tuple[int, int], parts: Sequence[tuple[int, int]]
    ) -> tuple[Pieces, tuple[int, int]]:
        """See `Notation`."""
        total = left[0] * right[0]
        return [f"{left[0]} * {right[0]}: {_plain_sum([value for value, _ in parts])}\n"], (total, left[1] + right[1])

    def name(self, value: tuple[int, int]) -> str:
        """See `Notation`."""
        return str(value[0])

    def answer(self, value: tuple[int, int]) -> Pieces:
        """See `Notation`."""
        return [f"</think>\n\n\\boxed{{{value[0]}}}"]


def _plain_part(left: int, right: int, start: int, end: int) -> tuple[str, int]:
    by = [right // 10**place % 10 * 10**place for place in range(start, end)]
    rows = [left * value for value in by]
    steps = [f"{left} * {value} = {row}" for value, row in zip(by, rows, strict=True)]
    return "; ".join([*steps, *([_plain_sum(rows)] if len(rows) > 1 else [])]), sum(rows)


def _plain_sum(values: Sequence[int]) -> str:
    running, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{running} + {value} = {running + value}")
        running += value
    return "; ".join(steps)
