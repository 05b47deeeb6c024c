r"""The sum of products: a word problem whose answer needs four independent products and then their sum.

    prompt       1w41x2 boxes of 1y91z9 eggs, 2w72x7 boxes of 2y52z4 keys, …: how many?
    work         1: 1w41x2*1y91z9          one product: 24 times 99, each digit after a label (product, place)
                 4*9=6300>6300             a digit product a line: shifted to its place > running total
                 4*9=0630>6930
                 2*9=0810>6750
                 2*9=0081>6732
                 =1a61b71c31d2             the result, labelled likewise
    sum          1a6602a5113a7814a4225a2   a column addition, a line a place: label, copied digit, running sum;
                 …                         at the end the sum's own digit, with a label
                 5a25b95c45d61             the digits of the sum, read off the columns by their labels
    answer       \boxed{29461}             16492

Digits are written from the lowest place up, so that carries run with the text; the answer too. The sequential and the
fork/join solution have the same lines in the same order; fork/join adds the tags and the outlines. Every text of one
style has the same number of tokens.

Each label (1w, 1a, …) is one token and makes copying what follows it a look-up: without labels a tiny model learns the
products and then fails to copy, factors as well as results.

Tests: tests/recipes/tasks/test_products.py.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tw_recipes.evaluation.grading import ExactGrader
from tw_recipes.tasks.tokenizer import build_tokenizer

Style = Literal["sequential", "forkjoin"]
Split = Literal["train", "test"]

NOUNS = ("pens", "cups", "nuts", "maps", "hats", "keys", "eggs", "jars")
_PLACES = "abcd"
_SUM = 5  # the "term" of the sum in labels
_TEST_SHARE = 16  # one problem in so many belongs to the test split


@dataclass(frozen=True)
class SumOfProducts:
    """The task; every method is deterministic in its arguments.

    Attributes:
        terms: Products a problem has, 2 to 4.
    """

    terms: int = 4
    name: str = "products"

    def __post_init__(self) -> None:
        if self.terms not in (2, 3, 4):
            raise ValueError(f"terms must be 2, 3 or 4, got {self.terms}")

    def problems(self, count: int, *, seed: int, split: Split = "train") -> np.ndarray:
        """Distinct problems of one split; a problem belongs to one split whatever the seed.

        Args:
            count: How many.
            seed: Of the generator; the splits draw from different streams.
            split: "train" or "test".

        Returns:
            Factors of the products. Shape (count, terms, 2), int64, 0..99.

        Raises:
            ValueError: `count` or `split` is not possible.
        """
        if split not in get_args(Split):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rng = np.random.default_rng([seed, get_args(Split).index(split), self.terms])
        weights = 100 ** np.arange(2 * self.terms, dtype=np.uint64)
        keys = np.empty(0, dtype=np.uint64)
        while len(keys) < count:
            drawn = (rng.integers(0, 100, (2 * count + 64, 2 * self.terms)).astype(np.uint64) * weights).sum(axis=1)
            keys = np.concatenate([keys, drawn[_is_test(drawn) == (split == "test")]])
            keys = keys[np.sort(np.unique(keys, return_index=True)[1])]
        factors = keys[:count, None] // weights % np.uint64(100)
        return factors.astype(np.int64).reshape(count, self.terms, 2)

    def rows(
        self, count: int, *, seed: int, split: Split = "train", style: Style = "forkjoin", offset: int = 0
    ) -> list[dict[str, str]]:
        """Data set rows: the problems with one style of solution.

        Args:
            count: How many.
            seed: As in `problems`.
            split: As in `problems`.
            style: "sequential" or "forkjoin"; the problems and their answers do not depend on it.
            offset: Leave out that many problems at the head of the stream.

        Returns:
            Rows {"prompt", "text", "answer"}.
        """
        if style not in get_args(Style):
            raise ValueError(f'style must be "sequential" or "forkjoin", got {style!r}')
        if offset < 0:
            raise ValueError(f"offset must be at least 0, got {offset}")
        factors = self.problems(offset + count, seed=seed, split=split)[offset:]
        nouns = np.random.default_rng(seed).integers(0, len(NOUNS), (offset + count, self.terms))[offset:]
        total = factors.prod(axis=2).sum(axis=1)
        texts = _strings(_solution(factors, style))
        return [
            {"prompt": prompt, "text": text, "answer": answer}
            for prompt, text, answer in zip(
                _strings(_prompt(factors, nouns)), texts, _strings(_digits(total, 5)), strict=True
            )
        ]

    def tokenizer(self) -> Any:
        """One token a digit, label, word and tag."""
        labels = [f"{term}{place}" for term in (1, 2, 3, 4, _SUM) for place in _PLACES]
        labels += [f"{term + 1}{factor}" for term in range(4) for factor in "wxyz"]
        words = [" boxes of ", *(f" {noun}" for noun in NOUNS), ", ", ": how many?"]
        return build_tokenizer([*labels, *words, *"0123456789", *"*=> :.{}", "\n", "\\boxed"])

    def grader(self) -> ExactGrader:
        """Compares the boxed answer after `</think>` with the row's answer; it never sees the prompt."""
        return ExactGrader()


def _is_test(keys: np.ndarray) -> np.ndarray:
    """Which problems belong to the test split: a hash of the factors (splitmix64's mixing), so no digit tells."""
    mixed = keys + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) % np.uint64(_TEST_SHARE) == 0


# Texts of many rows at once: a piece is a constant string or characters of shape (n, width), uint8.
_Piece = str | np.ndarray


def _strings(pieces: _Piece | list[_Piece]) -> list[str]:
    pieces = pieces if isinstance(pieces, list) else [pieces]
    count = next(len(piece) for piece in pieces if isinstance(piece, np.ndarray))
    table = np.concatenate(
        [
            np.broadcast_to(np.frombuffer(piece.encode(), np.uint8), (count, len(piece)))
            if isinstance(piece, str)
            else piece
            for piece in pieces
        ],
        axis=1,
    )
    return [line.tobytes().decode("ascii") for line in table]


def _digits(values: np.ndarray, width: int) -> np.ndarray:
    """Digits from the lowest place up. values (n,) -> (n, width) characters."""
    return (values[:, None] // 10 ** np.arange(width) % 10 + ord("0")).astype(np.uint8)


def _prompt(factors: np.ndarray, nouns: np.ndarray) -> list[_Piece]:
    names = np.frombuffer("".join(NOUNS).encode(), np.uint8).reshape(len(NOUNS), -1)
    pieces: list[_Piece] = []
    for term in range(factors.shape[1]):
        left, right = factors[:, term].T
        pieces += [", "] if term else []
        pieces += [*_factor(left, term, "wx"), " boxes of ", *_factor(right, term, "yz"), " ", names[nouns[:, term]]]
    return [*pieces, ": how many?\n"]


def _factor(values: np.ndarray, term: int, places: str) -> list[_Piece]:
    """The two digits of a factor, each after its label."""
    digits = _digits(values, 2)
    return [piece for p, place in enumerate(places) for piece in (f"{term + 1}{place}", digits[:, p : p + 1])]


def _work(factors: np.ndarray, term: int) -> list[_Piece]:
    """The worked digits of one product and its labelled result line."""
    left, right = factors[:, term].T
    pieces: list[_Piece] = [" ", *_factor(left, term, "wx"), "*", *_factor(right, term, "yz"), "\n"]
    running = np.zeros_like(left)
    for i in range(2):
        for j in range(2):
            a, b = left // 10**i % 10, right // 10**j % 10
            shifted = a * b * 10 ** (i + j)
            running = running + shifted
            pieces += [_digits(a, 1), "*", _digits(b, 1), "=", _digits(shifted, 4), ">", _digits(running, 4), "\n"]
    result = _digits(running, 4)
    labelled = [piece for p in range(4) for piece in (f"{term + 1}{_PLACES[p]}", result[:, p : p + 1])]
    return [*pieces, "=", *labelled, "\n"]


def _sum(factors: np.ndarray) -> list[_Piece]:
    """The column addition of the products, a line a place, and the answer."""
    products = factors.prod(axis=2)
    pieces: list[_Piece] = []
    carry = np.zeros(len(factors), dtype=np.int64)
    for p, place in enumerate(_PLACES):
        running = carry
        for term in range(factors.shape[1]):
            digit = products[:, term] // 10**p % 10
            running = running + digit
            pieces += [f"{term + 1}{place}", _digits(digit, 1), _digits(running, 2)]
        carry = running // 10
        pieces += [f"{_SUM}{place}", _digits(running, 1), "\n"]
    # The answer is read off the columns by their labels, then copied into the box at short distance.
    total = _digits(products.sum(axis=1), 5)
    labelled = [piece for p, place in enumerate(_PLACES) for piece in (f"{_SUM}{place}", total[:, p : p + 1])]
    return [*pieces, *labelled, total[:, 4:], "\n", "</think>\n\n\\boxed{", total, "}"]


def _solution(factors: np.ndarray, style: Style) -> list[_Piece]:
    terms = range(factors.shape[1])
    if style == "sequential":
        return ["<think>\n", *(piece for t in terms for piece in [f"{t + 1}:", *_work(factors, t)]), *_sum(factors)]
    pieces: list[_Piece] = ["<think>\n<Parallel>\n<Outlines>\n"]
    for t in terms:
        pieces += [f"<Outline>{t + 1}: {t + 1}w*{t + 1}y</Outline>\n"]
    pieces += ["</Outlines>\n"]
    for t in terms:
        pieces += [f"<Thread>\n{t + 1}:", *_work(factors, t), "</Thread>"]
    return [*pieces, "\n</Parallel>\n", *_sum(factors)]
